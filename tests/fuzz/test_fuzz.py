"""Short tier of the fuzz suite; `make fuzz` runs the long one."""

import shutil
from itertools import islice
from random import Random

import pytest

from tests.fuzz.attempt import Attempt, fault, run
from tests.fuzz.base import make
from tests.fuzz.kinds import KINDS, load_all

_SEED = "short 0"
_TRIES = {"values": 60, "yaml": 60, "names": 10, "used_values": 6, "results": 8, "store": 6}
"""Attempts of each kind; those that are not here have 5."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The small project that attempts change a file of."""
    load_all()
    folder = tmp_path_factory.mktemp("fuzz") / "project"
    make(folder)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_line(kind, project, tmp_path):
    faults = []
    attempts = KINDS[kind](Random(f"{kind} {_SEED}"), project)
    for number, attempt in enumerate(islice(attempts, _TRIES.get(kind, 5))):
        folder = tmp_path / str(number)
        ending = run(attempt, folder)
        said = fault(attempt, ending, folder / "work")
        if said is not None:
            faults.append(f"{attempt.what}: {said}\n{ending.errors[-2000:]}")
        shutil.rmtree(folder)
    assert not faults, "\n\n".join(faults)


def _ended(main, tmp_path) -> str | None:
    attempt = Attempt("", lambda work: ["train"], main=main, timeout_s=2.0)
    folder = tmp_path / "a"
    return fault(attempt, run(attempt, folder), folder / "work")


def test_an_unforeseen_error_is_one_line_and_a_report(tmp_path):
    def main() -> int:
        from flash import cli, jobs

        def work(settings: object) -> None:
            raise KeyError("\x1b[31mbug")

        jobs.JOBS["train"] = (work, lambda settings: None)
        return cli.main()

    attempt = Attempt("", lambda work: ["train", "logger=none"], main=main)
    ending = run(attempt, tmp_path / "a")
    assert ending.code == 1
    [line] = [line for line in ending.errors.splitlines() if line.startswith("error")]
    assert line.startswith("error: unexpected KeyError ('\\\\x1b[31mbug'); a fault of flash: ")
    [report] = (tmp_path / "a" / "work" / "runs" / "crash").iterdir()
    assert line.endswith(f"please report it with {report}")
    text = report.read_text("utf-8")
    assert "command: flash train logger=none" in text
    assert "versions: " in text
    assert text.rstrip().endswith("KeyError: '\\x1b[31mbug'")
    assert (fault(attempt, ending, tmp_path) or "").startswith("unexpected: ")


def test_the_judgement_sees_each_fault(tmp_path):
    """A suite that finds nothing shows nothing unless it would find something."""
    import os
    import signal
    import sys
    import time

    def says(text: str, code: int) -> int:
        print(text, file=sys.stderr)
        return code

    for number, (main, expected) in enumerate([
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "crashes: SIGSEGV"),
        (lambda: time.sleep(60), "hangs"),
        (lambda: says("Traceback (most recent call last):\nValueError: x", 1), "traceback: Val"),
        (lambda: says("error: a=1: no", 0), "an error, and exit code 0"),
        (lambda: says("", 1), "0 lines of error"),
        (lambda: says("error: a\nerror: b", 2), "2 lines of error"),
        (lambda: says("error: a\nmore", 2), "more after the line"),
        (lambda: says("error: a", 3), "exit code 3"),
        (lambda: says("error: \x1b[31m", 2), "control characters"),
        (lambda: says(f"error: {'a' * 2000}", 2), "a line of"),
    ]):
        assert (_ended(main, tmp_path / str(number)) or "").startswith(expected)
    silent = Attempt("", lambda work: [], main=lambda: 0, passes=lambda work, output: False)
    ending = run(silent, tmp_path / "silent")
    assert fault(silent, ending, tmp_path) == "passes in silence"
    assert _ended(lambda: says("error: a=1: expected 2", 2), tmp_path / "good") is None
