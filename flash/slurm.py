"""Jobs that Hydra's submitit launcher puts into Slurm's queue.

The launching command waits for the result that each job writes into a file, so errors have to
become results. Signals from Slurm have to end the work as Ctrl-C does: a trial goes back to the
queue of its study, and a training run keeps its last checkpoint.
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

from flash import crash, signals
from flash.compat import submitit
from flash.errors import InputError

log = logging.getLogger(__name__)

LAUNCHER = "hydra/launcher=submitit_slurm"
"""Override that starts a command's jobs through Slurm."""
DEFAULTS = {
    "submitit_folder": "${oc.env:FLASH_RUNS}/slurm/%j",
    "name": "flash",
    "timeout_min": 240,
    "max_num_timeout": 100,
    "signal_delay_s": 120,
    "cpus_per_task": 4,
    "stderr_to_stdout": True,
    # Jobs need the environment, because conf/ finds architectures by FLASH_RUNS.
    "additional_parameters": {"requeue": True, "export": "ALL"},
    "setup": [
        # Since Slurm 22.05, srun no longer takes the number of CPUs from sbatch.
        "export SRUN_CPUS_PER_TASK=$((SLURM_CPUS_ON_NODE / SLURM_NTASKS_PER_NODE))",
        # If Slurm does not bind tasks to CPUs, PyTorch would count those of the whole node.
        "export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK",
    ],
}
"""Launcher values for workers, in place of the plugin's defaults; see docs/search.md."""


class CommandExit(SystemExit):
    """End of a script after its one line of error.

    Attributes:
        line: The line.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(code)
        self.line = line


class JobFailed(Exception):
    """Error of a job, handed to the command that launched it.

    Attributes:
        line: Line to print.
        code: Exit code.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line, code)
        self.line, self.code = line, code


def in_job() -> bool:
    """True if submitit has started this process."""
    return submitit.in_job()


def check_installed(runs: str) -> None:
    """Check that Slurm is installed before jobs are queued, and log where their output goes.

    Args:
        runs: Folder of everything that runs produce.

    Raises:
        InputError: Slurm is not installed.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise InputError(f"{LAUNCHER}: expected Slurm's sbatch and srun; start it on a login node")
    log.info("jobs go on when this command is stopped (scancel ends them); logs: %s/slurm", runs)


def explain(error: Exception) -> str | None:
    """One line about an error that submitit has raised; None for any other error."""
    lines = submitit.error_lines(error)
    if lines is None:
        return None
    # The lines are Slurm's own, or "Job ... with path ..." and "has not produced ... (state: ...)".
    return " ".join(lines[:2])


@contextmanager
def job(one_line_errors: AbstractContextManager[None]) -> Iterator[None]:
    """Run the block as a job: errors become its result, and signals stop it as Ctrl-C does.

    Slurm sends SIGUSR2 before the time limit and, if it is configured so, before a preemption.
    submitit then queues the job again, and the same function is called again. SIGTERM ends the job;
    after a preemption Slurm itself queues it again.

    Args:
        one_line_errors: Context manager that turns errors of the user into `CommandExit`.

    Raises:
        JobFailed: The block has failed.
    """
    queue_again = submitit.requeue_handler()
    logging.getLogger("submitit").propagate = False  # submitit prints its records itself
    try:
        with signals.as_ctrl_c(signal.SIGUSR2), one_line_errors:
            try:
                yield
            except KeyboardInterrupt:
                received = signals.received()
                names = ", ".join(signal.Signals(number).name for number in received)
                log.warning("stopped by %s; finished work is kept", names or "SIGINT")
                if signal.SIGUSR2 in received:
                    queue_again(signal.SIGUSR2, None)  # raises after too many times
                # Write no result: the job may run again, and otherwise Slurm knows how it ended.
                sys.exit(signals.exit_code())
    except CommandExit as error:
        _fail(error.line, int(error.code or 1))
    except Exception as error:  # the pickled exception will lack the traceback
        line = explain(error) or crash.line(error)
        log.error("the job failed: %s", line)
        _fail(line, 1)


def _fail(line: str, code: int) -> typing.NoReturn:
    """Hand the error to the launching command, and let the job fail in Slurm.

    Raises:
        JobFailed: Always.
    """

    def end() -> None:  # submitit exits with 0, because there is a result
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(end)
    raise JobFailed(line, code)
