"""Reader of the option files of a working directory and of `runs`, which may be someone else's.

Every file is read before Hydra sees it, since Hydra answers mistakes with tracebacks, takes an
empty file for an option without settings, and runs what its own settings name.
"""

import os
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from flash.bundled import CONF
from flash.compat.omegaconf import load_yaml
from flash.errors import InputError, shown, under

_LARGEST = 2**20
"""Largest option file [bytes]."""
_DEEPEST = 20
"""Most levels of mappings and lists within each other."""


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


class Trust(Enum):
    """Rights of the option files of a folder besides setting values."""

    everything = "everything"
    """The folder belongs to the code."""
    launcher = "launcher"
    """A user's folder: nothing of Hydra but where and how long jobs run. Hydra calls what a
    `_target_` names, sets environment variables and opens log files as its own settings say, before
    anything else can look at them."""
    values = "values"
    """Architectures that a search has found: neither `defaults` nor a package."""


def check_options(folder: Path, trust: Trust) -> None:
    """Check all option files of a folder.

    Args:
        folder: Folder on the search path of options.
        trust: What they may do.

    Raises:
        InputError: A file is damaged or empty, has an illegal value, or does more than it may;
            names the file and the place.
    """
    defaults: dict[str, list[str]] = {}
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if os.path.realpath(Path(root, name)) not in seen]
        seen.update(os.path.realpath(Path(root, name)) for name in folders)
        if trust is Trust.everything:
            folders[:] = [name for name in folders if name != "hydra"]
        elif "hydra" in folders:
            raise InputError(f"{Path(root, 'hydra')}: expected no options of Hydra's own groups")
        for path in sorted(Path(root, name) for name in files if name.endswith((".yaml", ".yml"))):
            text = _text(path)
            values = _read(path, text)
            for setting in _of_hydra(values, text) if trust is not Trust.everything else ():
                raise InputError(
                    f"{path}: {setting}: expected no setting of Hydra but of hydra.launcher (such "
                    "as partition, timeout_min), since it could run code; remove it, or the file "
                    "if it is not yours"
                )
            option = path.relative_to(folder).with_suffix("").as_posix()
            with under(str(path), ": "):
                _check_header(text)
                defaults[option] = list(_defaults(values, option))
                packaged = re.search(r"(?m)^#\s*@package", text) is not None
                if trust is Trust.values and ("defaults" in values or packaged):
                    raise InputError(
                        "expected values only, as a search writes them, but no `defaults` and no "
                        "@package; move the file to conf/ if it is yours"
                    )
    _check_loops(folder, defaults)


def _text(path: Path) -> str:
    with under(str(path), ": "):
        if not path.is_file():
            raise InputError("expected a file; remove it")
        if path.stat().st_size > _LARGEST:
            raise InputError(f"expected at most {_LARGEST} bytes; remove it")
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"no UTF-8 at byte {error.start}; save it in this encoding") from error
        if text.startswith("\ufeff"):  # Hydra would not see a @package behind it
            raise InputError("begins with a byte-order mark; save it as UTF-8 without one")
        return text


def _read(path: Path, text: str) -> dict[str, Any]:
    """Parse an option file: settings by name, of plain values.

    Raises:
        InputError: It is no YAML, is empty, or has values that are not plain.
    """
    try:
        values = load_yaml(text)
        with under(str(path), ": "):
            _check_plain(values, "", 0)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        reason = (error.problem or "no YAML").splitlines()[0]
        raise InputError(f"{path}, line {line}: {reason}; correct the file") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}; correct the file") from error
    except RecursionError as error:
        raise InputError(f"{path}: too many levels of nesting; correct the file") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: {error}; correct the file") from error
    if not isinstance(values, dict) or not values:
        found = {dict: "nothing", list: "a list", NoneType: "nothing"}.get(
            type(values), "one value"
        )
        raise InputError(
            f"{path}: expected settings as KEY: VALUE, found {found}; correct the file"
        )
    return values


