"""The dashboards as W&B's own client sends them, recorded by a server of the tests."""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

import flash
from flash.compat.wandb_workspaces import specification
from flash.dashboards.command import NAME, TITLE, make_dashboards
from flash.dashboards.settings import WorkspaceSettings
from flash.errors import InputError
from tests.dashboards.fake_wandb import FakeWandb, serve

ROOT = Path(flash.__file__).parent
SECTIONS = ["Frontier", "Predicted against measured", "Devices", "Training", "Winners", "Failures"]


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server that the client finds, with its key, through the environment."""
    with serve(FakeWandb()) as state:
        for name in ("WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", state.url)
        monkeypatch.setenv("WANDB_API_KEY", state.key)
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        yield state
        wandb.teardown()


def make(**changes: Any) -> None:
    make_dashboards(WorkspaceSettings(**{"entity": "team", "project": "phones", **changes}))


def read(printed: str) -> tuple[ws.Workspace, wr.Report]:
    """Read both dashboards at the addresses that the command printed."""
    urls = dict(re.findall(r"(\w+): (http\S+)", printed))
    return ws.Workspace.from_url(urls["workspace"]), wr.Report.from_url(urls["report"])


def sent(server: FakeWandb) -> list[dict[str, Any]]:
    """Specifications in the order in which they were sent."""
    return [json.loads(each["spec"]) for each in server.mutations]


def test_w_and_b_reads_what_was_sent(server, capsys):
    make()
    kinds = [(each["type"], each["displayName"]) for each in server.mutations]
    assert kinds == [("project-view", NAME), ("runs", TITLE)]
    workspace, report = read(capsys.readouterr().out)
    assert [specification(workspace), {**specification(report), "width": "fluid"}] == sent(server)
    grids = [block for block in report.blocks if isinstance(block, wr.PanelGrid)]
    heads = [block.text for block in report.blocks if isinstance(block, wr.H1)]
    assert [section.name for section in workspace.sections] == heads == SECTIONS
    for section, grid in zip(workspace.sections, grids, strict=True):
        kinds = [type(panel) for panel in section.panels]
        assert kinds == [type(panel) for panel in grid.panels] != []
        assert "UnknownPanel" not in {kind.__name__ for kind in kinds}
        assert grid.runsets[0].filters
    trials, frontier = workspace.sections[0].panels[:2]
    assert trials.query["history"] == {"keys": ["search/latency_ms", "search/loss"]}
    assert frontier.query["summaryTable"] == {"tableKey": "search/frontier"}


def test_a_second_run_updates_both_and_changes_nothing(server, capsys):
    make()
    first = capsys.readouterr().out
    make()
    assert capsys.readouterr().out == first
    assert len(server.views) == 2
    specs = sent(server)
    assert specs[:2] == specs[2:]


def test_what_others_have_added_stays(server, capsys):
    make()
    workspace, _ = read(capsys.readouterr().out)
    mine = ws.Section(name="Mine", panels=[wr.LinePlot(title="My plot", y=["mine"])])
    workspace.sections = [mine, *workspace.sections]
    workspace.settings.max_runs = 50
    workspace.save()
    [report] = [each for each in server.views.values() if each["type"] == "runs"]
    comments = [{"threadId": "1"}]
    report["spec"] = json.dumps({**json.loads(report["spec"]), "discussionThreads": comments})
    copied = {**report, "id": "Vmlldzo5", "createdAt": "2026-03-01T00:00:00"}
    server.views = {"Vmlldzo5": copied, **server.views}
    make()
    view, updated = server.mutations[-2:]
    bank = json.loads(view["spec"])["section"]["panelBankConfig"]
    assert [section["name"] for section in bank["sections"]] == [*SECTIONS, "Mine"]
    assert json.loads(view["spec"])["section"]["settings"]["maxRuns"] == 50
    assert updated["id"] == report["id"]
    assert json.loads(updated["spec"])["discussionThreads"] == comments


def test_the_environment_names_the_team_and_the_project(server, monkeypatch, capsys):
    make_dashboards(WorkspaceSettings(project="phones"))  # the team of the key's account
    monkeypatch.setenv("WANDB_PROJECT", "phones")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    make_dashboards(WorkspaceSettings())
    assert len(server.views) == 2
    assert "/team/phones?nw=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("WANDB_API_KEY", "", "W&B is offline or has no key; log in with `wandb login`"),
        ("WANDB_MODE", "offline", "W&B is offline or has no key"),
        ("WANDB_API_KEY", "1" * 40, "returned error 401"),
        ("WANDB_API_KEY", "short", "API key must have 40+ characters"),
    ],
)
def test_without_a_key_that_is_accepted_nothing_is_sent(
    server, monkeypatch, variable, value, words
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match="entity=team project=phones: ") as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.operations == []


def test_a_project_that_is_not_there_is_named(server):
    with pytest.raises(InputError, match="entity=team project=phone: no such project of W&B"):
        make(project="phone")
    assert server.mutations == []


def test_a_request_that_fails_is_one_line(server, monkeypatch):
    def refuse(variables):
        raise LookupError("permission denied")

    monkeypatch.setattr(server, "_upsert", refuse)
    with pytest.raises(InputError, match="project=phones: W&B says: .*permission denied"):
        make()


def test_a_file_gets_what_would_be_sent(server, tmp_path):
    path = tmp_path / "dashboards.json"
    make(file=str(path))
    assert server.operations == []
    make()
    assert list(json.loads(path.read_text()).values()) == sent(server)


def strings(node: Any) -> Iterator[str]:
    """Iterate over the strings of a JSON value."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for each in node.values() if isinstance(node, dict) else node:
            yield from strings(each)


