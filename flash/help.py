"""Help of the configured commands: one screen, and the settings and options of a group.

All texts come from the documentation of the settings and from the comments of the option files.
Nothing is composed, so that help is quick and Hydra is not imported.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from flash import renamed
from flash.bundled import CONF
from flash.commands import command
from flash.config_reference import (
    GROUPS,
    Key,
    about_option,
    enums,
    first_paragraph,
    keys,
    member_docs,
    type_name,
)
from flash.errors import InputError, nearest, shown
from flash.schemas import ROOTS, commands_with, whole_key_hint
from flash.terminal import COLUMNS, wrap

ABOUT = {
    "train": "Continued pretraining of an architecture, weights inherited from a backbone.",
    "search": "Frontier of held-out loss and measured latency for a backbone on a device.",
    "export": "Lowering to an XNNPACK .pte, checked against the model and measured.",
    "evaluate": "Benchmarks of lm-evaluation-harness on a model or its program.",
    "prepare": "Tokenization of a mixture of text into shards, ahead of training.",
    "workspace": "Workspace and report of a W&B project, made anew or updated.",
}
"""First line of each command's help."""
EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "train": [
        ("", "the tiny backbone, a little further"),
        ("+arch=tiny_12_a3f9", "a winner of a search, distilled"),
        ("+arch.ffn_dim=384 seed=1", "a shape of your own"),
        ("+arch=flash_650m trainer.max_steps=2 data.seq_len=512", "the paper's shape"),
    ],
    "search": [
        ("", "the tiny backbone on this CPU"),
        ("stage=latency device=host", "measure, fit the predictor, stop"),
        ("search.trials=100 seed=1 search.study=longer", "more trials"),
        ("search.study=both 'device=[host,ssh]' devices.ssh.ssh.host=BOARD", ""),
        ("search.limits.prefill_ms=60 search.study=small", "only fast models"),
        ("search.from_study=tiny search.study=two search.limits.size_mib=2", ""),
        ("stage=promote search.promote=4", "train the best longer"),
        ("-m hydra/launcher=submitit_slurm worker='range(0,16)'", "Slurm"),
    ],
    "export": [
        ("", "the tiny backbone"),
        ("+arch=tiny_12_a3f9 prompt='class Parser'", "a trained winner"),
        ("-m +arch=tiny_12_a3f9,tiny_17_0c4e", "several"),
    ],
    "evaluate": [
        ("+arch=tiny_12_a3f9 limit=100", "100 questions a task"),
        ("+arch=tiny_12_a3f9 format=program", "the exported .pte"),
        ("suite=paper_chat model=chatty suite.allow_code_execution=true", ""),
    ],
    "prepare": [
        ("data=files 'data.sources=[{path: texts/*.parquet}]' out=shards", ""),
        ("backbone=smollm2_360m tokens=10000000000", "one source asks for a login"),
    ],
    "workspace": [
        ("entity=TEAM project=PROJECT", "make or update both"),
        ("file=dashboards.json", "write them to a file, send nothing"),
    ],
}
"""Arguments of examples, and a word on each; tests compose them."""
_MOST_OPTIONS = 12
"""Options of a group that the first screen lists."""
_WIDEST_VALUE = 40
"""Characters of a value that is shown; longer ones are in the file of the option."""


def help_text(verb: str, arguments: Sequence[str]) -> str:
    """Text for `flash VERB --help` with the other arguments, which can name groups and keys.

    Raises:
        InputError: A word is neither a group nor a key of the command.
    """
    topics = [word for word in arguments if not word.startswith("-") and "=" not in word]
    if not topics:
        return _screen(verb, arguments)
    return "\n\n".join(_topic(verb, topic, arguments) for topic in topics)


@cache
def _defaults(verb: str) -> list[Any]:
    return yaml.safe_load((CONF / f"{verb}.yaml").read_text("utf-8"))["defaults"]


def groups(verb: str) -> dict[str, str | None]:
    """Groups of a command with the options that it takes by default, None for those without."""
    found: dict[str, str | None] = {}
    fields = {field.name for field in dataclasses.fields(ROOTS[verb])}
    if "arch" in fields:
        found["arch"] = None
    for entry in _defaults(verb):
        if isinstance(entry, dict):
            [(key, option)] = entry.items()
            if not key.startswith("override "):
                found[key.removeprefix("optional ")] = option
    return found


