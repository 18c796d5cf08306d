"""The reference of all settings, generated from the documentation of their fields.

`python -m flash.config_reference FILE` writes it as Markdown; `make reference` writes
docs/configuration.md, and a test holds that file to the settings.
"""

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from flash.arch import ArchSpec, SpaceSettings
from flash.bundled import CONF
from flash.dashboards.settings import WorkspaceSettings
from flash.data.settings import DataSettings, PrepareSettings
from flash.device.settings import DeviceSettings
from flash.errors import shown
from flash.evaluation.settings import EvaluateSettings, SuiteSettings
from flash.export.settings import ExportSettings
from flash.latency.settings import LatencySettings
from flash.model.settings import BackboneSettings
from flash.search.settings import SearchJobSettings, SearchSettings
from flash.tracking.settings import LoggerSettings
from flash.training.settings import RecipeSettings, TrainerSettings, TrainSettings

COMMANDS: dict[str, type] = {
    "train": TrainSettings,
    "search": SearchJobSettings,
    "export": ExportSettings,
    "evaluate": EvaluateSettings,
    "prepare": PrepareSettings,
    "workspace": WorkspaceSettings,
}
GROUPS: dict[str, type | None] = {
    "arch": ArchSpec,
    "backbone": BackboneSettings,
    "space": SpaceSettings,
    "device": DeviceSettings,
    "latency": LatencySettings,
    "search": SearchSettings,
    "data": DataSettings,
    "recipe": RecipeSettings,
    "trainer": TrainerSettings,
    "suite": SuiteSettings,
    "logger": LoggerSettings,
    "experiment": None,
}
"""Schema of each config group; an experiment has values of several groups and no schema."""
_COLUMNS = 100
_HEAD = """# Configuration reference

This page is generated from the settings in the code: `make reference` writes it.

Every setting is a `key=value` on the command line of one of six commands. A config group such as
`device` is a folder below `conf/`, and each file in it is an option: `device=host` takes
`conf/device/host.yaml`, and `device.threads=2` changes one value of it. Options of your own are
files in a folder `conf/` of the working directory. A value that holds a comma, a space or a bracket
needs quotes: `'device.workload.prompts=[1024,512]'`. `null` means that nothing is set.

Each entry below has the key, its type, its default and its meaning. The files in `conf/` may set
another value than the default; the command's `--help` shows what a run takes.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        path: Its full key, such as `device.lowering.group_size`.
        annotation: Its type.
        default: Its default as text, or None where it must be given.
        doc: What the field's documentation says, in one line; empty where there is none.
    """

    path: str
    annotation: Any
    default: str | None
    doc: str


