"""submitit and Hydra's launcher of it: signs of a job, of its errors and of its place in the queue.

What submitit 1.5 and hydra-submitit-launcher 1.2 do not document, and the reasons to rely on it:

- The environment variable `SUBMITIT_EXECUTOR`, set in every job: tells a job from a command.
- The handler of SIGUSR2 that submitit installs before it calls the job
  (`SignalHandler.checkpoint_and_try_requeue`): called by ours, once the work has ended orderly.
- Errors are of classes in the package `submitit`, with a few lines of text between dashes.
- `_target_` of the launcher's configuration, the class that Hydra builds.

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
    """Whether submitit started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ


def is_slurm_launcher(launcher: Mapping[str, Any]) -> bool:
    """Whether a configuration of `hydra/launcher` puts jobs into Slurm's queue."""
    return "Slurm" in launcher["_target_"]


def requeue_handler() -> Handler:
    """Submitit's handler of SIGUSR2, which puts the job into the queue again and ends the process.

    To be called in a job before another handler takes its place. The handler raises where the job
    may not be queued any more.
    """
    return typing.cast(Handler, signal.getsignal(signal.SIGUSR2))


def error_lines(error: Exception) -> list[str] | None:
    """What an error of submitit's says, in lines without dashes; None for errors of others."""
    if not type(error).__module__.startswith("submitit."):
        return None
    return [line.strip() for line in str(error).splitlines() if line.strip(" -")]
