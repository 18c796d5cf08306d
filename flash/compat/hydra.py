"""Hydra: the jobs of a multirun before any of them starts, options of plugins, missing options.

Names that Hydra 1.3 does not document, and the reasons to use them:

- `hydra._internal.core_plugins.basic_sweeper.BasicSweeper.split_arguments`,
  `OverridesParser.create(...).parse_overrides`, `GlobalHydra.config_loader` and
  `ConfigLoader.load_sweep_config`: they compose the configuration of a job as the sweeper will, so
  that a mistake in the last job is found before the first one starts.
- `Plugins.instance` and `ConfigStore.repo`: whether a launcher is installed, and its defaults.
- `Plugins.register`: a search path of our own.
- `MissingConfigException.missing_cfg_file` and `.options`: which option was asked for, and which
  there are.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict


def job_configs(multirun: DictConfig) -> Iterator[DictConfig]:
    """Compose the configuration of each job of a multirun, in their order, without node `hydra`.

    Errors in an override are raised as Hydra raises them, when the iterator reaches that job.

    Args:
        multirun: The configuration that `Callback.on_multirun_start` gets.
    """
    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(loader).parse_overrides(list(multirun.hydra.overrides.task))
    for job in BasicSweeper.split_arguments(overrides, None)[0]:
        config = loader.load_sweep_config(multirun, job)
        with open_dict(config):
            del config["hydra"]
        yield config


def plugin_option(group: str, name: str) -> dict[str, Any] | None:
    """Values of the option `name` that a plugin has registered; None where it is not installed.

    Args:
        group: The config group, as in `hydra/launcher`.
        name: The option, as in `submitit_slurm`.
    """
    Plugins.instance()  # finds the plugins, which then register their options
    options: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        options = options.get(part, {})
    found = options.get(f"{name}.yaml")
    return None if found is None else cast(dict[str, Any], OmegaConf.to_container(found.node))


_folders: list[Callable[[], list[Path]]] = []
"""The argument of the last call of `add_search_paths`; Hydra makes the plugin itself."""


class _FolderPlugin(SearchPathPlugin):
    """Appends the folders of `add_search_paths` to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in _folders[0]():
            search_path.append("flash", f"file://{folder}")


def add_search_paths(folders: Callable[[], list[Path]]) -> None:
    """Have Hydra look for config groups in further folders, after the command's own.

    Args:
        folders: Called at each composition; its folders are searched in their order.
    """
    _folders[:] = [folders]
    Plugins.instance().register(_FolderPlugin)  # once, however often it is called


def missing_option(error: MissingConfigException) -> tuple[str, list[str] | None]:
    """The file that Hydra looked for, as `group/option`, and the options that the group has.

    The options are None where Hydra does not know the group.
    """
    options = error.options
    return str(error.missing_cfg_file or ""), None if options is None else list(options)
