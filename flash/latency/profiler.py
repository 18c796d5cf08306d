"""Lowering and measuring what the store lacks, in groups, resumable at any point."""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flash.arch import ArchSpec
from flash.device.base import Device
from flash.device.measurement import Measurement, Program, standard_error
from flash.device.workload import Phase, Point, Workload
from flash.errors import InputError
from flash.files import atomic_write, write_text
from flash.latency.cost_model import Values
from flash.latency.settings import LatencySettings
from flash.latency.store import Conditions, MeasurementStore, StoredLatency, SubjectKind
from flash.lowering.blocks import Block, lower_block
from flash.lowering.lower import lower
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder
from flash.progress import progress_bar

logger = logging.getLogger(__name__)

LOWERING_VERSION = 3
"""To be raised when flash.lowering writes other programs for the same spec and settings, so that
old programs are not taken from the cache nor old latencies from the store."""

RUNTIME = f"executorch {version('executorch')}"
"""What wrote a program; a device's own runtime is part of its identity."""
PROTOCOL = ("processes", "warmups", "runs")
"""Settings of a device that say how it times."""
_SLOW = 1.15
"""A group whose reference program took this many times the best group's was disturbed: seen on a
busy machine at 2.3, in all processes of the group alike, so that comparing those showed nothing."""
_REFERENCE_NOISE = {Phase.prefill: 1.0, Phase.decode: 1.06}
"""Slowness of a reference program that is taken for noise. Of pairs of measurements of whole models
half an hour and more apart (benchmarks/data/flash_space.jsonl, another whole model standing in for
the reference), prefills at 2048 disagreed by 5.4 % as measured, 3.0 % corrected from 1.03 on and
1.9 % corrected in full; decode steps by 1.9 %, 1.5 % corrected from 1.06 on, 3.0 % in full."""
_LEAST_TRANSFERRED = 8
"""Whole models from which a predictor can be fitted that another device may start from."""
_SHARED = 0.25
"""Processor time of others, as a share of the wall time, from which a measurement is in doubt: even
on another core it takes memory bandwidth and shared caches."""
_LOOSER = {Phase.prefill: 1.0, Phase.decode: 2.0}
"""A decode step spreads about twice as much between processes as a prefill does."""


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

    def program(self, path: Path, flush_mib: int) -> Program:
        """How the device is told of it; only blocks need their weights evicted."""
        name = str(self)
        if self.block is None:
            assert self.spec is not None
            return Program(name=name, path=path, vocab_size=self.spec.vocab_size)
        spec = self.block.spec
        if self.block.takes_tokens:
            return Program(name=name, path=path, vocab_size=spec.vocab_size, flush_mib=flush_mib)
        return Program(name=name, path=path, model_dim=spec.model_dim, flush_mib=flush_mib)

    def __str__(self) -> str:
        return str(self.spec if self.block is None else self.block)