@cache
def _class_body(schema: type) -> tuple[ast.stmt, ...]:
    """Statements of a class, as its file has them."""
    tree = ast.parse(Path(inspect.getfile(schema)).read_text("utf-8"))
    return next(
        tuple(node.body)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == schema.__name__
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def member_docs(schema: type) -> dict[str, str]:
    """Documentation of fields or enum members: the string literal that follows each of them."""
    docs: dict[str, str] = {}
    bases = [base for base in schema.__mro__[1:] if dataclasses.is_dataclass(base)]
    for owner in (*reversed(bases), schema):
        body = _class_body(owner)
        for node, following in zip(body, body[1:], strict=False):
            match node, following:
                case (
                    ast.AnnAssign(target=ast.Name(id=name))
                    | ast.Assign(targets=[ast.Name(id=name)]),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = _one_line(text)
    return docs | _attribute_docs(schema)


def _attribute_docs(schema: type) -> dict[str, str]:
    """Entries of the `Attributes:` section of a docstring in Google's style."""
    _, found, section = (inspect.getdoc(schema) or "").partition("Attributes:\n")
    if not found:
        return {}
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: _one_line(text) for name, text in entries}


def _nested(annotation: Any) -> tuple[type | None, str]:
    """The dataclass within an annotation, and what its keys put behind the field's name."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation, ""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in {typing.Union, types.UnionType}:
        rest = [each for each in arguments if each is not types.NoneType]
        return _nested(rest[0]) if len(rest) == 1 else (None, "")
    if origin in {list, tuple} and arguments:
        return _nested(arguments[0])[0], "[i]"
    if origin is dict:
        return _nested(arguments[1])[0], ".NAME"
    return None, ""


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        return shown(field.default_factory())
    required = field.default is dataclasses.MISSING or field.default == MISSING
    return None if required else shown(field.default)


def type_name(annotation: Any) -> str:
    """A type in the words of the reference."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is types.NoneType:
        return "null"
    if origin in {typing.Union, types.UnionType}:
        return " | ".join(map(type_name, arguments))
    if origin in {list, tuple} and arguments:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "name"
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return "mapping"
    return getattr(annotation, "__name__", str(annotation))


def keys(schema: type, prefix: str) -> Iterator[Key]:
    """Every setting below a schema; fields that are config groups of their own are left out."""
    docs, hints = member_docs(schema), typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        annotation = hints[field.name]
        nested, between = _nested(annotation)
        if field.name in GROUPS and nested is not None and nested in GROUPS.values():
            continue
        path = f"{prefix}{field.name}"
        alone = nested is not annotation  # optional, or the item of a list or a mapping
        doc = docs.get(field.name, "")
        if nested is None or alone:
            yield Key(path, annotation, _default(field), doc)
        of_group = bool(between) and nested in GROUPS.values()  # described once, in its own section
        if nested is not None and not of_group:
            yield from keys(nested, f"{path}{between}.")


def undocumented() -> list[str]:
    """Settings whose fields have no documentation."""
    found = [
        key.path
        for prefix, schema in [*_sections(COMMANDS, ""), *_sections(GROUPS, ".")]
        for key in keys(schema, prefix)
        if not key.doc
    ]
    return sorted(set(found))


def _sections(schemas: dict[str, Any], dot: str) -> list[tuple[str, type]]:
    """Prefix of the keys and schema of each; commands have no prefix."""
    return [(f"{name}." if dot else "", schema) for name, schema in schemas.items() if schema]


def enums(annotation: Any) -> Iterator[type[Enum]]:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from enums(argument)


def _item(text: str, indent: int) -> str:
    """A list item, wrapped."""
    pad = " " * indent
    return textwrap.fill(
        text,
        _COLUMNS,
        initial_indent=f"{pad}- ",
        subsequent_indent=f"{pad}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _entry(key: Key) -> str:
    default = "required" if key.default is None else f"default `{key.default}`"
    lines = [_item(f"`{key.path}` ({type_name(key.annotation)}; {default}): {key.doc}", 0)]
    for enum in enums(key.annotation):
        docs = member_docs(enum)
        for member in enum:
            doc = docs.get(member.name)
            lines.append(_item(f"`{member.name}`" + (f": {doc}" if doc else ""), 4))
    return "\n".join(lines)


def about_option(path: Path) -> str:
    """The comment that an option's file begins with, in one line; empty where there is none."""
    text = path.read_text("utf-8").removeprefix("# @package _global_\n")
    comment = re.match(r"(?:#.*\n)*", text)
    return _one_line(re.sub(r"^# ?", "", comment[0] if comment else "", flags=re.MULTILINE))


def _options(group: str) -> str:
    """The files of a config group, each with the comment that it begins with."""
    lines = []
    of_commands = sorted(CONF.glob(f"*/{group}/*.yaml"))  # experiments
    roots = [path.read_text("utf-8") for path in CONF.glob("*.yaml")]
    chosen = any(f"- {group}: " in text for text in roots)  # by default, even as null
    for path in [*sorted((CONF / group).glob("*.yaml")), *of_commands]:
        about = about_option(path)
        command = f"flash {path.parents[1].name} " if path in of_commands else ""
        command += "" if chosen else "+"
        lines.append(_item(f"`{command}{group}={path.stem}`" + (f": {about}" if about else ""), 0))
    return "\n".join(lines)


def first_paragraph(schema: type) -> str:
    """The first paragraph of a class's docstring, in one line."""
    return _one_line((inspect.getdoc(schema) or "").partition("\n\n")[0])


def _paragraph(schema: type) -> str:
    return textwrap.fill(first_paragraph(schema), _COLUMNS, break_on_hyphens=False)


def _command_section(name: str, schema: type) -> str:
    known = [field.name for field in dataclasses.fields(schema) if field.name in GROUPS]
    groups = ", ".join(f"[`{group}`](#{group})" for group in known)
    text = f"Config groups: {groups}."
    head = textwrap.fill(text, _COLUMNS, break_long_words=False, break_on_hyphens=False)
    entries = "\n".join(_entry(key) for key in keys(schema, ""))
    parts = [f"## `flash {name}`", _paragraph(schema), *([head] if known else []), entries]
    return "\n\n".join(parts) + "\n"


def _group_section(name: str, schema: type | None) -> str:
    parts = [f"## {name}"]
    if schema is not None:
        parts.append(_paragraph(schema))
    parts.append(f"Options:\n\n{_options(name)}")
    if schema is not None:
        parts.append("Settings:\n\n" + "\n".join(_entry(key) for key in keys(schema, f"{name}.")))
    return "\n\n".join(parts) + "\n"


def reference() -> str:
    """The reference as Markdown: the settings of every command and every config group."""
    commands = [_command_section(name, schema) for name, schema in COMMANDS.items()]
    groups = [_group_section(name, schema) for name, schema in GROUPS.items()]
    return "\n".join([_HEAD, *commands, *groups])


def main() -> None:
    Path(sys.argv[1]).write_text(reference(), "utf-8")


if __name__ == "__main__":
    main()