def _check_plain(values: Any, place: str, depth: int) -> None:
    """Check that YAML values are those that settings have.

    Raises:
        InputError: One is something else; names its place.
    """
    where = f"{place}: " if place else ""
    if depth > _DEEPEST:
        raise InputError("too many levels of nesting; correct the file")
    if isinstance(values, dict):
        for key, value in values.items():
            if not isinstance(key, str):
                raise InputError(f"{where}expected text as a key, found {shown(key)}; correct it")
            _check_plain(value, f"{place}.{key}".lstrip("."), depth + 1)
    elif isinstance(values, list):
        for number, value in enumerate(values):
            _check_plain(value, f"{place}[{number}]", depth + 1)
    elif not isinstance(values, str | int | float | bool | None):
        raise InputError(
            f"{where}expected text, a number, true, false or null, found a "
            f"{type(values).__name__}; correct it"
        )


def _check_header(text: str) -> None:
    """Check the first comments of a file, which Hydra reads as long as they begin with `@`.

    Raises:
        InputError: One has not the form `# @package NAME`.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and re.match(r"\s*#\s*@", line) is None:
            return
        if len(line.strip().lstrip("#").split()) not in {0, 2}:
            raise InputError(
                f"line {number}: {shown(line.strip())}: expected `# @package NAME`; correct it"
            )


def _defaults(values: dict[str, Any], option: str) -> Iterator[str]:
    """Iterate over the options that an option file includes, each as GROUP/NAME.

    Args:
        values: Values of the file.
        option: The file's own GROUP/NAME.

    Raises:
        InputError: `defaults` is no list of options.
    """
    entries = values.get("defaults", [])
    if not isinstance(entries, list):
        raise InputError("defaults: expected a list, such as [other, _self_]; correct it")
    for entry in entries:
        name, chosen = entry, None
        if isinstance(entry, dict) and len(entry) == 1:
            [(name, chosen)] = entry.items()
        options = chosen if isinstance(chosen, list) else [chosen]
        if not isinstance(name, str) or not all(isinstance(o, str | None) for o in options):
            raise InputError(
                f"defaults: {shown(entry)}: expected the name of an option, or GROUP: OPTION; "
                "correct it"
            )
        if name == "_self_" or name.startswith("override "):
            continue
        group, absolute = name.removeprefix("optional ").partition("@")[0], name.startswith("/")
        folder = "" if absolute else option.rpartition("/")[0]
        for each in options:
            included = group.lstrip("/") if each is None else f"{group.lstrip('/')}/{each}"
            yield f"{folder}/{included}".lstrip("/")


def _check_loops(folder: Path, defaults: dict[str, list[str]]) -> None:
    """Check that no option includes itself.

    Raises:
        InputError: One does, alone or by way of others.
    """
    for start in defaults:
        seen, waiting = set(), list(defaults[start])
        while waiting:
            option = waiting.pop()
            if option == start:
                raise InputError(
                    f"{folder / start}.yaml: defaults: the option includes itself; remove it there"
                )
            if option not in seen:
                seen.add(option)
                waiting += defaults.get(option, [])


def _of_hydra(values: dict[str, Any], text: str) -> Iterator[str]:
    """Iterate over the settings of Hydra in an option file that are not allowed."""
    header = re.search(r"^#\s*@package\s+(\S*hydra\S*)", text, re.MULTILINE)
    if header is not None:
        yield f"@package {header[1]}"
    yield from (f"_target_: {target}" for target in _targets_in(values))
    entries = values.get("defaults")
    for entry in entries if isinstance(entries, list) else []:
        name = str(next(iter(entry), "")) if isinstance(entry, dict) else str(entry)
        if "hydra" in name and re.fullmatch(r"override /?hydra/launcher", name) is None:
            yield f"defaults: {name}"
    for key, inner in values.items():
        if key.partition(".")[0] != "hydra":
            continue
        settings = inner if key == "hydra" and isinstance(inner, dict) else {}
        launcher = settings.get("launcher")
        known = isinstance(launcher, dict) and launcher.keys() <= _OF_LAUNCHERS
        if not known or settings.keys() != {"launcher"}:
            yield key


def _targets_in(values: Any) -> Iterator[Any]:
    """Iterate over all values of `_target_`, at any depth."""
    if isinstance(values, dict):
        if "_target_" in values:
            yield values["_target_"]
        values = list(values.values())
    for value in values if isinstance(values, list) else []:
        yield from _targets_in(value)
