"""Errors of Hydra and OmegaConf as one line in the form of our own."""

import dataclasses
import re
import typing
from types import NoneType

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from flash import renamed, slurm
from flash.bundled import CONF
from flash.compat.hydra import missing_option
from flash.compat.omegaconf import error_key, error_schema
from flash.errors import InputError, closest, nearest, without_secrets
from flash.schemas import commands_with, options_at, schema_at, whole_key_hint

_KINDS = {
    **{"Integer": "an integer", "Float": "a number", "Boolean": "true or false"},
    **{"int": "an integer", "float": "a number", "bool": "true or false", "str": "a word"},
}
"""Types of OmegaConf, and of Python, in words."""


def explain(error: BaseException, schema: type) -> str:
    """Explain an error of Hydra or OmegaConf in one line: key, reason, nearest valid key."""
    if isinstance(error, MissingConfigException):
        return _missing_option(error, schema)
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0]
        return (
            f"{without_secrets(error.override)}: expected key=value; a value with commas, spaces, "
            f"brackets or '<' needs quotes of its own within those of the shell: '{key}=\"VALUE\"'"
        )
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException | InputError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, InputError):
        return str(cause)
    if not isinstance(cause, OmegaConfBaseException):
        return _composition(str(error), schema)
    key = error_key(cause)
    if isinstance(cause, InterpolationKeyError):
        return f"{_first_line(cause)}: expected a key of this command, as in ${{arch.ffn_dim}}"
    wrapped = cause.__cause__ or cause.__context__
    if isinstance(wrapped, InputError):
        return str(wrapped)
    entry = _entry_of_settings(str(error), key)
    held = schema_at(schema, entry.split(".")) if entry is not None else None
    if held is not None:
        group = held.__name__.removesuffix("Settings").lower()
        there = (CONF / group).is_dir()
        add = f"add it with +{group}@{entry}=NAME" if there else "add it in an option file of yours"
        return f"{entry}: is not set so far, and holds settings; {add}"
    *path, last = key.split(".")
    owner = schema_at(schema, path)
    if not path and dataclasses.is_dataclass(error_schema(cause)):  # an item of a list
        owner = error_schema(cause)
    fields = [f.name for f in dataclasses.fields(owner)] if owner is not None else []
    if fields and last.partition("[")[0] not in fields:  # format[1] is an item of a list
        return unknown_key(key, fields, schema)
    return _wrong_value(key, _first_line(cause), schema)


def _entry_of_settings(text: str, last: str) -> str | None:
    """Return the whole key of a new entry of a mapping, of which an error has the last part."""
    typed = re.match(r"Error merging override \+*([\w.@]+)=", text)
    parts = typed[1].split(".") if typed else []
    return ".".join(parts[: parts.index(last) + 1]) if last in parts[1:] else None


def unknown_key(key: str, valid: list[str], schema: type) -> str:
    """Explain an unknown key: its present name, the commands that have it, or the nearest key.

    Args:
        key: The whole key, as typed.
        valid: Keys that its parent has.
        schema: Root settings of the command.
    """
    roots = {f.name for f in dataclasses.fields(schema)}
    present = renamed.present_name(key, roots)
    if present is not None:
        return f"{key}: {present}"
    root = key.partition(".")[0]
    others = commands_with(root)
    if others and root not in roots:
        return f"{key}: not a setting of this command; it is one of flash {', '.join(others)}"
    hint = whole_key_hint(schema, key) or nearest(key.rpartition(".")[2], valid)
    return f"{key}: unknown key; {hint}"


def _wrong_value(key: str, text: str, schema: type) -> str:
    """Put OmegaConf's words about a value of the wrong type into the form of our own errors."""
    or_null = ", or null" if NoneType in options_at(schema, key) else ""
    if found := re.match(r"Value '(.*)' of type '.*' could not be converted to (\w+)", text):
        return f"{key}={found[1]}: expected {_KINDS.get(found[2], found[2])}{or_null}"
    if found := re.match(r"Invalid value '(.*)', expected one of \[(.*)\]", text):
        typed = f"{key}={found[1]}"
        if typed in renamed.VALUES:
            return f"{typed}: renamed to {renamed.VALUES[typed]}"
        return f"{typed}: expected one of {found[2]}{or_null}"
    if re.match(r"Invalid value assigned: \w+ is not a ListConfig", text):
        return f"{key}: expected a list in brackets, such as '{key}=[A,B]', also of one item"
    if found := re.match(r"Value '(.*)' is not a valid bool", text):
        return f"{key}={found[1]}: expected {_KINDS['Boolean']}{or_null}"
    if found := re.match(
        r"Invalid type assigned: \w+ is not a subclass of (\w+)\. value: (.*)", text
    ):
        owner = schema_at(schema, key.split("."))
        if owner is None:
            return wrong_item(key, found[2], found[1])
        first = dataclasses.fields(owner)[0].name
        return f"{key}={found[2]}: expected values for its settings, as in {key}.{first}=VALUE"
    if re.match(r"Key '.*' is not in struct", text):
        return f"{key}: is not set so far; write +{key}=VALUE to add it"
    return f"{key}: {text}" if key else f"{text}; expected a mapping of keys to values"


