"""Checks of the option files of a working directory and of `runs`, which may be someone else's."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flash.bundled import CONF
from flash.errors import InputError


def check_own_options(folder: Path) -> None:
    """Check that no option of the user has the name of one of flash, which Hydra would prefer.

    Raises:
        InputError: An option has such a name; names its file.
    """
    if folder.resolve() == CONF.resolve():
        return
    for path in sorted(folder.glob("*/**/*.yaml")):
        option = path.relative_to(folder)
        if (CONF / option).is_file() or any(CONF.glob(f"*/{option}")):
            raise InputError(
                f"{path}: {path.parent.name}={path.stem} comes with flash and would be used "
                "instead; give the file another name"
            )


_OF_LAUNCHERS = frozenset({
    *("account", "array_parallelism", "constraint", "cpus_per_task", "gpus_per_node", "mem_gb"),
    *("nodes", "partition", "qos", "tasks_per_node", "timeout_min", "max_num_timeout"),
    *("signal_delay_s", "exclude", "comment"),
})
"""Settings of Hydra's launchers that an option file may have."""


def check_harmless(folder: Path) -> None:
    """Check that option files set nothing of Hydra but where and how long jobs run.

    Hydra calls what a `_target_` names, sets environment variables and opens log files as its own
    settings say, before anything else can look at them; and the files may be someone else's.

    Args:
        folder: Folder on the search path of options.

    Raises:
        InputError: A file does more; names the file and the setting.
    """
    for root, folders, files in os.walk(folder, followlinks=True):
        if "hydra" in folders:
            raise InputError(f"{Path(root, 'hydra')}: expected no options of Hydra's own groups")
        for path in sorted(Path(root, name) for name in files if name.endswith((".yaml", ".yml"))):
            text = path.read_text("utf-8", errors="replace")
            try:
                values = yaml.safe_load(text)
            except yaml.MarkedYAMLError as error:
                line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
                raise InputError(
                    f"{path}, line {line}: {error.problem}; correct the file"
                ) from error
            except yaml.YAMLError as error:
                raise InputError(f"{path}: no YAML ({error}); correct the file") from error
            for setting in _of_hydra(values, text):
                raise InputError(
                    f"{path}: {setting}: expected no setting of Hydra but of hydra.launcher (such "
                    "as partition, timeout_min), since it could run code; remove it, or the file "
                    "if it is not yours"
                )


def _of_hydra(values: Any, text: str) -> Iterator[str]:
    """Iterate over the settings of Hydra in an option file that are not allowed."""
    header = re.search(r"^#\s*@package\s+(\S*hydra\S*)", text, re.MULTILINE)
    if header is not None:
        yield f"@package {header[1]}"
    yield from (f"_target_: {target}" for target in _targets_in(values))
    if not isinstance(values, dict):
        return
    entries = values.get("defaults")
    for entry in entries if isinstance(entries, list) else []:
        name = str(next(iter(entry), "")) if isinstance(entry, dict) else str(entry)
        if "hydra" in name and re.fullmatch(r"override /?hydra/launcher", name) is None:
            yield f"defaults: {name}"
    for key, inner in values.items():
        if str(key).partition(".")[0] != "hydra":
            continue
        settings = inner if key == "hydra" and isinstance(inner, dict) else {}
        launcher = settings.get("launcher")
        known = isinstance(launcher, dict) and launcher.keys() <= _OF_LAUNCHERS
        if not known or settings.keys() != {"launcher"}:
            yield str(key)


def _targets_in(values: Any) -> Iterator[Any]:
    """Iterate over all values of `_target_`, at any depth."""
    if isinstance(values, dict):
        if "_target_" in values:
            yield values["_target_"]
        values = list(values.values())
    for value in values if isinstance(values, list) else []:
        yield from _targets_in(value)
