"""Lowering and measuring what the store lacks, in groups, resumable at any point."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flash.arch import ArchSpec
from flash.device import Device, Program, Workload
from flash.files import atomic_write
from flash.latency.prediction import Values
from flash.latency.settings import LatencySettings, Objective
from flash.latency.store import Conditions, MeasurementStore, Row, SubjectKind
from flash.lowering import Block, LoweringSettings, lower, lower_block
from flash.model import Decoder
from flash.progress import progress_bar

logger = logging.getLogger(__name__)

LOWERING_VERSION = 1
"""To be raised when flash.lowering writes other programs for the same spec and settings, so that
old programs are not taken from the cache nor old latencies from the store."""

PROTOCOL = ("processes", "warmups", "runs")
"""Settings of a device that say how it times."""
RESULT_NAMES = {Objective.prefill: "ttft", Objective.decode: "decode"}
"""What the device calls the latencies."""
_SLOW = 1.15
"""A group whose reference program took this many times the best group's was disturbed: seen on a
busy machine at 2.3, in all processes of the group alike, so that comparing those showed nothing."""
_REFERENCE_NOISE = {Objective.prefill: 1.03, Objective.decode: 1.06}
"""Ratios of two calm measurements of one program that are nothing but noise (three processes)."""
_ATTEMPTS = 3
"""Most measurements of one subject, the disturbed ones counted."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Something to lower and measure: a whole model or one block."""

    spec: ArchSpec | None = None
    block: Block | None = None

    @property
    def kind(self) -> SubjectKind:
        return SubjectKind.model if self.block is None else SubjectKind.block

    def to_dict(self) -> dict[str, Any]:
        """Plain values; equal for subjects that have the same program."""
        if self.block is not None:
            return {"kind": self.block.kind.value, "spec": self.block.spec.to_dict()}
        assert self.spec is not None
        return self.spec.to_dict()

    def lower(self, settings: LoweringSettings) -> bytes:
        """The program, with random weights: they do not change its latency."""
        if self.block is not None:
            return lower_block(self.block, settings)
        assert self.spec is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return lower(Decoder(self.spec), settings)

    def program(self, path: Path) -> Program:
        """How the device is told of it."""
        if self.block is None:
            assert self.spec is not None
            return Program(name=str(self), path=path, vocab_size=self.spec.vocab_size)
        if self.block.takes_tokens:
            return Program(name=str(self), path=path, vocab_size=self.block.spec.vocab_size)
        return Program(name=str(self), path=path, model_dim=self.block.spec.model_dim)

    def __str__(self) -> str:
        return str(self.spec if self.block is None else self.block)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measures subjects on one device under one workload; what is measured is in the store."""

    reference: Subject  # takes turns with every group, so that groups can be compared
    conditions: Conditions
    device: Device
    workload: Workload
    lowering: LoweringSettings
    settings: LatencySettings
    store: MeasurementStore
    cache_dir: Path

    def key(self, subject: Subject) -> str:
        """Key of the subject's measurements in the store."""
        return self.conditions.key(subject.kind, subject.to_dict())

    def rows(self, subjects: Iterable[Subject]) -> list[Row]:
        """The measurements that count, one for each: of several attempts the least disturbed."""
        rows = [self._calmest(self.key(subject)) for subject in subjects]
        assert None not in rows, "measure_missing comes first"
        return [row for row in rows if row is not None]

    def measure_missing(self, subjects: Sequence[Subject]) -> None:
        """Lower and measure, in groups, what the store lacks; repeat what was disturbed."""
        by_key = {self.key(subject): subject for subject in subjects}
        if not self._due(by_key):
            return
        with self.store.exclusive():
            for attempt in range(_ATTEMPTS):
                due = [by_key[key] for key in self._due(by_key)]
                if not due:
                    return
                self._announce(due, len(by_key), repeated=attempt > 0)
                self._measure(due)
            slow = self._disturbed(by_key)
        if slow:
            logger.warning(
                "latency: the device was busy during %d of %d measurements, %d attempts each; "
                "their latencies are likely too high",
                len(slow),
                len(by_key),
                _ATTEMPTS,
            )

    def _announce(self, due: Sequence[Subject], num_all: int, *, repeated: bool) -> None:
        num_blocks = sum(subject.kind is SubjectKind.block for subject in due)
        logger.info(
            "latency: %d blocks and %d whole models to measure%s, %d are in the store",
            num_blocks,
            len(due) - num_blocks,
            " again, as the device was busy" if repeated else "",
            num_all - len(due),
        )

    def _due(self, keys: Iterable[str]) -> list[str]:
        """Keys to measure: missing, or disturbed with attempts left."""
        keys = list(keys)
        disturbed = set(self._disturbed(keys))

        def due(key: str) -> bool:
            num = len(self._attempts(key))
            return num == 0 or (key in disturbed and num < _ATTEMPTS)

        return [key for key in keys if due(key)]

    def _disturbed(self, keys: Iterable[str]) -> list[str]:
        """Keys of measurements during which the reference was clearly slower than in the best."""
        rows = {key: row for key in keys if (row := self._calmest(key)) is not None}
        slow: set[str] = set()
        for name in RESULT_NAMES.values():
            times = {key: _reference_ms(row, name) for key, row in rows.items()}
            best = min(times.values(), default=0.0)
            slow |= {key for key, time in times.items() if time > _SLOW * best}
        return [key for key in rows if key in slow]

    def _calmest(self, key: str) -> Row | None:
        rows = self._attempts(key)
        return min(rows, key=lambda row: _reference_ms(row, "ttft"), default=None)

    def _attempts(self, key: str) -> list[Row]:
        """Measurements beside this reference; others, as an export makes, tell nothing of drift."""
        reference = self.key(self.reference)
        rows = self.store.attempts(key)
        return [row for row in rows if row.result.get("reference") == reference]

    def _measure(self, due: Sequence[Subject]) -> None:
        size = self.settings.group_size
        with progress_bar("latency programs", len(due), unit="program") as bar:
            for start in range(0, len(due), size):
                self._measure_group(due[start : start + size], bar)

    def _measure_group(self, group: Sequence[Subject], bar: tqdm) -> None:
        """Measure and store; the reference program takes turns with those of the group."""
        paths = []
        for subject in group:
            paths.append(self._lowered(subject, bar))
            bar.update()
        reference_path = self._lowered(self.reference, bar)
        bar.set_postfix_str("measuring")
        measured = self.device.measure(
            [subject.program(path) for subject, path in zip(group, paths, strict=True)],
            self.workload,
            dataclasses.replace(self.reference.program(reference_path), name="reference"),
            lambda done, total: bar.set_postfix_str(f"measuring, process {done} of {total}"),
        )
        for subject, measurement in zip(group, measured, strict=True):
            self._store(subject, measurement.to_dict())
        if not self.settings.keep_programs:
            for path in {*paths} - {reference_path}:
                path.unlink()

    def _store(self, subject: Subject, result: dict[str, Any]) -> None:
        earlier = self.store.get(self.key(subject))
        row = Row(
            kind=subject.kind,
            subject=subject.to_dict(),
            conditions=self.conditions,
            result={**result, "reference": self.key(self.reference)},
            attempt=1 if earlier is None else earlier.attempt + 1,
        )
        self.store.append(row)

    def _lowered(self, subject: Subject, bar: tqdm) -> Path:
        """Path of the subject's program, lowered unless it is cached."""
        conditions = self.conditions
        content = [subject.kind.value, subject.to_dict(), conditions.lowering, conditions.runtime]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
        path = self.cache_dir / f"{subject.kind.value}-{digest}.pte"
        if not path.exists():
            bar.set_postfix_str(f"lowering {subject}")
            data = subject.lower(self.lowering)
            with atomic_write(path) as file:
                file.write(data)
        return path


