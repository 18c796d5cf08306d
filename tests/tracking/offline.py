"""Reader of the files that W&B leaves offline, which `wandb sync` sends to a server."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

Record: Any = wandb_internal_pb2.Record  # pyright: ignore[reportAttributeAccessIssue]
_BLOCK, _HEADER = 32768, 7
"""Bytes of a block of LevelDB's log format, and of the header of a block or of the file."""


def _records(path: Path) -> Iterator[Any]:
    """Iterate over the records of a .wandb file."""
    data, position, parts = path.read_bytes(), _HEADER, b""
    assert data.startswith(b":W&B")
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _HEADER
        if kind == 0:
            continue
        parts += data[position : position + length]
        position += length
        if kind in {1, 4}:  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


@dataclass
class OfflineRun:
    """Content of a .wandb file.

    Attributes:
        path: The file.
        run: Record of the run: id, name, group, job type, tags.
        config: Settings.
        history: Rows that were logged, without keys of W&B's own.
        summary: Values that were set in the summary by the program itself.
        metrics: Definitions of metrics by name or pattern.
        artifacts: Artifacts that were logged, in order.
        exit_code: Code with which the run ended; None if it did not.
    """

    path: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def used(self) -> list[Any]:
        """Artifacts that the run has read."""
        return [artifact for artifact in self.artifacts if artifact.use_after_commit]

    @property
    def made(self) -> list[Any]:
        """Artifacts that the run has written."""
        return [artifact for artifact in self.artifacts if not artifact.use_after_commit]

    def values(self, key: str) -> list[Any]:
        """Values of a metric over all rows that have it."""
        return [row[key] for row in self.history if key in row]


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_run(path: Path) -> OfflineRun:
    """Read a .wandb file."""
    found = OfflineRun(path)
    for record in _records(path):
        match record.WhichOneof("record_type"):
            case "run":
                found.run = record.run
                found.config = _items(record.run.config.update)
            case "history":
                row = _items(record.history.item)
                found.history.append({k: v for k, v in row.items() if not k.startswith("_")})
            case "summary":
                found.summary |= _items(record.summary.update)
            case "metric":
                name = record.metric.name or record.metric.glob_name
                found.metrics[name] = record.metric
            case "artifact":
                found.artifacts.append(record.artifact)
            case "exit":
                found.exit_code = record.exit.exit_code
    return found


def _read_finished(path: Path) -> OfflineRun:
    """Read a .wandb file once its run has ended; W&B writes the end after `finish` returns."""
    deadline = time.monotonic() + 20
    while (found := read_run(path)).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def read_runs(folder: Path) -> list[OfflineRun]:
    """Read all runs below a folder, in the order in which they began."""
    # Beside them are remains of runs that could not be started online.
    found = [_read_finished(path) for path in folder.rglob("offline-run-*/*.wandb")]
    return sorted(found, key=lambda each: each.run.start_time.ToNanoseconds())