def shown(specification: Any) -> set[str]:
    """Names of the metrics, tables and figures that panels show."""
    names = {text.removeprefix("summary:") for text in strings(specification)}
    return {
        each for each in names if re.fullmatch(r"(search|train|val|export|eval|figures)/.+", each)
    }


@cache
def sources() -> list[tuple[set[str], list[str]]]:
    """Of each file of flash that may log: its strings, and its f-strings as regular expressions."""
    found = []
    for path in ROOT.rglob("*.py"):
        if path.parent.name == "dashboards":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
        values = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
        parts = [[getattr(each, "value", None) for each in value] for value in values]
        patterns = [
            "".join(re.escape(p) if isinstance(p, str) else "(.+)" for p in each) for each in parts
        ]
        found.append(({text for text in texts if isinstance(text, str)}, patterns))
    return found


def is_logged(name: str) -> bool:
    """Return True if flash has the name as a string, or an f-string that makes it.

    An f-string whose value is the whole end of the name counts if a string is equal to that end:
    one of the same file, but for figures, which are logged in another file than they are drawn in.
    """
    kind, _, end = name.partition("/")
    all_texts = set().union(*(texts for texts, _ in sources()))
    for texts, patterns in sources():
        if name in texts:
            return True
        known = end in (all_texts if kind == "figures" else texts)
        for pattern in patterns:
            if pattern == f"{kind}/(.+)" and not known:
                continue
            if pattern.startswith(f"{kind}/") and re.fullmatch(pattern, name):
                return True
    return False


def test_panels_show_what_is_logged(tmp_path):
    path = tmp_path / "dashboards.json"
    make(points=["prefill_2048", "decode_77"], file=str(path))
    written = json.loads(path.read_text("utf-8"))
    names = shown(written["workspace"])
    assert names == shown(written["report"])
    assert {"export/prefill_2048_ms", "export/decode_77_predicted_ms", "val/loss"} <= names
    assert {name for name in names if not is_logged(name)} == set()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], r"points=\[\]: expected a latency"),
        (["prefill_512", "decode"], r"points\[1\]=decode: expected prefill_N or decode_N"),
        (["decode_1", "decode_1"], r"points=\[decode_1, decode_1\]: expected different"),
    ],
)
def test_illegal_points_are_named(points, message):
    with pytest.raises(InputError, match=message):
        WorkspaceSettings(points=points)
