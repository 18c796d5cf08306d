"""Short tier of the fuzz suite; `make fuzz` runs the long one."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.fuzz.attempt import Attempt, fault, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of the project that attempts change a file of."""
    return tmp_path_factory.mktemp("fuzz")


CHEAP = ["values", "yaml"]
"""Kinds of which many are tried: only settings are checked."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cheap", [True, False], ids=["settings", "files"])
def test_bad_input_is_one_line(folder, cheap):
    """The suite runs in a process of its own, in which warnings are none of pytest's errors."""
    from tests.fuzz.kinds import KINDS

    kinds = CHEAP if cheap else [kind for kind in KINDS if kind not in CHEAP]
    tries = "40" if cheap else "3"
    words = ["-m", "tests.fuzz", *kinds, "--tries", tries, "--folder", str(folder)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    assert done.stdout.count(f": 0 faults from 0 to {tries}") == len(kinds)


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
    assert line.startswith("error: unexpected KeyError ('\\x1b[31mbug'); a fault of flash: ")
    [report] = (tmp_path / "a" / "work" / "runs" / "crash").iterdir()
    assert line.endswith(f"please report it with {report}")
    text = report.read_text("utf-8")
    assert "command: flash train logger=none" in text
    assert "versions: " in text
    assert text.rstrip().endswith("KeyError: '\\x1b[31mbug'")
    assert (fault(attempt, ending, tmp_path) or "").startswith("unexpected: ")


def test_the_judgement_sees_each_fault(tmp_path):
    """A suite that finds nothing shows nothing unless it would find something."""

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