def comparable(rows: Sequence[Row], phase: Objective) -> tuple[Values, Values]:
    """Latencies and their standard errors [ms], freed from slow drift of the device.

    Groups are minutes apart, and on a shared machine one may run 15 % slower than another. Each is
    divided by how much slower its reference program was than in the best group, beyond the noise
    of the reference itself. The rows keep the raw values.
    """
    name = RESULT_NAMES[phase]
    reference = np.array([_reference_ms(row, name) for row in rows])
    drift = np.maximum(1.0, reference / (_REFERENCE_NOISE[phase] * reference.min()))
    values = np.array([row.result[f"{name}_ms"] for row in rows], dtype=float)
    errors = np.array([row.result[f"{name}_se_ms"] for row in rows], dtype=float)
    return values / drift, errors / drift


def _reference_ms(row: Row, name: str) -> float:
    """Latency of the reference program while the row's subject was measured [ms]."""
    return min(each[f"reference_{name}_ms"] for each in row.result["conditions"])


def plain(settings: LoweringSettings) -> dict[str, Any]:
    """The settings as JSON values, with the version of the programs."""
    values = {
        key: value.value if isinstance(value, Enum) else value
        for key, value in dataclasses.asdict(settings).items()
    }
    return {"version": LOWERING_VERSION, **values}
