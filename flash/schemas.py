"""Root settings of the commands, and the dataclass at any key below them."""

import dataclasses
import typing
from types import NoneType, UnionType
from typing import Any

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
    if typing.get_origin(annotation) in {typing.Union, UnionType}:
        options = [arg for arg in typing.get_args(annotation) if arg is not NoneType]
        annotation = options[0] if len(options) == 1 else None
    is_schema = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    return annotation if is_schema else None


def schema_at(root: type, path: list[str]) -> type | None:
    """Return the dataclass that defines the keys below `path`; None if there is none."""
    schema: type | None = root
    for key in path:
        if schema is None:
            return None
        schema = _dataclass_of(typing.get_type_hints(schema).get(key))
    return schema


def commands_with(key: str) -> list[str]:
    """Names of the commands whose root settings have `key`."""
    return [
        verb for verb, root in ROOTS.items() if key in {f.name for f in dataclasses.fields(root)}
    ]
