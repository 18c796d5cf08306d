"""Prepared shards, and caches of tokens, of a teacher's outputs and of importance scores."""

import json
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from tests.fuzz.attempt import Attempt, run
from tests.fuzz.mutate import byte_changes, json_changes, to_json, write_changed
from tests.fuzz.settings import link_inputs
from tests.fuzz.texts import STREAM

_CACHES = {
    "teacher": ["train", "experiment=small", "+arch=small", "recipe.kd_top_k=4", "name=again"],
    "folder": [
        *("train", "experiment=small", "data.kind=folder", "data.path=plain", "name=again"),
        *("data.validation_percent=30", "trainer.max_steps=2", "data.pattern='*.txt'"),
    ],
    "stream": [
        *STREAM[:4],
        *("name=again", "data.sources=[{path: texts/a.jsonl}]", "data.validation_percent=20"),
        "trainer.max_steps=2",
    ],
}
"""Commands whose caches are changed."""


def _with_plain(project: Path, work: Path) -> None:
    link_inputs(project, work, "shards")
    (work / "plain").mkdir()
    for number in range(20):
        text = "".join(f"def g{number}(y):\n    return y * {i * number}\n" for i in range(20))
        (work / "plain" / f"{number}.txt").write_text(text, "utf-8")


def _caches(project: Path, name: str) -> Path:
    """Folder in which a command has run, made once."""
    folder = project.parent / "caches" / name
    if not folder.is_dir():
        scratch = folder.with_name(f"{name}.part")
        shutil.rmtree(scratch, ignore_errors=True)

        def prepare(work: Path) -> list[str]:
            _with_plain(project, work)
            return _CACHES[name]

        ending = run(Attempt("", prepare, timeout_s=300.0), scratch)
        if ending.code != 0:
            raise AssertionError(ending.errors[-2000:])
        (scratch / "work").rename(folder)
    return folder


def _loss(folder: Path) -> Any:
    values = json.loads((folder / "runs" / "models" / "again" / "result.json").read_text("utf-8"))
    return values["before"], values["after"]


def _typed_changes(path: Path, random: Random) -> Iterator[tuple[str, bytes]]:
    """Arrays of other types, shapes and values."""
    if path.suffix == ".npy":
        array = np.load(path)
        for other in (
            *(array.astype(kind) for kind in ("int64", "float32", "bool", "<U3", "uint8", ">u2")),
            *(array[None], array[:0], array[:1], array[::-1], array * 0 + 65535, array[5]),
        ):
            file = BytesIO()
            np.save(file, other)
            yield f"{other.dtype} {other.shape} {other.flat[:2]}", file.getvalue()
        file = BytesIO()
        np.save(file, np.array([{"a": 1}]), allow_pickle=True)
        yield "objects", file.getvalue()
        file = BytesIO()
        np.savez(file, array)
        yield "an archive", file.getvalue()
        return
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    yield "no metadata", save(tensors)
    yield "other metadata", save(tensors, {"format": "pt", "importance": "5"})
    yield "no tensors", save({}, about)
    for name, tensor in tensors.items():
        for kind in ("int8", "int64", "float16", "float32", "bool", "complex64"):
            yield f"{name} {kind}", save({**tensors, name: tensor.to(getattr(torch, kind))}, about)
        changed = {
            "flat": tensor.reshape(-1),
            "of 3 dimensions": tensor[None, None],
            "empty": tensor[:0].clone(),
            "short": tensor[:-1].clone(),
            "reversed": tensor.flip(0),
            "zeros": torch.zeros_like(tensor),
            "a scalar": torch.tensor(1.0),
        }
        if tensor.is_floating_point():
            changed |= {str(v): torch.full_like(tensor, v) for v in (float("nan"), float("inf"))}
        else:
            changed["negative"] = -tensor
        for what, new in changed.items():
            yield f"{name} {what}", save({**tensors, name: new.contiguous()}, about)
        yield f"no {name}", save({k: v for k, v in tensors.items() if k != name}, about)
        yield f"more than {name}", save({**tensors, "more": tensor.clone()}, about)


def _changes(path: Path, random: Random) -> Iterator[tuple[str, bytes | None]]:
    content = path.read_bytes()
    typed = list(_typed_changes(path, random)) if path.suffix in {".npy", ".safetensors"} else []
    if path.suffix == ".json":
        changes = json_changes(json.loads(content), random)
        typed = [(what, to_json(values)) for what, values in changes]
    random.shuffle(typed)
    damaged = byte_changes(content, random)
    for what, new in typed:
        yield what, new
        yield next(damaged)
    yield from damaged


def attempts_caches(random: Random, project: Path) -> Iterator[Attempt]:
    """Prepared shards and caches; a command that goes on must come to the same result."""
    streams = []
    for name in _CACHES:
        folder = _caches(project, name)
        for path in sorted([*folder.glob("shards/*"), *folder.glob("runs/*/**/*")]):
            file = path.relative_to(folder)
            ours = file.parts[0] != "shards" or name == "teacher"
            if path.is_file() and ours and file.parts[1] not in {"models", "conf", "crash"}:
                streams.append((name, folder, file, _changes(path, random)))
    while True:
        name, folder, file, changes = random.choice(streams)
        what, content = next(changes)

        def prepare(
            work: Path, name: str = name, folder: Path = folder, file: Path = file,
            content: bytes | None = content,
        ) -> list[str]:  # fmt: skip
            _with_plain(project, work)
            shutil.copytree(folder / "runs", work / "runs")
            shutil.rmtree(work / "runs" / "models")
            write_changed(work / file, content)
            return _CACHES[name]

        def same(work: Path, output: str, folder: Path = folder) -> bool:
            return _loss(work) == _loss(folder)

        yield Attempt(f"{name} {file}: {what}", prepare, same, timeout_s=120.0)


KINDS = {"caches": attempts_caches}
"""All kinds of attempts, by name."""
