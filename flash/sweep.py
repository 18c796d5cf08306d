"""Jobs of a sweep (`-m`): each is a process of its own, and a table at the end lists all of them.

A job that fails ends neither the sweep nor the other jobs, whether it has an error, runs out of
memory or crashes. No state of a job is left for the next: GPU memory, processes of other ranks,
loggers and random numbers end with the process. The command of a job is that of the sweep with the
values of the job, so that it can be typed alone.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from flash import commands, crash, signals, slurm
from flash.compat import submitit
from flash.compat.hydra import Multirun
from flash.errors import require
from flash.outcome import Outcome, State, noted
from flash.ranks import is_main_process
from flash.terminal import COLUMNS

log = logging.getLogger(__name__)

_LAUNCHERS = ("basic", "submitit_local", "submitit_slurm")
"""Options of `hydra/launcher` that run sweeps."""
_OUTCOME = "FLASH_OUTCOME"
"""Environment variable of a job: the file for its outcome."""
_LABEL_WIDTH = 30
"""Greatest width of the table's first column."""


class Sweep:
    """Jobs of one command with `-m`, and what became of them.

    Args:
        multirun: The jobs, composed by Hydra.

    Attributes:
        labels: Name of each job: the values in which it differs from the others.
        outcomes: Outcome of each job so far.
    """

    def __init__(self, multirun: Multirun) -> None:
        self._multirun = multirun
        self.labels = labels(multirun.jobs)
        self.outcomes = [Outcome(State.not_started) for _ in self.labels]

    def check_hydra(self, runs: str) -> None:
        """Check that Hydra's launcher and sweeper can be used.

        Args:
            runs: Folder of everything that runs produce.

        Raises:
            InputError: Another launcher or sweeper, or Slurm is not installed.
        """
        launcher, sweeper = (self._multirun.choice(name) for name in ("launcher", "sweeper"))
        known = f"one of {', '.join(_LAUNCHERS)}"
        require(launcher in _LAUNCHERS, "hydra/launcher", launcher, known)
        require(sweeper == "basic", "hydra/sweeper", sweeper, "basic")
        if launcher == "submitit_slurm":
            slurm.check_installed(runs)

    def run(self, task: Callable[[DictConfig], Outcome]) -> None:
        """Run all jobs, then print the table.

        Args:
            task: Function of a job's configuration, for jobs of submitit.

        Raises:
            JobFailed: Some jobs have failed.
            KeyboardInterrupt: Ctrl-C or a signal.
        """
        try:
            if self._multirun.choice("launcher") == "basic":
                self._run_here()
            else:
                self._run_by_submitit(task)
        except KeyboardInterrupt:
            self._print()
            raise
        self._print()
        self._check()

    def _run_here(self) -> None:
        for number, overrides in enumerate(self._multirun.jobs):
            log.info("job %d of %d: %s", number + 1, len(self.labels), self.labels[number])
            self.outcomes[number] = Outcome(State.stopped)  # unless it ends
            self.outcomes[number] = _run([*overrides, *self._multirun.hydra_arguments])

    def _run_by_submitit(self, task: Callable[[DictConfig], Outcome]) -> None:
        waiting = dict(enumerate(self._submit(task)))
        for number, job in waiting.items():
            what = f"{self.labels[number]} ({job.job_id})"
            log.info("job %d of %d: %s", number + 1, len(self.labels), what)
            self.outcomes[number] = Outcome(State.submitted)
        while waiting:
            for number in [number for number, job in waiting.items() if job.done()]:
                self.outcomes[number] = _outcome_of(waiting.pop(number))
                state = self.outcomes[number].state.value
                log.info("job %d of %d: %s", number + 1, len(self.labels), state)
            time.sleep(1.0 if waiting else 0.0)

    def _submit(self, task: Callable[[DictConfig], Outcome]) -> list[Any]:
        multirun = self._multirun
        kind = multirun.choice("launcher").removeprefix("submitit_")
        return submitit.submit(kind, multirun.jobs, multirun.config, multirun.context, task)

    def _print(self) -> None:
        if is_main_process():
            print(f"\n{as_text(self.labels, self.outcomes)}", flush=True)

    def _check(self) -> None:
        failed = [each for each in self.outcomes if each.state is State.failed]
        if failed:
            raise slurm.JobFailed(
                f"{len(failed)} of {len(self.outcomes)} jobs failed; the same command runs only "
                "what is missing",
                2 if all(each.code == 2 for each in failed) else 1,
            )


def labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Return a name for each job: its overrides that are not those of all jobs.

    Args:
        jobs: Overrides of each job; all have the same keys in the same order.
    """
    chosen = [len(set(values)) > 1 for values in zip(*jobs, strict=True)]
    if not any(chosen):
        chosen = [True] * len(chosen)
    return [" ".join(o for o, used in zip(job, chosen, strict=True) if used) for job in jobs]


def as_text(labels: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Format the table of all jobs, at most 80 columns wide; long cells take several lines."""
    rows = [("job", "state", "result")]
    rows += [
        (name, each.state.value, each.line.partition("\n")[0])
        for name, each in zip(labels, outcomes, strict=True)
    ]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    widths = (min(first, _LABEL_WIDTH), second)
    widths = (*widths, COLUMNS - sum(widths) - 4)
    lines = []
    for row in rows:
        cells = [
            textwrap.wrap(cell, width, break_on_hyphens=False) or [""]
            for cell, width in zip(row, widths, strict=True)
        ]
        for i in range(max(map(len, cells))):
            parts = [cell[i] if i < len(cell) else "" for cell in cells]
            padded = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


@contextmanager
def job(one_line_errors: AbstractContextManager[None]) -> Iterator[None]:
    """Run the block as a job: its outcome goes to the sweep, and a signal stops it as Ctrl-C does.

    Without a sweep, the block is only that of `one_line_errors`.

    Args:
        one_line_errors: Context manager that turns errors of the user into `CommandExit`.
    """
    # Processes that the job starts, such as further ranks, are no jobs of the sweep.
    path = os.environ.pop(_OUTCOME, None)
    if path is None:
        with one_line_errors:
            yield
        return
    try:
        with one_line_errors:
            try:
                yield
            except KeyboardInterrupt:  # the sweep says how to go on
                sys.exit(signals.exit_code())
    except slurm.CommandExit as error:
        Outcome(State.failed, error.line, int(error.code or 1)).write(Path(path))
        raise
    except Exception as error:
        Outcome(State.failed, crash.line(error), 1).write(Path(path))
        raise
    noted().write(Path(path))


def _run(arguments: Sequence[str]) -> Outcome:
    """Run one job, and wait for its end.

    Raises:
        KeyboardInterrupt: A signal has ended the sweep; the job has been stopped first.
    """
    with tempfile.TemporaryDirectory(prefix="flash_") as folder:
        path = Path(folder) / "outcome.json"
        # Ctrl-C on the terminal reaches the sweep alone, which then stops the job once.
        process = subprocess.Popen(
            commands.process_of(arguments),
            env={**os.environ, _OUTCOME: str(path)},
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _stop(process)
            raise
        return Outcome.read(path) or Outcome(State.failed, _ending(code), 1)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a job, which may finish its step; a second Ctrl-C kills it with all its processes."""
    process.terminate()
    try:
        process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ending(code: int) -> str:
    """Explain the end of a process without an outcome."""
    number = -code if code < 0 else code - 128
    if number == signal.SIGKILL:
        return "killed by SIGKILL, most likely as the machine had no memory left"
    if number in {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}:
        return f"stopped by {signal.Signals(number).name}; it goes on where it was"
    return f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"


def _outcome_of(job: Any) -> Outcome:
    """Return the outcome of a job of submitit that is over."""
    try:
        value = submitit.result(job)
    except Exception as error:
        line = slurm.explain(error)
        if line is None:
            raise
        return Outcome(State.failed, line, 1)
    if isinstance(value, slurm.JobFailed):
        return Outcome(State.failed, value.line, value.code)
    if isinstance(value, Exception):
        return Outcome(State.failed, f"{type(value).__name__}: {value}", 1)
    return value
