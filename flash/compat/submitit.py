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
- `SlurmLauncher` and `LocalLauncher` of the plugin, called with the arguments that its `launch`
  gives, run one job in a process of submitit; `BaseQueueConf` has the parameters of all executors.
  `launch` itself ends with the first job that fails.
- `JobReturn._return_value` of Hydra, the result of a job: its value or its error, which
  `return_value` would raise.

This module imports submitit, which is an optional dependency, only to submit jobs.
"""

import dataclasses
import os
import signal
import typing
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from hydra.core.singleton import Singleton
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

Handler = Callable[[int, FrameType | None], None]


def in_job() -> bool:
    """Return True if submitit started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ


def submit(
    kind: str,
    jobs: Sequence[Sequence[str]],
    config: DictConfig,
    context: HydraContext,
    task: Callable[[DictConfig], Any],
) -> list[Any]:
    """Submit all jobs, as the plugin's launcher does.

    Args:
        kind: Executor of submitit: `slurm` or `local`.
        jobs: Overrides of each job.
        config: Configuration of the sweep, with the node `hydra`.
        context: Hydra's loader of configurations.
        task: Function of a job's configuration.

    Returns:
        Jobs of submitit, for `result`.
    """
    import submitit
    from hydra_plugins.hydra_submitit_launcher import submitit_launcher
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    values: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    del values["_target_"]
    plugin = {"slurm": submitit_launcher.SlurmLauncher, "local": submitit_launcher.LocalLauncher}
    launcher = plugin[kind](**values)
    launcher.setup(hydra_context=context, task_function=task, config=config)
    common = {field.name for field in dataclasses.fields(BaseQueueConf)}
    own = {f"{kind}_{key}": values.pop(key) for key in ("max_num_timeout",) if key in values}
    executor = submitit.AutoExecutor(values.pop("submitit_folder"), cluster=kind, **own)
    named = {key if key in common else f"{kind}_{key}": value for key, value in values.items()}
    executor.update_parameters(**named)
    count = len(jobs)
    return executor.map_array(
        launcher,
        [list(job) for job in jobs],
        ["hydra.sweep.dir"] * count,
        list(range(count)),
        [f"job_id_for_{number}" for number in range(count)],
        [Singleton.get_state()] * count,
    )


def result(job: Any) -> Any:
    """Return the value that the task function of a job has returned, or the error it has raised.

    Raises:
        Exception: The job has ended without a result; see `error_lines`.
    """
    return job.results()[0]._return_value


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
