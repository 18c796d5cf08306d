"""Hydra: jobs of a multirun and their launcher, options of plugins, missing options.

Names that Hydra 1.3 does not document, and the reasons to use them:

- `hydra._internal.core_plugins.basic_sweeper.BasicSweeper.split_arguments`,
  `OverridesParser.create(...).parse_overrides`, `GlobalHydra.config_loader`,
  `ConfigLoader.load_sweep_config` and `.load_configuration`: compose the configuration of a job as
  the sweeper does, so that a mistake in the last job is found before the first one starts; and
  again with fewer overrides, for the name of its result.
- `Plugins.instance` and `ConfigStore.repo`: show if a launcher is installed, and its defaults.
- `Plugins.register`: adds folders to the search path.
- A callback that ends the process takes the place of Hydra's launcher (`GlobalHydra.config_loader`
  and `hydra._internal.callbacks.Callbacks` make what a launcher gets, `configure_log` sets up the
  logging of a job).
- `MissingConfigException.missing_cfg_file` and `.options`: hold the missing option and the options
  that exist.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.errors import MissingConfigException
from hydra.experimental.callback import Callback
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict


@dataclass(frozen=True)
class Job:
    """One run of a command.

    Attributes:
        config: Configuration without the node `hydra`.
        overrides: Overrides as they were typed, each for this job alone.
        choices: Chosen option of each group, by group; `group@package` for one in another place.
    """

    config: DictConfig
    overrides: list[str]
    choices: dict[str, str | None]

    @classmethod
    def of(cls, composed: DictConfig) -> "Job":
        """Split a configuration with the node `hydra`, which Hydra has composed."""
        node = composed.hydra
        job = cls(composed, list(node.overrides.task), dict(node.runtime.choices))
        with open_dict(composed):
            del composed["hydra"]
        return job


def this_job(config: DictConfig) -> Job:
    """Return the running job, of the configuration that its function receives."""
    node = HydraConfig.get()
    return Job(config, list(node.overrides.task), dict(node.runtime.choices))


def compose(verb: str, overrides: Sequence[str]) -> Job:
    """Compose a command's configuration with these overrides, beside the running one."""
    loader = GlobalHydra.instance().config_loader()
    return Job.of(loader.load_configuration(verb, list(overrides), RunMode.RUN))


def overrides_of_groups(job: Job, groups: Collection[str]) -> list[str]:
    """Return the overrides of a job that choose an option of one of these groups."""
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(loader).parse_overrides(job.overrides)
    names = {group.partition("@")[0] for group in groups} & {
        group.partition("@")[0] for group in job.choices
    }
    return [
        text for text, each in zip(job.overrides, parsed, strict=True) if each.key_or_group in names
    ]


@dataclass(frozen=True)
class Multirun:
    """Jobs of a command with `-m`.

    Attributes:
        config: The command's configuration, with the node `hydra`.
        context: Hydra's loader of configurations.
    """

    config: DictConfig
    context: HydraContext

    def choice(self, group: str) -> str:
        """Return the chosen option of a group of Hydra's own, such as `launcher`."""
        return self.config.hydra.runtime.choices[f"hydra/{group}"]

    @cached_property
    def jobs(self) -> list[list[str]]:
        """Overrides of each job, in order."""
        hydra = self.config.hydra
        parser = OverridesParser.create(self.context.config_loader)
        fixed = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
        overrides = parser.parse_overrides([*fixed, *hydra.overrides.task])
        return BasicSweeper.split_arguments(overrides, None)[0]

    @property
    def hydra_arguments(self) -> list[str]:
        """Arguments for Hydra itself that hold for a job alone as well, such as `hydra.verbose`."""
        hydra = self.config.hydra
        only_here = ("hydra.mode", "hydra.sweep", "hydra/sweep", "hydra.launch", "hydra/launch")
        changes = [
            text for text in hydra.overrides.hydra if not text.lstrip("+~").startswith(only_here)
        ]
        sources = hydra.runtime.config_sources
        folders = [source.path for source in sources if source.provider == "command-line"]
        return [*changes, *(text for folder in folders for text in ("--config-dir", folder))]

    def composed(self) -> Iterator[Job]:
        """Compose each job as the sweeper does.

        An error in an override is raised by Hydra when the iterator reaches that job.
        """
        for overrides in self.jobs:
            yield Job.of(self.context.config_loader.load_sweep_config(self.config, overrides))


_run: list[Callable[[Multirun], object]] = []
"""Argument of the last call of `run_jobs_by`; Hydra calls the callback without arguments."""


class RunJobs(Callback):
    """Callback that runs all jobs of `-m` by the function of `run_jobs_by`, then ends the process.

    Hydra's own launchers end with the first job that fails.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        configure_log(config.hydra.job_logging, config.hydra.verbose)
        context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
        try:
            _run[0](Multirun(config, context))
        except Exception as error:  # Hydra would convert it to a warning, and run the jobs itself
            sys.excepthook(type(error), error, error.__traceback__)
            sys.exit(1)
        sys.exit(0)


def run_jobs_by(run: Callable[[Multirun], object]) -> None:
    """Run the jobs of multiruns by a function.

    Args:
        run: The function.
    """
    _run[:] = [run]


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