def options(verb: str, group: str, runs: Path = Path("runs")) -> dict[str, Path]:
    """Options of a group that the command can use, with their files.

    First those of flash, then those that searches have found, then those of the user.
    """
    folders = dict.fromkeys([CONF, runs / "conf", Path("conf")])
    place = f"{verb}/experiment" if group == "experiment" else group
    paths = [path for folder in folders for path in sorted((folder / place).glob("*.yaml"))]
    return {path.stem: path for path in paths if _is_usable(verb, group, path)}


def _is_usable(verb: str, group: str, path: Path) -> bool:
    """Return False for the shapes of stock models, which have no weights to train."""
    return group != "arch" or verb == "export" or "stock" not in _values(path)


def _values(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError:  # a broken file of the user; the command itself will name it
        return {}
    return values if isinstance(values, dict) else {}


def runs_folder(arguments: Sequence[str]) -> Path:
    """The folder of runs that the arguments of a command name."""
    given = [word.removeprefix("runs=") for word in arguments if word.startswith("runs=")]
    return Path(given[-1] if given else "runs")


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[\w)`'\"])\.\s+(?=[A-Z`'])", text, maxsplit=1)[0].rstrip(".")


def _sign(group: str) -> str:
    return "+" if group == "arch" else ""


def _screen(verb: str, arguments: Sequence[str]) -> str:
    """The first screen: groups with their options, settings, examples."""
    name, runs = command(verb), runs_folder(arguments)
    lines = [wrap(f"{name}: {ABOUT[verb]}"), "", "Usage:"]
    known = groups(verb)
    lines += [f"  {name} {'[GROUP=OPTION] ' if known else ''}[KEY=VALUE] ..."]
    if known:
        lines += ["", "Groups, each with its options (* is taken if none is chosen):"]
    for group, default in known.items():
        names = list(options(verb, group, runs))
        if not names:
            continue
        listed = [f"*{each}" if each == default else each for each in names[:_MOST_OPTIONS]]
        if default in names[_MOST_OPTIONS:]:
            listed.append(f"*{default}")
        if len(names) > _MOST_OPTIONS:
            listed.append(f"... ({len(names)} in all)")
        lines.append(wrap(f"  {_sign(group) + group:12s} {', '.join(listed)}", " " * 15))
    lines += ["", "Settings:"]
    for key in _own_keys(verb):
        value = "" if key.default is None else key.default
        text = f"  {f'{key.path}={value}':21s} {_first_sentence(key.doc)}"
        lines.append(wrap(text, " " * 24))
    inner = [key.path for key in keys(ROOTS[verb], "") if "." in key.path]
    for root, count in Counter(path.partition(".")[0] for path in inner).items():
        if root not in known and root != "then":
            lines.append(f"  {f'{root}.KEY':21s} {count} settings, shown by --help {root}")
    lines += ["", "More:"]
    if known:
        example = next(each for each in ("recipe", "device", "data") if each in known)
        lines += [f"  {name} --help {example:9s}  options and settings of one group"]
    lines += [f"  {name} --cfg job           all values that a run takes"]
    lines += ["", "Examples:", *_examples(verb, name)]
    return "\n".join(lines)


def _examples(verb: str, name: str) -> Iterator[str]:
    for words, about in EXAMPLES[verb]:
        line = f"  {name} {words}".rstrip()
        if not about:
            yield line
        elif len(line) + len(about) + 4 <= COLUMNS:
            yield f"{line.ljust(COLUMNS - 4 - len(about))[: max(44, len(line))]}  # {about}"
        else:
            yield from (f"  # {about}", line)


def _own_keys(verb: str) -> list[Key]:
    """Settings of the command itself, not of its groups."""
    listed = groups(verb)
    return [key for key in keys(ROOTS[verb], "") if "." not in key.path and key.path not in listed]


def _topic(verb: str, topic: str, arguments: Sequence[str]) -> str:
    """Help on one group, such as `recipe`, a part of one (`device.lowering`), or a key."""
    topic = topic.lstrip("+").rstrip(".")
    root, _, rest = topic.partition(".")
    if root in groups(verb) and not rest:
        return _group(verb, root, arguments)
    schema = GROUPS.get(root) if root in groups(verb) else None
    known = list(keys(schema, f"{root}.")) if schema is not None else list(keys(ROOTS[verb], ""))
    found = [key for key in known if f"{key.path}.".startswith(f"{topic}.")]
    if found:
        return "\n".join(_entries(found, topic, _chosen_values(verb, root, arguments)))
    others = commands_with(root)
    if others and verb not in others:
        where = f"it is one of flash {', '.join(others)}"
        raise InputError(f"--help {topic}: no group or setting of flash {verb}; {where}")
    names = {*groups(verb), *(key.path for key in _own_keys(verb))}
    if rest:
        names = {path for key in known for path in _paths(key.path)}
    renaming = renamed.present_name(topic, names)
    hint = renaming or whole_key_hint(ROOTS[verb], topic) or nearest(topic, names)
    raise InputError(f"--help {topic}: no group or setting of flash {verb}; {hint}")


def _paths(key: str) -> Iterator[str]:
    """The key and the mappings that it is in."""
    parts = key.split(".")
    return (".".join(parts[: i + 1]) for i in range(1, len(parts)))


def _option_of(verb: str, group: str, arguments: Sequence[str]) -> str | None:
    """The option of a group that the arguments choose, or else the command's own."""
    chosen = [word.partition("=")[2] for word in arguments if word.startswith(f"{group}=")]
    return chosen[-1] if chosen else groups(verb).get(group)


def _chosen_values(verb: str, group: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Values that the chosen option sets, by their whole keys."""
    option = _option_of(verb, group, arguments)
    path = options(verb, group, runs_folder(arguments)).get(option or "")
    return dict(_flat(_values(path), f"{group}.")) if path is not None else {}


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        yield f"{prefix}{key}", value


def _group(verb: str, group: str, arguments: Sequence[str]) -> str:
    """Help on a group: what it is, its options, its settings."""
    schema, option = GROUPS[group], _option_of(verb, group, arguments)
    lines = [wrap(f"{group}: {first_paragraph(schema)}")] if schema is not None else []
    lines += ["", f"Options: {command(verb)} {_sign(group)}{group}=OPTION"]
    found = options(verb, group, runs_folder(arguments))
    width = max(map(len, found), default=0)
    for name, path in found.items():
        about = _first_sentence(about_option(path))
        mark = "*" if name == option else " "
        lines.append(wrap(f" {mark}{name:{width}s}  {about}".rstrip(), " " * (width + 4)))
    if schema is not None:
        values = f", with the values of {group}={option}" if option in found else ""
        lines += ["", f"Settings: {command(verb)} {_sign(group)}{group}.KEY=VALUE{values}"]
        known = list(keys(schema, f"{group}."))
        if option is None:  # values of an architecture are the backbone's where none are given
            known = [dataclasses.replace(key, default=None) for key in known]
        lines += _entries(known, group, _chosen_values(verb, group, arguments))
    return "\n".join(lines).strip("\n")


def _entries(found: Sequence[Key], topic: str, values: dict[str, Any]) -> Iterator[str]:
    """Settings below `topic`; those of a mapping within it are counted, not listed."""
    inner: dict[str, int] = {}
    for key in found:
        parts = key.path.removeprefix(topic).strip(".").split(".")
        if len(parts) > 1 and "[i]" not in parts[0]:
            inner[f"{topic}.{parts[0]}"] = inner.get(f"{topic}.{parts[0]}", 0) + 1
            continue
        yield _entry(key, values)
    for path, count in inner.items():
        yield wrap(f"  {path}: {count} settings, shown by --help {path}", " " * 6)


def _entry(key: Key, values: dict[str, Any]) -> str:
    default = shown(values[key.path]) if key.path in values else key.default
    if default is not None and len(default) > _WIDEST_VALUE:
        default = "..."
    value = "" if default is None or default == "???" else f"={default}"
    lines = [f"  {key.path}{value}  ({type_name(key.annotation)})"]
    lines += [wrap(f"      {key.doc}", " " * 6)]
    for enum in enums(key.annotation):
        docs = member_docs(enum)
        for member in enum:
            about = docs.get(member.name, "")
            lines.append(wrap(f"        {member.name}: {about}".rstrip(": "), " " * 10))
    return "\n".join(lines)
