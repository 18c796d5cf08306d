"""Store of measured latencies: an append-only JSON-lines file, so that none is measured twice.

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
from flash.device.workload import Phase
from flash.errors import InputError, is_number, require, under
from flash.records import JsonLines, digest, locked, parse_json, write_text

SCHEMA_VERSION = 2
"""Version of the rows. Raise it when a field of `StoredLatency` changes its meaning."""

logger = logging.getLogger(__name__)


class SubjectKind(Enum):
    """Kind of a measured subject."""

    model = "model"
    """Whole decoder; the subject is `ArchSpec.to_dict()`."""
    block = "block"
    """One part of a decoder; the subject is its `kind` and `spec`."""
    stock = "stock"
    """Stock baseline of ExecuTorch's `export_llm`; the subject is `StockModel.to_dict()`."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Everything besides the subject that a latency depends on, as plain JSON values.

    Attributes:
        point: Phase, number of tokens, and the settings of the workload that affect this latency.
        protocol: Timing protocol: processes, warm-ups, runs. It is part of the key, so that a quick
            measurement is not mistaken for a careful one.
        lowering: Weight and cache formats, chunk and context lengths.
        runtime: Name and version of the package that wrote the program.
        device: Identity of the device, with everything that changes its speed (threads, affinity).
    """

    point: dict[str, Any]
    protocol: dict[str, Any]
    lowering: dict[str, Any]
    runtime: str
    device: dict[str, Any]

    def key(self, kind: SubjectKind, subject: dict[str, Any]) -> str:
        """Return the hash under which the store keeps measurements of `subject`."""
        everything = {"kind": kind.value, "subject": subject, **asdict(self)}
        return digest(everything, 32, compact=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class StoredLatency:
    """One latency of one subject.

    Attributes:
        kind: Kind of the subject.
        subject: Plain values of the subject; see `SubjectKind`.
        conditions: Conditions of the measurement.
        result: `ms` and its standard error `se_ms`; `samples`, the raw times of each process;
            `conditions` of each process, with `reference_ms` of the reference program in the same
            process; `reference`, the key of that program, or None; the number of `rejected`
            processes; `load_ms`, `peak_rss_mib`, `model_rss_mib`; `lower_s`, the time of the
            lowering [s].
        attempt: Number of the measurement among those with the same key, from 1; set by the store.
        time_utc: Time at which it was stored, in ISO 8601.
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
        """Architecture of the subject; for a block, of its one layer. Not for stock models.

        Raises:
            InputError: The stored values are illegal.
        """
        values = self.subject if self.kind is SubjectKind.model else self.subject["spec"]
        with under(f"measurement {self.key}: subject"):
            return ArchSpec.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in a line of the store."""
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
    """Store of the measurements of all devices, in one JSON-lines file.

    A row is on disk when `append` returns. No row is replaced: another row with the same key is a
    further attempt. If two lines of the file have the same key and attempt, the first is used.

    Args:
        path: The file; it and its folder are created by the first `append`.

    Raises:
        InputError: The file has another schema version, or is not a measurement store.
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
        """Return all measurements with this key, first to last; most keys have none or one."""
        return tuple(self._rows.get(key, ()))

    def append(self, row: StoredLatency) -> StoredLatency:
        """Append one measurement to the file, as the next attempt of its key.

        Returns:
            The row with its attempt number.
        """
        numbered = row

        def values() -> dict[str, Any]:
            nonlocal numbered
            earlier = self.attempts(row.key)  # includes those of other processes
            numbered = dataclasses.replace(row, attempt=earlier[-1].attempt + 1 if earlier else 1)
            return numbered.to_dict()

        self._file.append(values)
        return numbered

    def refresh(self) -> None:
        """Read the rows that other processes have appended since the last read."""
        self._file.refresh()

    def merge(self, other: "MeasurementStore") -> int:
        """Add the measurements of another store and return the number of new ones.

        Measurements of both stores with the same key become attempts of it, this store's first.
        """
        added = 0
        for row in other:
            if not any(mine.result == row.result for mine in self.attempts(row.key)):
                self.append(row)
                added += 1
        return added

    def write_csv(self, path: Path) -> int:
        """Write all measurements as CSV, one row each, and return their number."""
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
        """Hold the lock for measuring on `resource`, waiting while another process holds it.

        Processes that share a store can measure on different devices at the same time.
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
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{where}: not a measurement; remove or repair the line") from error
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{where}: schema version {version}: expected {SCHEMA_VERSION}; move the file "
                "away to measure anew, or use the version of flash that wrote it"
            )
        try:
            parse_json(_Row, line)
        except InputError as error:
            raise InputError(f"{where}: {error}; remove or repair the line") from error
        return StoredLatency.from_dict(values)


# Types of a line of the store, as far as they are read.


@dataclass(frozen=True)
class _Run:
    wall_s: float


@dataclass(frozen=True)
class _Process:
    accepted: bool
    runs: list[_Run]


@dataclass(frozen=True)
class _Circumstances:
    reference_ms: float | None = None


@dataclass(frozen=True)
class _Result:
    ms: float
    se_ms: float
    rejected: int
    load_ms: float
    peak_rss_mib: float
    model_rss_mib: float
    samples: list[_Process]
    conditions: list[_Circumstances]
    reference: str | None

    def __post_init__(self) -> None:
        require(is_number(self.ms) and self.ms > 0, "ms", self.ms, "a positive number")
        require(is_number(self.se_ms) and self.se_ms >= 0, "se_ms", self.se_ms, "0 or more")


@dataclass(frozen=True)
class _Point:
    phase: Phase
    tokens: int


@dataclass(frozen=True)
class _Device:
    device: str


@dataclass(frozen=True)
class _Conditions:
    point: _Point
    protocol: dict[str, Any]
    lowering: dict[str, Any]
    runtime: str
    device: _Device


@dataclass(frozen=True)
class _Row:
    kind: SubjectKind
    subject: dict[str, Any]
    conditions: _Conditions
    result: _Result
    attempt: int
    time_utc: str


def _record(row: StoredLatency) -> dict[str, Any]:
    """Return one measurement as values by CSV column."""
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
    """Return the columns of the subject: the spec (of a block's one layer), or a stock name."""
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