@dataclass(frozen=True, kw_only=True)
class Profiler:
    """Measures subjects on one device under one workload; what is measured is in the store.

    Attributes:
        reference: Takes turns with every group, so that groups can be compared. About as
            long-running as a model: a short program finds calm moments in spells in which a long
            one runs a tenth slower.
        flush_mib: Memory walked through between the calls of a block [MiB]; see `Program`.
        device: Runs the programs.
        workload: What is timed.
        lowering: How subjects become programs.
        settings: Sizes of groups.
        store: Measurements so far; grows.
        cache_dir: Folder for lowered programs.
    """

    reference: Subject
    flush_mib: int
    device: Device
    workload: Workload
    lowering: LoweringSettings
    settings: LatencySettings
    store: MeasurementStore
    cache_dir: Path

    def key(self, subject: Subject, point: Point) -> str:
        """Key of the subject's measurements in the store."""
        return self._conditions(subject, point).key(subject.kind, subject.to_dict())

    def attempts(self, subject: Subject, point: Point) -> list[StoredLatency]:
        """Measurements of a subject that count: those beside our reference.

        Others, as an export makes, tell nothing of drift.
        """
        rows = self.store.attempts(self.key(subject, point))
        return [row for row in rows if row.result["reference"] == self._reference_key]

    def known_models(self) -> list[ArchSpec]:
        """Whole models that the store holds at the first point, measured beside our reference."""
        wanted = self._base(self.workload.points[0])
        found = (row.spec for row in self._comparable_models() if row.conditions == wanted)
        return list(dict.fromkeys(found))

    def attempts_of(self, device: str, point: Point) -> list[list[StoredLatency]]:
        """Measurements of each whole model at this point on another device of the store.

        Raises:
            InputError: There are none of the same programs.
        """
        wanted = self._base(point)
        found: dict[str, list[StoredLatency]] = {}
        for row in self._comparable_models():
            theirs = row.conditions
            same = (theirs.point, theirs.lowering) == (wanted.point, wanted.lowering)
            if same and theirs.device["device"] == device:
                found.setdefault(row.key, []).append(row)
        if len(found) < _LEAST_TRANSFERRED:
            devices = sorted({str(row.conditions.device["device"]) for row in self.store})
            raise InputError(
                f"latency.transfer_from={device}: expected a device with at least "
                f"{_LEAST_TRANSFERRED} whole models of {point} and this lowering in "
                f"{self.store.path}, found {len(found)}; it holds {', '.join(devices) or 'none'}"
            )
        return list(found.values())

    def _comparable_models(self) -> Iterable[StoredLatency]:
        return (
            row
            for row in self.store
            if row.kind is SubjectKind.model and row.result["reference"] == self._reference_key
        )

    def measure_missing(self, subjects: Sequence[Subject]) -> None:
        """Lower and measure, in groups, what the store lacks; repeat what is not precise yet."""
        if not self._due(subjects):
            return
        with self.store.exclusive(self.device.resource):
            repeated = False
            while due := self._due(subjects):  # ends: attempts at each are limited
                self._announce(due, len(subjects), repeated=repeated)
                self._measure(due)
                repeated = True
            poor = sum(len(self._poor(subjects, point)) for point in self.workload.points)
        if poor:
            logger.warning(
                "latency: the device was busy during %d of %d measurements, %d attempts each; "
                "their latencies are likely too high",
                poor,
                len(subjects) * len(self.workload.points),
                self.settings.attempts,
            )

    def lower_missing(self, subjects: Sequence[Subject]) -> None:
        """Lower what the cache lacks, and the reference: measuring then only measures."""
        with progress_bar("latency programs", len(subjects) + 1, unit="program") as bar:
            for subject in [*subjects, self.reference]:
                self._lowered(subject, bar)
                bar.update()

    def _conditions(self, subject: Subject, point: Point) -> Conditions:
        flush_mib = self.flush_mib if subject.kind is SubjectKind.block else 0
        return self._base(point, flush_mib)

    def _base(self, point: Point, flush_mib: int = 0) -> Conditions:
        return conditions_of(self.device, self.workload, point, self.lowering, flush_mib)

    def _announce(self, due: Iterable[Subject], num_all: int, *, repeated: bool) -> None:
        kinds = [subject.kind for subject in due]
        num_blocks = kinds.count(SubjectKind.block)
        logger.info(
            "latency: %d blocks and %d whole models to measure%s, %d are in the store",
            num_blocks,
            len(kinds) - num_blocks,
            " again, as they are not precise yet" if repeated else "",
            num_all - len(kinds),
        )

    def _due(self, subjects: Iterable[Subject]) -> dict[Subject, tuple[Point, ...]]:
        """What to measure: missing, or not precise yet with attempts left."""
        due: dict[Subject, tuple[Point, ...]] = {}
        subjects = list(dict.fromkeys(subjects))
        for point in self.workload.points:
            poor = self._poor(subjects, point)
            for subject in subjects:
                num = len(self.attempts(subject, point))
                if num == 0 or (subject in poor and num < self.settings.attempts):
                    due[subject] = (*due.get(subject, ()), point)
        return {subject: due[subject] for subject in subjects if subject in due}

    def _poor(self, subjects: Iterable[Subject], point: Point) -> set[Subject]:
        """Subjects whose latency is not known as well as it should be.

        Its standard error is too large, or the reference program was clearly slower than at best
        in every attempt, which no comparison of processes within an attempt would show.
        """
        attempts = {
            subject: rows for subject in subjects if (rows := self.attempts(subject, point))
        }
        if not attempts:
            return set()
        values, errors = comparable(list(attempts.values()), point.phase)
        calmest = {s: min(map(_reference_ms, rows)) for s, rows in attempts.items()}
        best = min(calmest.values())
        most = _LOOSER[point.phase] * self.settings.precision_pct / 100
        return {
            subject
            for subject, imprecise in zip(attempts, errors > most * values, strict=True)
            if imprecise or calmest[subject] > _SLOW * best
        }

    @cached_property
    def _reference_key(self) -> str:
        values = [self.reference.kind.value, self.reference.to_dict()]
        return _digest(values)

    def _measure(self, due: Mapping[Subject, tuple[Point, ...]]) -> None:
        size = self.settings.group_size
        with progress_bar("latency programs", len(due), unit="program") as bar:
            for points in dict.fromkeys(due.values()):
                alike = [subject for subject in due if due[subject] == points]
                for start in range(0, len(alike), size):
                    self._measure_group(alike[start : start + size], points, bar)

    def _measure_group(
        self, group: Sequence[Subject], points: tuple[Point, ...], bar: tqdm
    ) -> None:
        """Measure and store; the reference program takes turns with those of the group."""
        paths = []
        for subject in group:
            paths.append(self._lowered(subject, bar))
            bar.update()
        reference_path = self._lowered(self.reference, bar)
        bar.set_postfix_str("measuring")
        flush_mib = self.flush_mib
        measured = self.device.measure(
            [subject.program(path, flush_mib) for subject, path in zip(group, paths, strict=True)],
            self.workload.only(points),
            dataclasses.replace(self.reference.program(reference_path, 0), name="reference"),
            lambda done, total: bar.set_postfix_str(f"measuring, process {done} of {total}"),
        )
        _warn_if_shared(measured[0])
        for subject, path, measurement in zip(group, paths, measured, strict=True):
            for point in points:
                self._store(subject, point, measurement, lower_s(path))
        if not self.settings.keep_programs:
            for path in {*paths} - {reference_path}:
                path.unlink()

    def _store(self, subject: Subject, point: Point, measured: Measurement, lower_s: float) -> None:
        earlier = self.store.get(self.key(subject, point))
        row = StoredLatency(
            kind=subject.kind,
            subject=subject.to_dict(),
            conditions=self._conditions(subject, point),
            result={
                **of_point(measured, point),
                "reference": self._reference_key,
                "lower_s": lower_s,
            },
            attempt=1 if earlier is None else earlier.attempt + 1,
        )
        self.store.append(row)

    def _lowered(self, subject: Subject, bar: tqdm) -> Path:
        """Path of the subject's program, lowered unless it is cached."""
        path = self.cache_dir / f"{subject.kind.value}-{program_digest(subject, self.lowering)}.pte"
        if not path.exists():
            bar.set_postfix_str(f"lowering {subject}")
            started = time.perf_counter()
            data = subject.lower(self.lowering)
            took = time.perf_counter() - started
            write_text(_timing(path), json.dumps({"lower_s": round(took, 2)}) + "\n")
            with atomic_write(path) as file:
                file.write(data)
        return path


