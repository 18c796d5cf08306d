"""Hydra: jobs of a multirun and their launcher, options of plugins, missing options.

Names that Hydra 1.3 does not document, and the reasons to use them:

- `hydra._internal.core_plugins.basic_sweeper.BasicSweeper.split_arguments`,
  `OverridesParser.create(...).parse_overrides` and `ConfigLoader.load_sweep_config`: compose the
  configuration of a job as the sweeper does, so that a mistake in the last job is found before the
  first one starts.
- `Plugins.instance` and `ConfigStore.repo`: show if a launcher is installed, and its defaults.
- `Plugins.register`: adds folders to the search path, and the launcher of flash.
- The package of a launcher must be `hydra_plugins`, and is that of the class's `__module__`.
- `JobReturn._return_value`: the error of a job; `return_value` would raise it.
- `configure_log`: sets up the logging of jobs, in place of Hydra's own.
- `MissingConfigException.missing_cfg_file` and `.options`: hold the missing option and the options
  that exist.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log
from hydra.errors import MissingConfigException
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


@dataclass(frozen=True)
class Multirun:
    """Jobs of a command with `-m`.

    Attributes:
        config: The command's configuration, with the node `hydra`.
        context: Hydra's loader of configurations and its callbacks.
        task: Function of a job's configuration that does its work.
        executor: Executor of submitit that runs the jobs, `slurm` or `local`; None without one.
        values: Values of the launcher, for that executor.
    """

    config: DictConfig
    context: HydraContext
    task: TaskFunction
    executor: str | None
    values: dict[str, Any]

    @cached_property
    def jobs(self) -> list[list[str]]:
        """Overrides of each job, in order."""
        parser = OverridesParser.create(self.context.config_loader)
        overrides = parser.parse_overrides(list(self.config.hydra.overrides.task))
        return BasicSweeper.split_arguments(overrides, None)[0]

    @property
    def hydra_arguments(self) -> list[str]:
        """Arguments for Hydra itself that hold for a job alone as well, such as `hydra.verbose`."""
        hydra = self.config.hydra
        of_sweeps = ("hydra.mode", "hydra.sweep", "hydra/sweep", "hydra.launch", "hydra/launch")
        kept = [
            each for each in hydra.overrides.hydra if not each.lstrip("+~").startswith(of_sweeps)
        ]
        given = [
            source for source in hydra.runtime.config_sources if source.provider == "command-line"
        ]
        return [*kept, *(text for source in given for text in ("--config-dir", source.path))]

    def configs(self) -> Iterator[tuple[DictConfig, dict[str, Any]]]:
        """Compose each job as the sweeper does: its configuration and its choices, by group.

        An error in an override is raised by Hydra when the iterator reaches that job.
        """
        for overrides in self.jobs:
            config = self.context.config_loader.load_sweep_config(self.config, overrides)
            choices = dict(config.hydra.runtime.choices)
            with open_dict(config):
                del config["hydra"]
            yield config, choices


Launch = Callable[[Sequence[Sequence[str]], int], None]
"""Function that runs a batch of jobs; its arguments are those of `Launcher.launch`."""
_begin: list[Callable[[Multirun], Launch]] = []
"""Argument of the last call of `add_launcher`; Hydra makes the launcher from its configuration."""


class FlashLauncher(Launcher):
    """Launcher that leaves the jobs to the function of `add_launcher`."""

    __module__ = "hydra_plugins.flash"

    def __init__(self, executor: str | None = None, **values: Any) -> None:
        self._executor, self._values = executor, values

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        configure_log(config.hydra.job_logging, config.hydra.verbose)
        values = {
            key: OmegaConf.to_container(value, resolve=True)
            if OmegaConf.is_config(value)
            else value
            for key, value in self._values.items()
        }
        self._launch = _begin[0](
            Multirun(config, hydra_context, task_function, self._executor, values)
        )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        self._launch(job_overrides, initial_job_idx)
        return []


def add_launcher(begin: Callable[[Multirun], Launch]) -> None:
    """Run the jobs of multiruns by a function, with any `hydra/launcher` of `launcher_option`.

    Args:
        begin: Function that is called before the first job, and returns the function of a batch.
    """
    _begin[:] = [begin]
    Plugins.instance().register(FlashLauncher)  # has no effect if called again


def launcher_option(executor: str | None, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an option of `hydra/launcher`.

    Args:
        executor: Executor of submitit: `slurm` or `local`; None without submitit.
        values: Values for that executor.
    """
    name = f"{FlashLauncher.__module__}.{FlashLauncher.__name__}"
    return {**values, "_target_": name, "executor": executor}


def returned(job: JobReturn) -> Any:
    """Return the value of a job's task function, or the error that it has raised."""
    return job._return_value


def plugin_option(group: str, name: str) -> dict[str, Any] | None:
    """Return the values of an option that a plugin registers; None if it is not installed.

    Args:
        group: Config group, such as `hydra/launcher`.
        name: Name of the option, such as `submitit_slurm`.
    """
    Plugins.instance()  # imports the plugins, which register their options
    options: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        options = options.get(part, {})
    found = options.get(f"{name}.yaml")
    return None if found is None else cast(dict[str, Any], OmegaConf.to_container(found.node))


_folders: list[Callable[[], list[Path]]] = []
"""Argument of the last call of `add_search_paths`; Hydra calls the plugin without arguments."""


class _FolderPlugin(SearchPathPlugin):
    """Plugin that appends the folders of `add_search_paths` to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in _folders[0]():
            search_path.append("flash", f"file://{folder}")


def add_search_paths(folders: Callable[[], list[Path]]) -> None:
    """Add folders of config groups to Hydra's search path, after the bundled ones.

    Args:
        folders: Function that returns the folders, in the order of the search; it is called for
            each composition.
    """
    _folders[:] = [folders]
    Plugins.instance().register(_FolderPlugin)  # has no effect if called again


def missing_option(error: MissingConfigException) -> tuple[str, list[str] | None]:
    """Return the missing file as `group/option`, and the options that the group has.

    The options are None if the group does not exist.
    """
    options = error.options
    return str(error.missing_cfg_file or ""), None if options is None else list(options)
