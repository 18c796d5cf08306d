"""Sweeps (`-m`): a failed job ends no other, a table lists all, and mistakes come first."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from flash import cli
from flash.outcome import Outcome, State
from flash.sweep import as_text, labels

ROOT = Path(__file__).resolve().parents[1]
OF_TRAINING = ("recipe.", "trainer.max_steps")
"""Settings that other commands do not have."""

# A command whose jobs end as their seed says. A sweep needs no more of a command than this.
SCRIPT = """\
import os
import signal
import time
from pathlib import Path

from flash import commands
from flash.config import entry
from flash.errors import InputError
from flash.outcome import note


def check(settings):
    if settings.seed == 9:
        raise InputError("seed=9: expected another one")


def job(settings):
    if settings.seed == 2:
        raise InputError("data.path=x: expected text")
    if settings.seed == 3:
        raise RuntimeError("a bug\\nwith details")
    if settings.seed == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    if settings.seed == 5:
        Path("sleeping").write_text(str(os.getpid()))
        time.sleep(100)
    note(f"loss of {settings.seed}", again=settings.seed == 6)


if __name__ == "__main__":
    commands.begin("train")
    entry("train", job, check)
"""


@pytest.fixture
def sweep(tmp_path):
    """A function that starts `train.py -m` of `SCRIPT`."""
    (tmp_path / "train.py").write_text(SCRIPT, "utf-8")
    started = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "train.py", "-m", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests in the background begin with the signal ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def rows_of(out: str) -> list[list[str]]:
    """Return the cells of the table's lines."""
    head = re.search(r"^job +state", out, re.MULTILINE)
    assert head is not None
    table = out[head.start() :].splitlines()
    assert all(len(line) <= 80 for line in table)
    return [re.split("  +", line) for line in table]


def started_jobs(err: str) -> list[str]:
    return [
        line.partition(" ")[2] for line in err.splitlines() if re.match(r"[\d:]{8} job \d", line)
    ]


@pytest.mark.parametrize("launcher", ["basic", "submitit_local"])
def test_a_failed_job_ends_no_other(sweep, launcher, tmp_path):
    if launcher != "basic":
        pytest.importorskip("submitit")
    process = sweep("seed=1,2,3,4,6", "scale=0.5", f"hydra/launcher={launcher}")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1
    rows = [row for row in rows_of(out) if row[0]]  # without further lines of long cells
    assert rows[:3] == [
        ["job", "state", "result"],
        ["seed=1", "done", "loss of 1"],
        ["seed=2", "failed", "data.path=x: expected text"],
    ]
    assert rows[3][:2] == ["seed=3", "failed"]
    assert rows[3][2].startswith("unexpected RuntimeError (a bug")
    assert rows[4][:2] == ["seed=4", "failed"]
    assert rows[-1] == ["seed=6", "already done", "loss of 6"]
    lines = err.splitlines()
    assert lines[-1].startswith("error: 3 of 5 jobs failed; the same command runs only what is")
    assert "HYDRA" not in err
    assert started_jobs(err)[0].startswith("job 1 of 5: seed=1")
    if launcher == "basic":
        assert started_jobs(err) == [f"job {i + 1} of 5: seed={n}" for i, n in enumerate("12346")]
        assert rows[4][2].startswith("killed by SIGKILL")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "train.py"]


@pytest.mark.parametrize(("seeds", "code"), [("1,6", 0), ("2", 2), ("1,2", 2), ("2,3", 1)])
def test_the_exit_code_tells_whether_all_failures_are_bad_input(sweep, seeds, code):
    process = sweep(f"seed={seeds}")
    process.communicate(timeout=120)
    assert process.returncode == code


@pytest.mark.parametrize(
    ("jobs", "line"),
    [
        ("seed=1,9", "seed=9: expected another one"),
        ("seed=1,-1", "seed=-1: expected an integer from 0 to 4294967295"),
        ("hydra/launcher=joblib", "hydra/launcher="),
        ("hydra/sweeper=optuna", "hydra/sweeper="),
    ],
)
def test_a_mistake_in_any_job_is_found_before_the_first_starts(sweep, jobs, line):
    process = sweep(jobs)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_sweep_after_a_table_of_what_is_done(sweep, number, tmp_path):
    process = sweep("seed=1,5,6")
    marker = tmp_path / "sleeping"
    until = time.monotonic() + 120
    while not (marker.is_file() and marker.read_text()):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert rows_of(out)[1:] == [
        ["seed=1", "done", "loss of 1"],
        ["seed=5", "stopped"],
        ["seed=6", "not started"],
    ]
    last = "stopped; finished work is kept, go on with: python train.py -m seed=1,5,6"
    assert err.splitlines()[-1] == last
    assert err.count("stopped") == 1
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


