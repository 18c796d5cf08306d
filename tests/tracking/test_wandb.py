"""Facts about runs on W&B: keys, connections, offline files, failures in the middle, lineage."""

import base64
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from flash.records import file_digest
from flash.tracking.artifacts import Artifact, ArtifactKind, weights_artifact
from flash.tracking.backend import JobType, RunInfo
from flash.tracking.links import find_url
from flash.tracking.settings import LoggerKind, LoggerSettings
from flash.tracking.tracker import open_tracker
from flash.tracking.wandb import WandbBackend
from tests.tracking.offline import read_run, read_runs

KEY = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import logging, sys, time
from pathlib import Path
logging.basicConfig(format="%(levelname)s %(message)s")
from flash.tracking import wandb
from flash.tracking.settings import LoggerSettings
from flash.tracking.backend import JobType, RunInfo
from flash.tracking.tracker import open_tracker
wandb._INIT_TIMEOUT_S = 2.0
start = time.perf_counter()
for name in ("first", "second"):
    info = RunInfo(job=JobType.train, name=name, key="k", group="g")
    with open_tracker(LoggerSettings(name="wandb"), Path(sys.argv[1]), info) as tracker:
        tracker.log({"train/loss": 1.0}, 0)
print(time.perf_counter() - start)
"""
"""Two runs of one process."""


def run_script(folder: Path, **variables: str) -> tuple[list[str], float]:
    """Run `SCRIPT`; return the lines on stderr and the duration of its runs [s]."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = {"HOME": str(folder), "NETRC": str(folder / "no-netrc")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "logs")],
        env={**clean, **home, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stderr.splitlines(), float(done.stdout)


asked_with: list[str | None] = []
"""Credentials of the requests to `Refusal`."""


class Refusal(http.server.BaseHTTPRequestHandler):
    """Answers 401 to everything, as W&B does to a key that it does not know."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        asked_with.append(self.headers.get("authorization"))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "user is not logged in"}]}')

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.mark.parametrize("trouble", ["no key", "form of the key", "refused", "closed", "silent"])
def test_a_run_that_cannot_be_online_is_offline_after_one_warning(tmp_path, trouble):
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as silent,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            closed = listener.getsockname()[1]
        ports = {
            "refused": server.server_port,
            "closed": closed,
            "silent": silent.getsockname()[1],
        }
        variables = {} if trouble == "no key" else {"WANDB_API_KEY": KEY}
        if trouble == "form of the key":
            variables = {"WANDB_API_KEY": "bad-key"}
        if trouble in ports:
            variables["WANDB_BASE_URL"] = f"http://127.0.0.1:{ports[trouble]}"
        lines, seconds = run_script(tmp_path, **variables)
        server.shutdown()
    assert len(lines) == 1, lines
    [line] = lines
    assert line.startswith("WARNING W&B: ")
    assert "wandb sync" in line
    assert seconds < 30  # of a busy machine; the wait itself is 2 s here
    runs = read_runs(tmp_path / "logs")
    assert [run.values("train/loss") for run in runs] == [[1.0], [1.0]]
    secrets = [KEY, "bad-key"]
    texts = [path.read_bytes() for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert not any(secret.encode() in text for secret in secrets for text in texts)
    assert not any(secret in line for secret in secrets)


@pytest.mark.parametrize("with_port", [True, False])
def test_a_key_in_netrc_is_that_of_a_server_of_ones_own(tmp_path, with_port):
    asked_with.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        machine = f"127.0.0.1:{server.server_port}" if with_port else "127.0.0.1"
        netrc = tmp_path / "netrc"
        netrc.write_text(f"machine {machine} login user password {KEY}\n")
        netrc.chmod(0o600)
        url = f"http://127.0.0.1:{server.server_port}"
        [line], _ = run_script(tmp_path, NETRC=str(netrc), WANDB_BASE_URL=url)
        server.shutdown()
    assert asked_with[0] == f"Basic {base64.b64encode(f'api:{KEY}'.encode()).decode()}"
    assert "no key found" not in line
    assert KEY not in line
    assert netrc.read_text().count("machine") == 1


def test_a_run_that_goes_on_is_the_same_run(tmp_path):
    for step in (0, 1, 2):
        with open_tracker(offline(), tmp_path, info_of()) as tracker:
            tracker.log({"train/loss": 1.0}, step)
    runs = [run.run for run in read_runs(tmp_path)]
    assert [run.run_id for run in runs] == [info_of().id] * 3


def info_of(**changes) -> RunInfo:
    values = {"job": JobType.train, "name": "toy", "key": "k", "group": "study"}
    return RunInfo(**{**values, **changes})


def offline(**changes) -> LoggerSettings:
    return LoggerSettings(name="wandb", offline=True, **changes)


def test_ids_follow_from_type_name_and_key():
    assert info_of().id == info_of(group="other", config={"a": 1}).id
    others = ({}, {"name": "b"}, {"key": "b"}, {"job": JobType.export})
    assert len({info_of(**each).id for each in others}) == 4


def test_project_group_and_link_are_those_of_the_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "from-environment")
    others = offline(project="p", entity="team", group="mine")
    for name, settings in (("a", offline()), ("b", others)):
        info = info_of(name=name, folder=tmp_path / "result", tags={"backbone": "b" * 99})
        with open_tracker(settings, tmp_path, info):
            pass
    first, second = (run.run for run in read_runs(tmp_path))
    assert (first.project, first.run_group) == ("from-environment", "study")
    assert (second.project, second.entity, second.run_group) == ("p", "team", "mine")
    assert len(first.tags[0]) == 64
    link = json.loads((tmp_path / "result" / "wandb.json").read_text())
    assert (link["id"], link["project"], link["entity"]) == (info_of(name="b").id, "p", "team")
    assert Path(link["files"]).is_dir()
    assert find_url(tmp_path / "result") is None
    assert find_url(tmp_path) is None


def test_a_mode_of_the_environment_holds_unless_the_settings_name_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with open_tracker(LoggerSettings(name="wandb"), tmp_path, info_of()) as tracker:
        tracker.log({"train/loss": 1.0})
    assert read_runs(tmp_path) == []
    with open_tracker(offline(), tmp_path, info_of()):
        pass
    assert len(read_runs(tmp_path)) == 1


@pytest.mark.parametrize("kind", [LoggerKind.wandb, LoggerKind.csv])
def test_a_logger_that_fails_is_one_warning(tmp_path, kind, caplog, monkeypatch):
    settings = LoggerSettings(name=kind.value, kind=kind, offline=True)
    with open_tracker(settings, tmp_path, info_of()) as tracker:
        backend = type(tracker._backend)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "log", full_disk)
            tracker.log({"train/loss": 1.0}, 0)
        tracker.log({"train/loss": 2.0}, 1)
        tracker.summarize({"train/loss": 2.0})
    [message] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("toy: the logger failed (OSError: [Errno 28] No space left")


def full_disk(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kind", [LoggerKind.wandb, LoggerKind.csv])
def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, kind, caplog):
    (tmp_path / "logs").write_text("a file")
    settings = LoggerSettings(name=kind.value, kind=kind, offline=True)
    with open_tracker(settings, tmp_path / "logs", info_of()) as tracker:
        tracker.log({"train/loss": 1.0}, 0)
    [record] = caplog.records
    assert record.levelname == "WARNING"


def test_an_end_of_the_process_of_wandb_ends_no_run(tmp_path):
    script = SCRIPT.replace(
        "        tracker.log({",
        "        import psutil\n"
        "        if name == 'first':\n"
        "            for child in psutil.Process().children(recursive=True): child.kill()\n"
        "        time.sleep(1)\n"
        "        for _ in range(30): tracker.log({'train/loss': 2.0}, 0); time.sleep(0.02)\n"
        "        tracker.log({",
    )
    environment = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert float(done.stdout) < 30
    lines = done.stderr.splitlines()
    assert len(lines) <= 1, lines  # none if the end was not noticed in time
    assert all(line.startswith("WARNING first: the logger failed (") for line in lines)
    lost, whole = sorted(tmp_path.rglob("*.wandb"), key=lambda path: path.stat().st_mtime)
    assert lost != whole
    assert len(read_run(whole).values("train/loss")) == 31


def test_what_one_run_writes_and_another_reads_is_the_same_artifact(tmp_path):
    folder = tmp_path / "models" / "a b,c=1" / "checkpoint"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "notes.txt"):
        (folder / name).write_text(name)
    program = tmp_path / "model.pte"
    program.write_bytes(bytes(1000))
    checkpoint = weights_artifact(folder, "tiny", tmp_path / "tiny")
    assert weights_artifact(tmp_path / "tiny", "tiny", tmp_path / "tiny").title == "backbone-tiny"
    runs = tmp_path / "runs"
    with open_tracker(offline(), runs, info_of()) as tracker:
        tracker.publish(checkpoint)
    with open_tracker(offline(upload=True), runs, info_of(job=JobType.export)) as tracker:
        tracker.use(weights_artifact(folder, "tiny", None))
        tracker.publish(Artifact(ArtifactKind.executorch, "a b,c=1", program))
    train, export = read_runs(runs)
    [made], [used] = train.made, export.used
    assert made.name == used.name == "checkpoint-a-b-c-1"
    assert made.digest == used.digest
    assert {each.path for each in made.manifest.contents} == {"config.json", "model.safetensors"}
    [pte] = export.made
    [entry] = pte.manifest.contents
    assert (entry.path, entry.local_path, entry.ref) == ("model.pte", str(program), "")
    assert json.loads(pte.metadata)["sha256"] == {"model.pte": file_digest(program)}
    assert not list(runs.rglob("model.safetensors"))


def test_names_of_artifacts_fit_the_rules_of_wandb(tmp_path):
    title = Artifact(ArtifactKind.arch, "x" * 200, tmp_path).title
    other = Artifact(ArtifactKind.arch, "x" * 201, tmp_path).title
    assert len(title) == 128
    assert title != other


def test_only_the_main_process_records(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(WandbBackend, "log", pytest.fail)
    with open_tracker(offline(), tmp_path, info_of()) as tracker:
        tracker.log({"train/loss": 1.0})
    assert read_runs(tmp_path) == []
