"""Files that flash itself has written, damaged, and the commands that read them."""

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

from tests.fuzz.attempt import Attempt
from tests.fuzz.base import EXPORT, FORMATS
from tests.fuzz.mutate import byte_changes, json_changes, to_json, write_changed
from tests.fuzz.settings import link_inputs

_REPORT = ["report"]
_TRAIN = ["train", "experiment=small", "+arch=small", "recipe.kd_top_k=4", "name=small"]
_SEARCH = ["search", "experiment=small"]
_READERS = {
    "studies/small/frontier.json": [_REPORT, EXPORT, _SEARCH],
    "studies/small/winners": [_REPORT, _SEARCH],
    "models/small/result.json": [_REPORT, _TRAIN, EXPORT],
    "exports/small-small/export.json": [_REPORT, EXPORT],
    "exports/small-small/gate.json": [_REPORT, EXPORT],
    **{f"exports/small-small/{name}.json": [_REPORT, EXPORT] for name in FORMATS[1:]},
    "models/small/checkpoint/config.json": [_REPORT, EXPORT],
    "models/small/checkpoint/tokenizer_config.json": [EXPORT],
}
"""JSON files below `runs`, and commands that read them."""


def _attempt(
    project: Path, file: str, what: str, content: bytes | None, arguments: list[str]
) -> Attempt:
    def prepare(work: Path) -> list[str]:
        link_inputs(project, work)
        shutil.copytree(project / "runs", work / "runs")
        write_changed(work / "runs" / file, content)
        return arguments

    return Attempt(f"{arguments[0]}: {file}: {what}", prepare, timeout_s=240.0)


def attempts_results(random: Random, project: Path) -> Iterator[Attempt]:
    """Results with changed bytes and values."""
    contents = {file: (project / "runs" / file).read_bytes() for file in _READERS}
    streams = {file: byte_changes(content, random) for file, content in contents.items()}
    values = {
        file: json_changes(json.loads(content), random)
        for file, content in contents.items()
        if file.endswith(".json")
    }
    while True:
        file = random.choice(list(_READERS))
        arguments = random.choice(_READERS[file])
        found = next(values[file], None) if file in values and random.random() < 0.75 else None
        if found is not None:
            what, content = found[0], to_json(found[1])
        else:
            what, content = next(streams[file])
        yield _attempt(project, file, what, content, arguments)


def attempts_store(random: Random, project: Path) -> Iterator[Attempt]:
    """Rows of the measurement store."""
    file = "measurements.jsonl"
    lines = (project / "runs" / file).read_bytes().splitlines(keepends=True)
    rows = {number: json_changes(json.loads(line), random) for number, line in enumerate(lines)}
    commands = [["measurements", "export", "made.csv"], _SEARCH]
    for what, content in islice(byte_changes(b"".join(lines), random), 60):
        yield _attempt(project, file, what, content, random.choice(commands))
    while rows:
        number = random.choice(list(rows))
        found = next(rows[number], None)
        if found is None:
            del rows[number]
            continue
        content = b"".join([*lines[:number], to_json(found[1]) + b"\n", *lines[number + 1 :]])
        what = f"line {number + 1}: {found[0]}"
        yield _attempt(project, file, what, content, random.choice(commands))


def attempts_databases(random: Random, project: Path) -> Iterator[Attempt]:
    """Databases of studies with changed bytes."""
    file = "studies/small/study.db"
    for what, content in byte_changes((project / "runs" / file).read_bytes(), random):
        yield _attempt(project, file, what, content, _SEARCH)


KINDS = {
    "results": attempts_results,
    "store": attempts_store,
    "databases": attempts_databases,
}
