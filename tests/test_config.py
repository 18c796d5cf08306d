"""Configuration: all options compose, and mistakes end in one line and exit code 2."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from flash import cli
from flash.bundled import CONF
from flash.commands import begin
from flash.config import ROOTS, entry, load, register

NEEDS = {
    "data=folder": ["data.path=x"],
    "data=shards": ["data.path=x"],
    "data=files": ["data.sources=[{path: x}]"],
}
"""Settings that an option requires the user to give."""


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Function that runs an entry script in this process; returns its exit code and stderr.

    The code is -1 if a job was given that ended without an error.
    """
    monkeypatch.chdir(tmp_path)

    def call(script: str, *arguments: str, job=None) -> tuple[int, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        for name in ("FLASH_PROGRAM", "FLASH_RUNS", "FLASH_VERB"):
            monkeypatch.setenv(name, "")  # restored after the test, whatever the command sets
        begin(script)
        reached = []
        try:
            entry(script, job or reached.append)
        except SystemExit as stop:
            assert not reached
            return int(stop.code or 0), capsys.readouterr().err
        return (0 if reached else -1), capsys.readouterr().err

    return call


OF_EXPERIMENT = {"table6": "export"}
"""Command of each experiment that is not for train.py."""


@pytest.mark.parametrize("script", ROOTS)
def test_defaults_compose_and_convert(script, run):
    assert run(script)[0] == 0


@pytest.mark.parametrize(
    "path", sorted(CONF.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_option_of_every_group_composes(path, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASH_RUNS", str(tmp_path))
    (tmp_path / "conf").mkdir()
    register()
    group = path.parent.name
    reached = False
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for script, schema in ROOTS.items():
            defaults = yaml.safe_load((CONF / f"{script}.yaml").read_text())["defaults"]
            known = {key for entry in defaults if isinstance(entry, dict) for key in entry}
            override = f"{group}={path.stem}"
            if group == "arch" and script in {"train", "export", "evaluate"}:
                override = f"+{override}"
            elif group == "experiment":
                if script != OF_EXPERIMENT.get(path.stem, "train"):
                    continue
            elif group not in known:
                continue
            settings = load(compose(script, [override, *NEEDS.get(override, [])]), schema)
            reached = True
            if group not in {"arch", "experiment"}:
                node = getattr(settings, group)
                assert getattr(node, "name", path.stem) is not None
    assert reached


@pytest.mark.parametrize(
    ("script", "argument", "message"),
    [
        ("train", "recipe.lrr=1", "recipe.lrr: unknown key; did you mean 'lr'?"),
        ("train", "+recipe.lrr=1", "recipe.lrr: unknown key; did you mean 'lr'?"),
        ("train", "+recipes.lr=1", "recipes: unknown key; did you mean 'recipe'?"),
        ("train", "recipe.lr=fast", "recipe.lr=fast: expected a number"),
        ("train", "recipe.lr=-1", "recipe.lr=-1.0: expected a positive number"),
        ("train", "recipe.schedule=linear", "recipe.schedule=linear: expected one of cosine, wsd"),
        ("train", "recipe=contine", "did you mean 'continue'?"),
        ("train", "+arch=flash_65m", "did you mean 'flash_650m'?"),
        ("train", "trainer.max_steps=0", "trainer.max_steps=0: expected a positive integer"),
        ("train", "data.validation.path=x", "give the value as a whole"),
        ("search", "search.trails=5", "search.trails: unknown key; did you mean 'trials'?"),
        (
            "search",
            "space.model_dim.stp=1",
            "space.model_dim.stp: unknown key; did you mean 'step'?",
        ),
        ("search", "space.model_dim.step=0", "space.model_dim.step=0: expected a positive integer"),
        ("search", "device.threads=4096", "device.threads=4096: expected 1 to the"),
        ("search", "latency=bloks", "did you mean 'blocks'?"),
        ("export", "gate.max_kl_quantised=1", "did you mean 'max_kl_quantized'?"),
        (
            "export",
            "format=[executorch,onnx]",
            "format[1]=onnx: expected one of executorch, hf, gguf",
        ),
        ("export", "device=hots", "did you mean 'host'?"),
        ("search", "device.group_size=32", "renamed to device.lowering.group_size"),
        ("export", "device.skip_unread=false", "renamed to device.lowering.prefill_last_only"),
        ("search", "latency=physical", "latency=physical: renamed to latency=analytical"),
        ("search", "latency.predictor=physical", "renamed to latency.predictor=analytical"),
        ("evaluate", "form=program", "form: renamed to format"),
        ("train", "data.parts=[]", "data.parts: renamed to data.sources"),
        (
            "train",
            "device.threads=2",
            "not a setting of this command; it is one of flash",
        ),
        ("train", "space=tiny", "space: not a group of this command; it is one of flash search"),
        ("train", "arch=flash_650m", "arch: has no option by default; write +arch=flash_650m"),
        ("search", "+arch=tiny_2", "arch: not a group of this command; it is one of flash train"),
        ("train", "+recipe=distill", "write recipe=OPTION, without '+'"),
        ("train", "+experiment=paper", "write experiment=OPTION, without '+'"),
        ("train", "++recipe=distill", "write recipe=distill"),
        ("train", "+recipe.lr=1", "+recipe.lr: is set already; write recipe.lr=VALUE"),
        ("train", "foo", "foo: expected key=value"),
        ("train", "data.end_of_text=<|x|>", """'data.end_of_text="VALUE"'"""),
        ("train", "data.x=[1", "data.x=[1: expected key=value"),
        ("train", "data.begin_of_text=maybe", "begin_of_text=maybe: expected true or false"),
        ("train", "arch.ffn_dim=64", "arch.ffn_dim: is not set so far; write +arch.ffn_dim=VALUE"),
        ("train", "data=null", "a config group is null: expected the name of one of its options"),
        ("train", "+arch=tiny_2", "search first"),
        (
            "export",
            "device.lowering.max_context=100",
            "device.lowering.max_context=100: expected at least",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, script, argument, message):
    code, err = run(script, argument)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_ctrl_c_exits_130_and_says_how_to_go_on(run):
    def interrupted(settings):
        raise KeyboardInterrupt

    code, err = run("train", "seed=3", job=interrupted)
    assert code == 130
    assert "python train.py seed=3" in err


def test_a_full_disk_is_one_line(run):
    def full(settings):
        raise OSError(28, "No space left on device", "runs/x")

    code, err = run("train", job=full)
    assert code == 1
    assert err.strip() == (
        "error: runs/x: No space left on device; finished work is kept, run the same command again"
    )


def test_a_full_disk_is_one_line_if_a_library_in_rust_finds_it(run):
    def full(settings):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    code, err = run("train", job=full)
    assert code == 1
    assert err.strip() == (
        "error: No space left on device; finished work is kept, run the same command again"
    )


def test_found_architectures_are_taken_by_name(run, tmp_path):
    found = tmp_path / "runs" / "conf" / "arch"
    found.mkdir(parents=True)
    (found / "mine_0.yaml").write_text("ffn_dim: 192\n", "utf-8")
    seen = []
    assert run("train", "+arch=mine_0", job=seen.append)[0] == -1
    assert seen[0].arch == {"ffn_dim": 192}
    assert seen[0].name == "mine_0"


def test_the_folder_of_configuration_groups_exists():
    assert Path(CONF).is_dir()


def test_former_names_of_the_changelog_are_answered(run):
    """Every renamed key of the changelog, typed at a command that has its group."""
    text = (CONF.parent / "CHANGELOG.md").read_text("utf-8")
    table = text.partition("### Renamed keys")[2].partition("###")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", table, re.MULTILINE)
    assert len(rows) > 15
    for former, present in rows:
        code, err = run("search", f"{former}=1")
        assert (code, err.strip()) == (2, f"error: {former}: renamed to {present}")


def test_a_broken_file_of_the_user_is_named(run, tmp_path):
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "broken.yaml").write_text("a: [b\n", "utf-8")
    code, err = run("train", "data=broken")
    assert code == 2
    assert err.count("\n") == 1
    assert "broken.yaml, line " in err


def test_a_further_rank_runs_the_command_of_the_first(monkeypatch):
    """Lightning starts it as `flash seed=1`, with the program and what Hydra knows."""
    started = []
    monkeypatch.setattr("flash.cli.run", started.append)
    monkeypatch.setenv("FLASH_VERB", "train")
    monkeypatch.setattr(sys, "argv", ["flash", "seed=1"])
    assert cli.main() == 2  # the first rank: no such command
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main() == 0
    assert started == ["train"]
    assert sys.argv == ["flash", "seed=1"]
