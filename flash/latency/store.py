"""Measurements are data: an append-only file with one line for each, never taken twice.

`flash measurements` writes a store as CSV and merges two stores.
"""

import csv
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec
from flash.errors import InputError, under
from flash.files import write_text

SCHEMA_VERSION = 2
"""Raised whenever a field of `StoredLatency` changes its meaning; other versions are refused."""

logger = logging.getLogger(__name__)


class SubjectKind(Enum):
    """What was measured."""

    model = "model"
    """A whole decoder; the subject is `ArchSpec.to_dict()`."""
    block = "block"
    """One part of a decoder; the subject is the block's own dict."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a latency depends on beside the subject; plain JSON values only.

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
        text = json.dumps(everything, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class StoredLatency:
    """One latency of one subject.

    Attributes:
        kind: Whole model or block.
        subject: Spec of the model or of the block.
        conditions: What the subject was measured under.
        result: `ms` and its standard error `se_ms`; `samples`, the raw times of each process;
            `conditions` of each process, with `reference_ms` of the program that took turns with
            the subject; `reference`, the key of that program; `rejected` processes; `load_ms`,
            `peak_rss_mib`, `model_rss_mib`; `lower_s`, which the program took to lower.
        attempt: 1, or more for a repetition.
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
        """Architecture of the subject; for a block, that of its one layer.

        Raises:
            InputError: The stored values are illegal.
        """
        values = self.subject if self.kind is SubjectKind.model else self.subject["spec"]
        with under(f"measurement {self.key}: subject"):
            return ArchSpec.from_dict(values)

    def to_json(self) -> str:
        """One line of JSON, without the line's end."""
        values = {"schema": SCHEMA_VERSION, "key": self.key, **asdict(self)}
        return json.dumps(values | {"kind": self.kind.value}, separators=(",", ":"))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StoredLatency":
        """Inverse of `to_json` once parsed; `schema` and `key` are ignored."""
        known = {f.name: values[f.name] for f in fields(cls)}
        known["kind"] = SubjectKind(values["kind"])
        known["conditions"] = Conditions(**values["conditions"])
        return cls(**known)


class MeasurementStore:
    """Every measurement of every device, in one JSON-lines file.

    A line is on disk when `append` returns. A line that a kill tore is dropped when the file is
    read and overwritten by the next `append`. Of rows with one key and attempt the first counts.

    Args:
        path: The file; it and its folder are created by the first `append`.

    Raises:
        InputError: The file belongs to another schema version, or is no measurement store.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._rows: dict[str, list[StoredLatency]] = {}  # attempts, in order
        self._end = 0  # bytes that have been read, always whole lines
        self._lines = 0
        self.refresh()

    def __len__(self) -> int:
        return sum(len(attempts) for attempts in self._rows.values())

    def __iter__(self) -> Iterator[StoredLatency]:
        return itertools.chain.from_iterable(self._rows.values())

    def get(self, key: str) -> StoredLatency | None:
        """The last measurement with this key, or None."""
        attempts = self._rows.get(key)
        return attempts[-1] if attempts else None

    def attempts(self, key: str) -> tuple[StoredLatency, ...]:
        """All measurements with this key, nearly always none or one, first to last."""
        return tuple(self._rows.get(key, ()))

    def append(self, row: StoredLatency) -> bool:
        """Write one measurement to disk.

        Returns False, writing nothing, if its key is there with this attempt or a later one.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.refresh()  # another process may have appended
            last = self.get(row.key)
            if last is not None and last.attempt >= row.attempt:
                return False
            file.truncate(self._end)  # what a kill left of a torn line
            line = row.to_json().encode() + b"\n"
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._keep(row)
            self._end += len(line)
            self._lines += 1
        return True

    def refresh(self) -> None:
        """Read what other processes have appended since."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._end)
            text = file.read()
        whole, _, torn = text.rpartition(b"\n")
        for line in whole.splitlines():
            self._lines += 1
            self._keep(self._parse(line))
        if torn:
            logger.warning(
                "%s: dropped a torn last line of %d bytes (a measurement that was being written "
                "when its process was killed)",
                self.path,
                len(torn),
            )
        self._end += len(text) - len(torn)

    def merge(self, other: "MeasurementStore") -> int:
        """Take over the measurements of another store; returns how many were new.

        What both measured under one key stays as attempts of it, in the order of arrival.
        """
        added = 0
        for row in other:
            known = self.attempts(row.key)
            if not any(mine.result == row.result for mine in known):
                added += self.append(dataclasses.replace(row, attempt=len(known) + 1))
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f"{self.path.name}.{resource}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning(
                    "%s: waiting for another process that is measuring on %s", self.path, resource
                )
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.refresh()
            yield

    def _keep(self, row: StoredLatency) -> None:
        attempts = self._rows.setdefault(row.key, [])
        if not attempts or attempts[-1].attempt < row.attempt:
            attempts.append(row)

    def _parse(self, line: bytes) -> StoredLatency:
        where = f"measurement store {self.path}, line {self._lines}"
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
    """One measurement as columns; a block has the spec of its one layer."""
    subject = row.subject if row.kind is SubjectKind.model else row.subject["spec"]
    spec = row.spec
    conditions = row.conditions
    return {
        "key": row.key,
        "attempt": row.attempt,
        "time_utc": row.time_utc,
        "kind": row.kind.value if row.kind is SubjectKind.model else row.subject["kind"],
        "num_layers": spec.num_layers,
        "pattern": spec.pattern,
        **{name: value for name, value in subject.items() if name != "layer_types"},
        **conditions.point,
        **{name: row.result[name] for name in ("ms", "se_ms", "rejected", "peak_rss_mib")},
        **{f"protocol_{name}": value for name, value in conditions.protocol.items()},
        **{f"lowering_{name}": value for name, value in conditions.lowering.items()},
        "runtime": conditions.runtime,
        **{f"device_{name}": value for name, value in conditions.device.items()},
    }