def wrong_item(key: str, value: object, kind: str) -> str:
    """Explain that an item of a list, such as `space.num_heads[0]`, is of another type."""
    value = "null" if value in (None, "None") else value
    return f"{key}={value}: expected {_KINDS.get(kind, 'one of the names that its group lists')}"


def _composition(text: str, schema: type) -> str:
    """Put Hydra's words about an override into the form of our own errors."""
    if found := re.match(r"Could not override '([\w/]+)'", text):
        group = found[1]
        if elsewhere := _of_other_commands(group, schema):
            return elsewhere
        if added := re.search(r"use (\+arch=\S+)", text):
            return f"{group}: has no option by default; write {added[1]}"
        return f"{group}: no such group; flash COMMAND --help lists the groups"
    if found := re.match(r"force-add of config groups is not supported: '\+\+(\w+)=(.*)'", text):
        sign = "+" if found[1] == "arch" else ""
        return f"++{found[1]}={found[2]}: a config group; write {sign}{found[1]}={found[2]}"
    twice = r"(\w+) appears more than once in the final|Multiple values for (\w+)\."
    if found := re.match(twice, text):
        group = found[1] or found[2]
        if group == "arch":
            return "+arch: given more than once; expected one option, or several as -m +arch=A,B"
        return f"+{group}: has an option by default; write {group}=OPTION, without '+'"
    if found := re.match(r"Ambiguous value for argument '(.*)'", text):
        key, _, values = found[1].partition("=")
        if any(typing.get_origin(option) is list for option in options_at(schema, key)):
            return f"{found[1]}: expected a list in brackets: '{key}=[{values}]'"
        return f"{found[1]}: several values; write -m for a sweep, or quotes around a value"
    if found := re.match(r"Could not append to config. An item is already at '(.*)'", text):
        return f"+{found[1]}: is set already; write {found[1]}=VALUE, without '+'"
    return _first_line(text)


def _of_other_commands(group: str, schema: type) -> str | None:
    """Explain that a group is one of other commands; None for those of this one."""
    others = commands_with(group)
    if not others or group in {field.name for field in dataclasses.fields(schema)}:
        return None
    return f"{group}: not a group of this command; it is one of flash {', '.join(others)}"


def _missing_option(error: MissingConfigException, schema: type) -> str:
    """Explain that a group lacks an option, as in `+arch=typo`; names the nearest option."""
    name, options = missing_option(error)
    if name == slurm.LAUNCHER.replace("=", "/"):
        return f"{slurm.LAUNCHER}: needs a plugin; pip install hydra-submitit-launcher"
    if "/" not in name or options is None:
        return _first_line(error)
    group, option = name.rsplit("/", 1)
    if elsewhere := _of_other_commands(group, schema):
        return elsewhere
    if f"{group}={option}" in renamed.OPTIONS:
        return f"{group}={option}: renamed to {renamed.OPTIONS[f'{group}={option}']}"
    if group == "arch" and "start" in {field.name for field in dataclasses.fields(schema)}:
        options = [each for each in options if not _is_stock(each)]  # they have no weights
    hint = closest(option, options)
    if hint is None and group == "arch":
        hint = "architectures that a search finds come from its own runs folder: search first"
    return f"{group}={option}: expected one of {', '.join(options)}" + (f"; {hint}" if hint else "")


def _is_stock(arch: str) -> bool:
    path = CONF / "arch" / f"{arch}.yaml"
    return path.is_file() and re.search(r"(?m)^stock:", path.read_text("utf-8")) is not None


def _first_line(error: BaseException | str) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
