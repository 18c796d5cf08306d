"""Jobs that Hydra's submitit launcher puts into Slurm's queue.

The launching command waits for the result that each job writes into a file. An error has to become
such a result, and a signal of Slurm's has to end the work as Ctrl-C does: the trial goes back to
the study's queue, a training run keeps its last checkpoint.
"""

import atexit
import logging
import os
import shutil
import signal
import sys
import typing
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from omegaconf import DictConfig

from flash.compat import submitit
from flash.errors import InputError

log = logging.getLogger(__name__)

LAUNCHER = "hydra/launcher=submitit_slurm"
DEFAULTS = {
    "submitit_folder": "${oc.env:FLASH_RUNS}/slurm/%j",
    "name": "flash",
    "timeout_min": 240,
    "max_num_timeout": 100,
    "signal_delay_s": 120,
    "cpus_per_task": 4,
    "stderr_to_stdout": True,
    # With the environment: conf/ finds architectures by FLASH_RUNS.
    "additional_parameters": {"requeue": True, "export": "ALL"},
    "setup": [
        # Since 22.05 srun no longer takes the number of CPUs from sbatch.
        "export SRUN_CPUS_PER_TASK=$((SLURM_CPUS_ON_NODE / SLURM_NTASKS_PER_NODE))",
        # Else PyTorch counts the CPUs of the whole node where Slurm binds no tasks to theirs.
        "export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK",
    ],
}
"""Values of the launcher that suit workers, in place of the plugin's; see docs/search.md."""


class CommandExit(SystemExit):
    """The end of a script that has printed its one line."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(code)
        self.line = line


class JobFailed(Exception):
    """What a job that ended in an error hands to the command that launched it.

    Attributes:
        line: What to print.
        code: Exit code.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line, code)
        self.line, self.code = line, code


def in_job() -> bool:
    """Whether submitit started this process."""
    return submitit.in_job()


def check_launcher(launcher: DictConfig, runs: str) -> None:
    """Say what is missing before anything is queued, and what goes on without the command.

    Raises:
        InputError: Slurm is not installed.
    """
    if not submitit.is_slurm_launcher(launcher):
        return
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise InputError(f"{LAUNCHER}: expected Slurm's sbatch and srun; start it on a login node")
    log.info("jobs go on when this command is stopped (scancel ends them); logs: %s/slurm", runs)


def explain(error: Exception) -> str | None:
    """One line about an error of submitit's; None for those of others."""
    lines = submitit.error_lines(error)
    if lines is None:
        return None
    # Either Slurm's own words or "Job ... with path ...", "has not produced ... (state: ...)".
    return f"{' '.join(lines[:2])}; other jobs go on; started again, the command adds workers"


@contextmanager
def job(one_line_errors: AbstractContextManager[None]) -> Iterator[None]:
    """Around the work of a job: errors become its result, signals stop it as Ctrl-C does.

    SIGUSR2 comes before the time limit, and from Slurm set up for it before a preemption: submitit
    then queues the job again, which calls the same function again. SIGTERM ends the job; if it is
    for a preemption, Slurm itself queues it again.

    Args:
        one_line_errors: Turns what a user can mend into `CommandExit`.

    Raises:
        JobFailed: Any error.
    """
    queue_again = submitit.requeue_handler()
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:  # the second must not disturb what the first has set going
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, stop)
    logging.getLogger("submitit").propagate = False  # it prints by itself
    try:
        with one_line_errors:
            try:
                yield
            except KeyboardInterrupt:
                names = ", ".join(signal.Signals(number).name for number in received)
                log.warning("stopped by %s; finished work is kept", names or "SIGINT")
                if signal.SIGUSR2 in received:
                    queue_again(signal.SIGUSR2, None)  # raises if it was too often
                # No result: the job may run again, and else Slurm knows what became of it.
                sys.exit(128 + (received or [signal.SIGINT])[0])
    except CommandExit as error:
        _fail(error.line, int(error.code or 1))
    except Exception as error:  # a pickled exception has no traceback
        log.exception("the job failed")
        _fail(explain(error) or f"{type(error).__name__}: {error}; traceback in its log", 1)


def _fail(line: str, code: int) -> typing.NoReturn:
    """Hand over the error, and let Slurm see a failed job.

    Raises:
        JobFailed: Always.
    """

    def end() -> None:  # submitit ends with 0, as it has a result
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(end)
    raise JobFailed(line, code)
