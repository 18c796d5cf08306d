"""Measurements are data: an append-only file with one line for each, never taken twice.

`flash measurements` writes a store as CSV and merges two stores.
"""

import csv
import dataclasses
import io
import itertools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec
from flash.errors import InputError, under
from flash.records import JsonLines, digest, locked, write_text

SCHEMA_VERSION = 2
"""Raised whenever a field of `StoredLatency` changes its meaning; other versions are refused."""

logger = logging.getLogger(__name__)


class SubjectKind(Enum):
    """Kind of a measured subject."""

    model = "model"
    """A whole decoder; the subject is `ArchSpec.to_dict()`."""
    block = "block"
    """One part of a decoder; the subject is the block's own dict."""
    stock = "stock"
    """A whole model of ExecuTorch's own export; the subject is `StockModel.to_dict()`."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Everything a latency depends on beside the subject; plain JSON values only.

    Attributes:
        point: Which latency: phase, tokens, and what else it depends on.
        protocol: How it is timed: processes, warm-ups, runs. In the key, so that a quick look does
            not pass for a careful measurement.
        lowering: Weight and cache formats, chunk and context lengths.
        runtime: Name and version of what executes the program.
        device: Identity of the device, with everything that changes its speed (threads, affinity).
    """

    point: dict[str, Any]
    protocol: dict[str, Any]
    lowering: dict[str, Any]
    runtime: str
    device: dict[str, Any]

    def key(self, kind: SubjectKind, subject: dict[str, Any]) -> str:
        """Hash under which the store keeps the measurement of `subject`."""
        everything = {"kind": kind.value, "subject": subject, **asdict(self)}
        return digest(everything, 32, compact=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class StoredLatency:
    """One latency of one subject.

    Attributes:
        kind: Whole model, block or stock model.
        subject: Its plain values.
        conditions: What the subject was measured under.
        result: `ms` and its standard error `se_ms`; `samples`, the raw times of each process;
            `conditions` of each process, with `reference_ms` of the program that took turns with
            the subject; `reference`, the key of that program, or None; `rejected` processes;
            `load_ms`, `peak_rss_mib`, `model_rss_mib`; `lower_s`, which the program took to lower.
        attempt: 1, or more for a repetition; given by the store.
        time_utc: When it was stored, ISO 8601.
    """

    kind: SubjectKind
    subject: dict[str, Any]
    conditions: Conditions
    result: dict[str, Any]
    attempt: int = 1
    time_utc: str = field(default_factory=_now)

    @property
    def key(self) -> str:
        """Hash of everything that the latency depends on."""
        return self.conditions.key(self.kind, self.subject)

    @property
    def spec(self) -> ArchSpec:
        """Architecture of the subject; for a block, that of its one layer. Stock models have none.

        Raises:
            InputError: The stored values are illegal.
        """
        values = self.subject if self.kind is SubjectKind.model else self.subject["spec"]
        with under(f"measurement {self.key}: subject"):
            return ArchSpec.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a line of the store holds them."""
        values = {"schema": SCHEMA_VERSION, "key": self.key, **asdict(self)}
        return values | {"kind": self.kind.value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StoredLatency":
        """Inverse of `to_dict`; `schema` and `key` are ignored."""
        known = {f.name: values[f.name] for f in fields(cls)}
        known["kind"] = SubjectKind(values["kind"])
        known["conditions"] = Conditions(**values["conditions"])
        return cls(**known)


class MeasurementStore:
    """Every measurement of every device, in one JSON-lines file.

    A row is on disk when `append` returns, and no row is ever dropped: another one under the same
    key is a further attempt. Of rows that carry the same key and attempt in the file the first
    counts.

    Args:
        path: The file; it and its folder are created by the first `append`.

    Raises:
        InputError: The file belongs to another schema version, or is no measurement store.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._rows: dict[str, list[StoredLatency]] = {}  # attempts, in order
        self._file = JsonLines(self.path, self._take)
        self.refresh()

    def __len__(self) -> int:
        return sum(len(attempts) for attempts in self._rows.values())

    def __iter__(self) -> Iterator[StoredLatency]:
        return itertools.chain.from_iterable(self._rows.values())

    def attempts(self, key: str) -> tuple[StoredLatency, ...]:
        """All measurements with this key, nearly always none or one, first to last."""
        return tuple(self._rows.get(key, ()))

    def append(self, row: StoredLatency) -> StoredLatency:
        """Write one measurement to disk, as the next attempt of its key.

        Returns:
            The row with the number of its attempt.
        """
        numbered = row

        def values() -> dict[str, Any]:
            nonlocal numbered
            earlier = self.attempts(row.key)  # of other processes too
            numbered = dataclasses.replace(row, attempt=earlier[-1].attempt + 1 if earlier else 1)
            return numbered.to_dict()

        self._file.append(values)
        return numbered

    def refresh(self) -> None:
        """Read what other processes have appended since."""
        self._file.refresh()

    def merge(self, other: "MeasurementStore") -> int:
        """Take over the measurements of another store; returns how many were new.

        What both measured under one key stays as attempts of it, in the order of arrival.
        """
        added = 0
        for row in other:
            if not any(mine.result == row.result for mine in self.attempts(row.key)):
                self.append(row)
                added += 1
        return added

    def write_csv(self, path: Path) -> int:
        """All measurements as a table, a row each with its standard error; returns their number."""
        records = [_record(row) for row in self]
        columns = list(dict.fromkeys(name for record in records for name in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_text(path, text.getvalue())
        return len(records)

    @contextmanager
    def exclusive(self, resource: str) -> Iterator[None]:
        """Be the only process of this store that measures on `resource`; waits for another one.

        Different devices measure for one store at the same time.
        """
        wait = "%s: waiting for another process that is measuring on %s"
        lock = self.path.with_name(f"{self.path.name}.{resource}.lock")
        with locked(lock, lambda: logger.warning(wait, self.path, resource)):
            self.refresh()
            yield

    def _take(self, number: int, line: bytes) -> None:
        row = self._parse(number, line)
        attempts = self._rows.setdefault(row.key, [])
        if not attempts or attempts[-1].attempt < row.attempt:
            attempts.append(row)

    def _parse(self, number: int, line: bytes) -> StoredLatency:
        where = f"measurement store {self.path}, line {number}"
        try:
            values = json.loads(line)
            version = values["schema"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{where}: not a measurement; remove or repair the line") from error
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{where}: schema version {version}: expected {SCHEMA_VERSION}; move the file "
                "away to measure anew, or use the version of flash that wrote it"
            )
        try:
            return StoredLatency.from_dict(values)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{where}: not a measurement; remove or repair the line") from error


def _record(row: StoredLatency) -> dict[str, Any]:
    """One measurement as columns."""
    conditions = row.conditions
    return {
        "key": row.key,
        "attempt": row.attempt,
        "time_utc": row.time_utc,
        **_described(row),
        **conditions.point,
        **{name: row.result[name] for name in ("ms", "se_ms", "rejected", "peak_rss_mib")},
        **{f"protocol_{name}": value for name, value in conditions.protocol.items()},
        **{f"lowering_{name}": value for name, value in conditions.lowering.items()},
        "runtime": conditions.runtime,
        **{f"device_{name}": value for name, value in conditions.device.items()},
    }


def _described(row: StoredLatency) -> dict[str, Any]:
    """Columns of the subject: a block has the spec of its one layer, a stock model its name."""
    if row.kind is SubjectKind.stock:
        return {"kind": row.kind.value, "stock": row.subject["stock"]}
    whole = row.kind is SubjectKind.model
    subject = row.subject if whole else row.subject["spec"]
    spec = row.spec
    return {
        "kind": row.kind.value if whole else row.subject["kind"],
        "num_layers": spec.num_layers,
        "pattern": spec.pattern,
        **{name: value for name, value in subject.items() if name != "layer_types"},
    }