def _warn_if_shared(measured: Measurement) -> None:
    """Say so if other work ran meanwhile, which neither precision nor the reference would show."""
    shares = [
        each["process"].get("others_s", 0.0) / each["process"]["wall_s"]
        for each in measured.conditions
    ]
    if min(shares) > _SHARED:
        logger.warning(
            "latency: other work kept %.0f %% of a processor busy throughout; latencies are likely "
            "too high: measure on a quiet device",
            100 * min(shares),
        )


def program_digest(subject: Subject, lowering: LoweringSettings) -> str:
    """Content hash of a program: what it was lowered from and by."""
    return _digest([subject.kind.value, subject.to_dict(), plain(lowering), RUNTIME])


def lower_s(path: Path) -> float:
    """How long the program took to lower [s]."""
    return float(json.loads(_timing(path).read_text(encoding="utf-8"))["lower_s"])


def _timing(path: Path) -> Path:
    return path.with_suffix(".json")


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


def conditions_of(
    device: Device,
    workload: Workload,
    point: Point,
    lowering: LoweringSettings,
    flush_mib: int = 0,
) -> Conditions:
    """What a latency on this device depends on, as the store keys it."""
    timed: dict[str, Any] = {"phase": point.phase.value, "tokens": point.tokens}
    if point.phase is Phase.prefill:
        timed["prefill_chunk"] = lowering.chunk
    else:
        timed["decode_tokens"] = workload.decode_tokens
    if flush_mib:
        timed["flush_mib"] = flush_mib
    return Conditions(
        point=timed,
        protocol={name: getattr(device.settings, name) for name in PROTOCOL},
        lowering=plain(lowering),
        runtime=RUNTIME,
        device=device.identity(),
    )


