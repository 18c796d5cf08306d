"""Values of settings, names and paths on the command line, and the user's own YAML."""

import dataclasses
import shutil
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from flash import cli, jobs
from flash.schemas import ROOTS, schema_at
from tests.fuzz.attempt import Attempt
from tests.fuzz.base import OPTIONS
from tests.fuzz.mutate import byte_changes, write_changed

ODD = (
    *("", "null", "true", "maybe", "-1", "0", "1", "0.5", "1e308", "nan", "inf", "-inf"),
    *("10000000000000", "1e-320", "x", "'5'", "[]", "[1]", "[null]", "{}", "{a: 1}", "{a: {b: 1}}"),
    *("../../x", "/etc/passwd", "/dev/zero", "-rf", "'<script>'", '"a\\nb"', "'${oc.env:HOME}'"),
    *("${seed}", "a=b", "a%20b", "ü", "'a b'", "[1,2,3,4,5,6,7,8,9]", "x" * 300, "---", "?"),
)
"""Values as they are typed after `KEY=`."""


def checks_only(verb: str) -> Callable[[], int]:
    """Main function of `flash` with the checks of a command in place of its work."""

    def main() -> int:
        check = jobs.JOBS[verb][1]
        jobs.JOBS[verb] = (check, check)
        return cli.main()

    return main


def leaves(schema: type, path: str = "") -> Iterator[str]:
    """Keys of all settings, of groups too."""
    for field in dataclasses.fields(schema):
        key = f"{path}.{field.name}".lstrip(".")
        yield key
        inner = schema_at(schema, [field.name])
        if inner is not None:
            yield from leaves(inner, key)


def attempts_values(random: Random, project: Path) -> Iterator[Attempt]:
    """Every setting of every command with every odd value; the checks alone are run."""
    choices = [
        (verb, key, value)
        for verb, schema in ROOTS.items()
        for key in leaves(schema)
        for value in ODD
    ]
    random.shuffle(choices)
    for verb, key, value in choices:
        override = f"{key}={value}"
        yield Attempt(
            f"flash {verb} {override}",
            lambda work, verb=verb, override=override: [verb, override],
            main=checks_only(verb),
        )


_WORKING = {
    "train": ("experiment=small", "trainer.max_steps=1"),
    "export": ("experiment=small", "device.processes=1"),
    "prepare": ("data=small", "data.name=small", "backbone.weights=hf"),
    "search": ("experiment=small", "stage=latency"),
}


def attempts_used_values(random: Random, project: Path) -> Iterator[Attempt]:
    """Settings with odd values, and the command runs."""
    pairs = [(verb, key) for verb in _WORKING for key in leaves(ROOTS[verb])]
    choices = [(verb, key, value) for verb, key in pairs for value in ODD]
    random.shuffle(choices)
    for verb, key, value in choices:
        if key.startswith(("device.ssh", "device.android", "trainer.devices", "trainer.nodes")):
            continue
        override = f"{key}={value}"

        def prepare(work: Path, verb: str = verb, override: str = override) -> list[str]:
            link_inputs(project, work)
            return [verb, *_WORKING[verb], override]

        yield Attempt(f"flash {verb} {override}", prepare, timeout_s=240.0)


def link_inputs(project: Path, work: Path, *own: str) -> None:
    """Make the project's inputs visible in a folder.

    Args:
        project: The project.
        work: Empty folder.
        own: Names that are copied, since they will be changed.
    """
    for path in project.iterdir():
        if path.name in own:
            copy: Any = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, work / path.name)
        elif path.name != "runs":
            (work / path.name).symlink_to(path.resolve())


_TYPED_YAML = (
    "layer_types: FF\n\tffn_dim: 64\n",
    "layer_types: FF\n  ffn_dim: 64\n",
    "layer_types: FF\nlayer_types: FFF\n",
    "layer_types: 'FF\n",
    "layer_types: FF\0\n",
    "layer_types: FF\n---\nffn_dim: 64\n",
    "",
    "# nothing\n",
    "null\n",
    "[]\n",
    "5\n",
    "text\n",
    "defaults: [small]\n",
    "defaults: [other]\n",
    "defaults: [/arch/small]\n",
    "defaults: {a: 1}\n",
    "defaults: [{a: {b: 1}}]\n",
    "defaults: [null]\n",
    "defaults: [_self_, _self_]\n",
    "defaults: 5\n",
    "layer_types: &a FF\nffn_dim: *b\n",
    "a: &a [*a]\n",
    "layer_types: !!python/object/apply:os.system ['touch escaped']\n",
    "layer_types: !!binary aGVsbG8=\n",
    "layer_types: 2020-01-01\n",
    "? [a, b]\n: c\n",
    "1: 2\n",
    "null: 2\n",
    "layer_types: ${oc.env:HOME}\n",
    "layer_types: ${arch.layer_types}\n",
    "layer_types: ${nothing}\n",
    "layer_types: ${\n",
    "layer_types: ???\n",
    "layer_types: 5\n",
    "rope_theta: abc\n",
    "rope_theta: .inf\n",
    "rope_theta: .nan\n",
    "rope_theta: null\n",
    "norm_eps: null\n",
    "norm_eps: .inf\n",
    "norm_eps: true\n",
    "tie_embeddings: maybe\n",
    "tie_embeddings: 1\n",
    "qk_norm: maybe\n",
    "rope_scaling: 5\n",
    "rope_scaling: []\n",
    "rope_scaling: {}\n",
    "rope_scaling: {kind: linear}\n",
    "rope_scaling: {kind: linear, factor: abc}\n",
    "rope_scaling: {kind: linear, factor: .inf}\n",
    "rope_scaling: {kind: linear, factor: null}\n",
    "rope_scaling: {kind: 5, factor: 2}\n",
    "rope_scaling: {kind: llama3, factor: 2, low_freq_factor: x}\n",
    "rope_scaling: {kind: llama3, factor: 2, original_context: 1.5}\n",
    "rope_scaling: {kind: [linear], factor: 2}\n",
    "num_heads: true\n",
    "num_heads: 1.0\n",
    "num_heads: 10000000000000\n",
    "layer_types: " + "F" * 100_000 + "\n",
    "layer_types: {a: b}\n",
    "layer_types: [[full_attention]]\n",
    "layer_types: [null]\n",
    "stock: null\n",
    "stock: 5\n",
    "stock: lfm2\n",
    "# @package _global_\nhydra:\n  callbacks: {x: {_target_: psutil.Popen}}\n",
    "# @package _global_\nhydra: {run: {dir: /tmp/elsewhere}}\n",
    "# @package hydra.callbacks\nx: {_target_: psutil.Popen, args: [touch, escaped]}\n",
    "_target_: os.system\n",
    "# @package nothing.of.this\nffn_dim: 64\n",
    "# @package _global_\nseed: 10000000000000\n",
    "%YAML 9.9\n---\nffn_dim: 64\n",
    "a" * 2000 + ": 1\n",
)
"""Option files of the group `arch` that people write by mistake, or on purpose."""