def test_jobs_are_named_by_what_differs_between_them():
    jobs = [["+arch=a", "seed=1", "logger=none"], ["+arch=a", "seed=2", "logger=none"]]
    assert labels(jobs) == ["seed=1", "seed=2"]
    assert labels(jobs[:1]) == ["+arch=a seed=1 logger=none"]
    both = [*jobs, ["+arch=b", "seed=1", "logger=none"], ["+arch=b", "seed=2", "logger=none"]]
    assert labels(both)[2] == "+arch=b seed=1"


def test_long_names_and_results_take_several_lines_of_80_columns():
    long = Outcome(State.failed, "runs/models/" + "x" * 100 + ": No space left on device\nmore", 1)
    name = "backbone.weights=" + "y" * 60
    text = as_text([name, "seed=1"], [long, Outcome(State.done, "fine")])
    lines = text.splitlines()
    assert max(map(len, lines)) == 80
    assert "".join(line[:30].strip() for line in lines[1:-1]) == name
    assert "No space left on device" in " ".join(line[32:].strip() for line in lines)
    assert "more" not in text
    assert lines[-1].split() == ["seed=1", "done", "fine"]


@pytest.fixture
def small(corpus, backbone_folder, tmp_path):
    """Arguments of a training of two steps, of a very small backbone."""
    return [
        *(f"backbone.weights={backbone_folder}", f"runs={tmp_path}/runs", "logger=none"),
        *("data=folder", f"data.path={corpus}", "data.pattern='*.py'", "data.seq_len=32"),
        *("data.validation_percent=20", "data.validation_sequences=8"),
        *("recipe.batch_size=4", "recipe.calibration_tokens=256", "trainer.max_steps=2"),
        "trainer.precision=fp32",
    ]


def test_the_same_command_trains_only_what_is_missing(small, tmp_path):
    in_the_way = tmp_path / "runs" / "models" / "a"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()

    def run() -> tuple[int, list[list[str]]]:
        command = [sys.executable, "train.py", "-m", "name=a,b", "recipe=continue", *small]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, rows_of(done.stdout)[1:]

    code, rows = run()
    assert code == 1
    assert rows[0][:2] == ["name=a", "failed"]
    assert rows[0][2].startswith(str(in_the_way)[:20])
    assert rows[-1][:2] == ["name=b", "done"]
    assert re.fullmatch(r"held-out loss \d\.\d{3} -> \d\.\d{3}", rows[-1][2])
    in_the_way.unlink()
    code, again = run()
    assert code == 0
    assert [row[1] for row in again] == ["done", "already done"]
    assert again[1][2] == rows[-1][2]


MIXTURE = "[{path: nowhere.parquet}]"


@pytest.mark.parametrize(
    ("verb", "changes", "message"),
    [
        ("train", ["+arch.ffn_dim=64,100000"], "arch.ffn_dim=100000: expected at most the backbon"),
        ("train", ["start=null,nowhere"], "start=nowhere: expected the folder of a trained check"),
        ("train", ["data.pattern='*.py','*.md'"], "expected files that match *.md, found none"),
        ("train", ["data.seq_len=32,4096"], "data.seq_len=4096: expected at most 128, the longest"),
        ("train", ["data.tokenizer=null,nowhere.json"], "data.tokenizer=nowhere.json: "),
        (
            "train",
            ["trainer.micro_batch=3", "seed=0,1"],
            "recipe.batch_size=4: expected a multiple of 1 dev",
        ),
        ("train", ["data=folder,shards"], "expected a folder with manifest.json; make it with"),
        (
            "train",
            ["data=files", "data.path=null", f"data.sources={MIXTURE}"],
            "data.sources[0].path=nowhere.parquet: no such file",
        ),
        (
            "train",
            [
                "+recipe@then.more.recipe=continue",
                "+data@then.more.data=folder",
                "then.more.data.path=gone,lost",
            ],
            "then.more.data.path=gone: expected a folder",
        ),
        ("export", ["model=nowhere,elsewhere"], "nowhere"),
        ("export", ["seed=1,2"], "device.lowering.max_context=1024: expected at most arch.max_con"),
        ("export", ["format=[]"], "format=[]: expected some of executorch, hf, gguf"),
        ("evaluate", ["+arch.ffn_dim=64,96"], "expected trained weights in"),
        ("search", ["space=tiny", "search.baseline.ffn_dim=1"], "search.baseline"),
    ],
)
def test_what_a_command_checks_first_is_checked_for_all_jobs(
    verb, changes, message, small, monkeypatch, capsys
):
    """In this process, as no job starts."""
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    given = [text for text in small if verb == "train" or not text.startswith(OF_TRAINING)]
    if verb == "evaluate":
        given = [text for text in given if not text.startswith("data")]
    monkeypatch.setattr(sys, "argv", [f"{verb}.py", "-m", *given, *changes])
    for name in ("FLASH_PROGRAM", "FLASH_RUNS", "FLASH_VERB"):
        monkeypatch.setenv(name, "")
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stop:
        cli.run(verb)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