def of_point(measured: Measurement, point: Point) -> dict[str, Any]:
    """The part of a measurement that a row keeps of one point."""
    latency = measured.latencies[point.name]
    conditions = [dict(each) for each in measured.conditions]
    for each in conditions:
        if "reference_ms" in each:
            each["reference_ms"] = each["reference_ms"][point.name]
    return {
        "ms": latency.ms,
        "se_ms": latency.se_ms,
        "rejected": measured.rejected,
        "load_ms": measured.load_ms,
        "peak_rss_mib": measured.peak_rss_mib,
        "model_rss_mib": measured.model_rss_mib,
        "samples": [
            {"accepted": each["accepted"], "runs": each[point.name]} for each in measured.samples
        ],
        "conditions": conditions,
    }


def comparable(attempts: Sequence[Sequence[StoredLatency]], phase: Phase) -> tuple[Values, Values]:
    """Latencies of subjects and their standard errors [ms], freed from slow drift of the device.

    The processes of all attempts at a subject count as one measurement. Attempts are minutes apart,
    and on a shared machine one may run 15 % slower than another: each is divided by how much slower
    its reference program was than in the best attempt at any subject, beyond the noise of the
    reference itself. The rows keep the raw values.
    """
    best = min(_reference_ms(row) for rows in attempts for row in rows)
    limit = _REFERENCE_NOISE[phase] * best
    values, errors = np.empty(len(attempts)), np.empty(len(attempts))
    for i, rows in enumerate(attempts):
        minima = [
            ms / max(1.0, _reference_ms(row) / limit)
            for row in rows
            for ms in _process_minima_ms(row, phase)
        ]
        values[i], errors[i] = min(minima), standard_error(minima)
    return values, errors


def _process_minima_ms(row: StoredLatency, phase: Phase) -> list[float]:
    """Smallest time of each accepted process [ms]."""
    processes = [each["runs"] for each in row.result["samples"] if each["accepted"]]
    if phase is Phase.prefill:
        return [1e3 * min(run["wall_s"] for run in runs) for runs in processes]
    return [min(min(run["steps_ms"]) for run in runs) for runs in processes]


def device_s(rows: Iterable[StoredLatency]) -> float:
    """Time that the device spent on these measurements, each process counted once [s]."""
    processes = {
        each["started"]: each["process"]["wall_s"]
        for row in rows
        for each in row.result["conditions"]
    }
    return sum(processes.values())


def _reference_ms(row: StoredLatency) -> float:
    """Latency of the reference program while the row's subject was measured [ms]."""
    return min(each["reference_ms"] for each in row.result["conditions"])


def plain(lowering: LoweringSettings) -> dict[str, Any]:
    """Identity of a program's settings as JSON values, with the version of the programs."""
    return {"version": LOWERING_VERSION, **lowering.identity()}
