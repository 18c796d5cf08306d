"""Root settings of the commands, and the dataclass at any key below them."""

import dataclasses
import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from flash.compat.omegaconf import kind_of_items
from flash.dashboards.settings import WorkspaceSettings
from flash.data.settings import PrepareSettings
from flash.evaluation.settings import EvaluateSettings
from flash.export.settings import ExportSettings
from flash.search.settings import SearchJobSettings
from flash.training.settings import TrainSettings

ROOTS: dict[str, type] = {
    "train": TrainSettings,
    "search": SearchJobSettings,
    "export": ExportSettings,
    "prepare": PrepareSettings,
    "evaluate": EvaluateSettings,
    "workspace": WorkspaceSettings,
}
"""Root settings of each command; `conf/COMMAND.yaml` holds their defaults."""


def _dataclass_of(annotation: Any) -> type | None:
    """Return the dataclass X of an annotation `X` or `X | None`; None for any other."""
    if _is_union(annotation):
        options = [arg for arg in typing.get_args(annotation) if arg is not NoneType]
        annotation = options[0] if len(options) == 1 else None
    is_schema = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    return annotation if is_schema else None


def schema_at(root: type, path: list[str]) -> type | None:
    """Return the dataclass that defines the keys below `path`; None if there is none.

    A path may lead through a mapping `dict[str, X]` of settings, such as `devices.board`.
    """
    return _dataclass_of(_annotation_at(root, path))


def holds_settings(root: type, path: list[str]) -> bool:
    """Return True if there is a mapping of any names to settings at `path`."""
    return _dataclass_of(_item_of(_annotation_at(root, path))) is not None


def hint_at(node: DictConfig | ListConfig, key: str | int) -> Any:
    """Return the annotation of a value in a configuration; None if it may be anything."""
    schema = OmegaConf.get_type(node)
    if schema is not None and dataclasses.is_dataclass(schema):
        return typing.get_type_hints(schema).get(str(key))
    return kind_of_items(node)


def is_alike(hint: Any, value: Any) -> bool:
    """Return False if what an interpolation resolves to has another type than an annotation."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    return any(_fits(option, value) for option in options)


def _fits(option: Any, value: Any) -> bool:
    if option is Any:
        return True
    if not isinstance(value, DictConfig | ListConfig):
        kinds = {float: (int, float), None: NoneType}.get(option, option)
        return isinstance(kinds, type | tuple) and isinstance(value, kinds)
    found = OmegaConf.get_type(value)
    if found is not None and dataclasses.is_dataclass(found):
        return option is found
    items = typing.get_args(option)
    if typing.get_origin(option) is not (list if isinstance(value, ListConfig) else dict):
        return False
    kind = kind_of_items(value)
    if kind is not None:
        return items[-1] in {kind, Any}
    held = value.values() if isinstance(value, DictConfig) else value
    return all(_fits(items[-1], item) for item in held)


def _annotation_at(root: type, path: list[str]) -> Any:
    annotation: Any = root
    for key in path:
        schema = _dataclass_of(annotation)
        hints = {} if schema is None else typing.get_type_hints(schema)
        annotation = hints.get(key, _item_of(annotation))
    return annotation


def _item_of(annotation: Any) -> Any:
    """Return X of an annotation `dict[str, X]`, else None."""
    return typing.get_args(annotation)[1] if typing.get_origin(annotation) is dict else None


def paths(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all settings below a schema, with those of mappings that hold others."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        nested = _dataclass_of(hints[field.name])
        if nested is not None:
            yield from paths(nested, f"{prefix}{field.name}.")


def options_at(root: type, key: str) -> list[Any]:
    """Types that a setting may have: those of an annotation `X | None`, else the only one."""
    *path, last = key.split(".")
    schema = schema_at(root, path)
    annotation = typing.get_type_hints(schema).get(last) if schema is not None else None
    return list(typing.get_args(annotation)) if _is_union(annotation) else [annotation]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in {typing.Union, UnionType}


def whole_key_hint(schema: type, key: str) -> str | None:
    """A hint that names the settings whose last keys are `key`; None if there are none."""
    whole = [path for path in paths(schema) if path.endswith(f".{key}")]
    return f"did you mean {' or '.join(map(repr, whole))}?" if whole else None


def commands_with(key: str) -> list[str]:
    """Names of the commands whose root settings have `key`."""
    return [
        verb for verb, root in ROOTS.items() if key in {f.name for f in dataclasses.fields(root)}
    ]
