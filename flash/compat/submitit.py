"""submitit and its Hydra launcher: detection of jobs, errors of jobs, requeuing.

Behavior that submitit 1.5 and hydra-submitit-launcher 1.2 do not document, and the reasons to rely
on it:

- The environment variable `SUBMITIT_EXECUTOR` is set in every job: distinguishes a job from a
  command on the terminal.
- The handler of SIGUSR2 that submitit installs before it starts the job
  (`SignalHandler.checkpoint_and_try_requeue`): the handler of flash calls it after the work has
  stopped in an orderly way.
- Errors have classes of the package `submitit`, and a text with lines of dashes: needed to shorten
  them to one line.
- `_target_` of the launcher's configuration is the class of the launcher: distinguishes Slurm from
  local jobs.

This module does not import submitit, which is an optional dependency.
"""

import os
import signal
import typing
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], None]


def in_job() -> bool:
    """Return True if submitit started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ


def is_slurm_launcher(launcher: Mapping[str, Any]) -> bool:
    """Return True if a configuration of `hydra/launcher` submits jobs to Slurm."""
    return "Slurm" in launcher["_target_"]


def requeue_handler() -> Handler:
    """Return submitit's handler of SIGUSR2, which requeues the job and ends the process.

    Must be called in a job before another handler replaces it. The handler raises an error if the
    job may not be requeued any more.
    """
    return typing.cast(Handler, signal.getsignal(signal.SIGUSR2))


def error_lines(error: Exception) -> list[str] | None:
    """Return the text of an error of submitit, without lines of dashes; None for other errors."""
    if not type(error).__module__.startswith("submitit."):
        return None
    return [line.strip() for line in str(error).splitlines() if line.strip(" -")]