def attempts_yaml(random: Random, project: Path) -> Iterator[Attempt]:
    """Option files of the user: typed mistakes, then damaged ones of all groups."""

    def attempt(what: str, group: str, content: bytes | None) -> Attempt:
        verb, _, sub = group.rpartition("/")
        command = verb or ("prepare" if group == "data" else "search")
        command = "train" if group in {"arch", "recipe"} else command
        sign = "+" if group == "arch" else ""

        def prepare(work: Path) -> list[str]:
            link_inputs(project, work, "conf")
            write_changed(work / "conf" / group / "small.yaml", content)
            return [command, "backbone.weights=hf", f"{sign}{sub}=small"]

        typed = {text.encode() for text in _TYPED_YAML}
        return Attempt(
            f"{group}: {what}",
            prepare,
            passes=lambda work, output: not (work / "escaped").exists() and content not in typed,
            main=checks_only(command),
        )

    for text in _TYPED_YAML:
        yield attempt(repr(text)[:70], "arch", text.encode())
    groups = [*OPTIONS]
    changes = {group: byte_changes(text.encode(), random) for group, text in OPTIONS.items()}
    while True:
        group = random.choice(groups)
        what, content = next(changes[group])
        yield attempt(what, group, content)


_NAMES = (
    *("../../x", "/tmp/flash_escape/x", "..", ".", "", "a/b", "a\\b", "-rf", "'<script>'", "'a b'"),
    *('"a\\nb"', '"a\\tb"', "null", "x" * 300, "'a:b'", "'*'", "'~'", "'$HOME'", "'${runs}'"),
    *("ü", "'a;b'", "'a\\'b'", "CON", ".hidden", "'a b '", "a=b", "a%20b", "'a?b'", "5", "true"),
)
_NAME_KEYS = (
    ("train", "name"),
    ("train", "backbone.name"),
    ("train", "data.name"),
    ("train", "recipe.name"),
    ("train", "logger.project"),
    ("search", "search.study"),
    ("search", "space.name"),
    ("search", "device.name"),
    ("search", "backbone.name"),
    ("search", "search.from_study"),
    ("search", "latency.transfer_from"),
    ("export", "name"),
    ("export", "model"),
    ("export", "device.name"),
    ("evaluate", "suite.name"),
    ("evaluate", "name"),
    ("evaluate", "model"),
    ("prepare", "data.name"),
    ("prepare", "out"),
    *((verb, "runs") for verb in ROOTS),
)


def attempts_names(random: Random, project: Path) -> Iterator[Attempt]:
    """Names and folders; nothing may be written outside of the working folder."""
    choices = [(verb, key, name) for verb, key in _NAME_KEYS for name in _NAMES]
    random.shuffle(choices)
    for verb, key, name in choices:
        command = _WORKING.get(verb, ("backbone.weights=hf", "limit=1"))
        inside = key in {"runs", "out"}

        def prepare(
            work: Path,
            verb: str = verb,
            key: str = key,
            name: str = name,
            command: tuple[str, ...] = command,
        ) -> list[str]:
            link_inputs(project, work)
            (work.parent / "fence").write_text("", "utf-8")
            return [verb, *command, f"{key}={name}"]

        def kept_inside(work: Path, output: str, inside: bool = inside, name: str = name) -> bool:
            if inside and name == "..":  # the folder that was asked for
                return True
            beside = {path.name for path in work.parent.iterdir()}
            strange = {
                path.name
                for path in work.iterdir()
                if not path.is_symlink() and path.name not in {"runs", "shards"}
            }
            return beside == {"fence", "work", "out", "err"} and (inside or not strange)

        yield Attempt(
            f"flash {verb} {key}={name}",
            prepare,
            passes=kept_inside,
            main=checks_only(verb) if verb in {"search", "evaluate", "export"} else None,
            timeout_s=120.0,
        )


_Kind = typing.Callable[[Random, Path], Iterator[Attempt]]
KINDS: dict[str, _Kind] = {
    "values": attempts_values,
    "used_values": attempts_used_values,
    "yaml": attempts_yaml,
    "names": attempts_names,
}
