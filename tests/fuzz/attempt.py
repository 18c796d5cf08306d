"""One attempt: files in a folder, a command, and the judgement of its end."""

import faulthandler
import os
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_MEMORY = 12 * 2**30
"""Address space of a command [bytes]; a command that wants more by a bad value fails."""
_FILE_SIZE = 2 * 2**30
_LONGEST_LINE = 1500


@dataclass(frozen=True)
class Attempt:
    """One command with bad or odd input.

    Attributes:
        what: The input in words.
        prepare: Writes the input to an empty folder and returns the arguments of `flash`.
        passes: Whether the command may end well, judged from the folder and its output.
        timeout_s: Longest time of the command [s].
        main: Code that runs in place of `flash`'s main function, for commands in parts.
        must_pass: Whether the command must end well.
    """

    what: str
    prepare: Callable[[Path], list[str]]
    passes: Callable[[Path, str], bool] = lambda folder, output: True
    timeout_s: float = 60.0
    main: Callable[[], int] | None = None
    must_pass: bool = False


@dataclass(frozen=True)
class Ending:
    """End of a command.

    Attributes:
        code: Exit code; minus the number of the signal that has killed it.
        output: Standard output.
        errors: Standard error.
        timed_out: Whether it was killed for taking too long.
    """

    code: int
    output: str
    errors: str
    timed_out: bool


def run(attempt: Attempt, folder: Path) -> Ending:
    """Make an attempt in a forked process, whose modules are those of this one.

    Args:
        attempt: The attempt.
        folder: Empty folder.
    """
    (folder / "work").mkdir(parents=True)
    child = start(attempt, folder)
    return finish(child, attempt, folder)


def start(attempt: Attempt, folder: Path, name: str = "") -> int:
    """Start an attempt in a forked process, in the folder `work`, and return its number.

    Args:
        attempt: The attempt.
        folder: Folder with the folder `work`; has the output afterwards.
        name: What distinguishes processes that run at the same time.
    """
    work = folder / "work"
    arguments = attempt.prepare(work)
    child = os.fork()
    if child == 0:
        _in_child(attempt, arguments, work, folder / f"out{name}", folder / f"err{name}")
    return child


def finish(child: int, attempt: Attempt, folder: Path, name: str = "") -> Ending:
    """Wait for the end of a process that `start` has started."""
    deadline, timed_out = time.monotonic() + attempt.timeout_s, False
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline and not timed_out:
            timed_out = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    return Ending(
        os.waitstatus_to_exitcode(status),
        (folder / f"out{name}").read_text("utf-8", errors="replace"),
        (folder / f"err{name}").read_text("utf-8", errors="replace"),
        timed_out,
    )


def _in_child(attempt: Attempt, arguments: list[str], work: Path, out: Path, err: Path) -> None:
    code = 70
    try:
        os.setsid()
        faulthandler.disable()  # pytest's would print to its own output
        for path, number in ((out, 1), (err, 2)):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(handle, number)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_SIZE, _FILE_SIZE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(work)
        sys.argv = ["flash", *arguments]
        warnings.resetwarnings()  # those of pytest are no part of the product
        from flash.cli import main

        code = _exit_code(attempt.main or main)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _exit_code(main: Callable[[], int]) -> int:
    """Call `main` as the interpreter calls a program."""
    try:
        return main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1


def fault(attempt: Attempt, ending: Ending, work: Path) -> str | None:
    """Say what is wrong with the end of an attempt; None if nothing is."""
    if ending.timed_out:
        return f"hangs: over {attempt.timeout_s:.0f} s"
    if ending.code < 0:
        return f"crashes: {signal.Signals(-ending.code).name}"
    both = f"{ending.output}\n{ending.errors}"
    if "Traceback (most recent call last)" in both:
        return f"traceback: {_last_line(both)}"
    if "a fault of flash" in both:
        return f"unexpected: {_last_line(ending.errors)}"
    lines = [line for line in re.split(r"[\r\n]+", ending.errors) if line.startswith("error: ")]
    if ending.code == 0:
        if lines:
            return f"an error, and exit code 0: {lines[0]}"
        return None if attempt.passes(work, both) else "passes in silence"
    if ending.code not in {1, 2}:
        return f"exit code {ending.code}: {_last_line(ending.errors)}"
    if len(lines) != 1:
        return f"{len(lines)} lines of error: {_last_line(ending.errors)}"
    if _last_line(ending.errors) != lines[0]:
        return f"more after the line of error: {_last_line(ending.errors)}"
    if len(lines[0]) > _LONGEST_LINE:
        return f"a line of {len(lines[0])} characters"
    if not lines[0].isprintable():
        return f"control characters: {lines[0]!r}"
    return f"fails: {lines[0]}" if attempt.must_pass else None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
