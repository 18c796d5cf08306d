"""Profiler of one device: measures the latencies that the store lacks and adds them to it."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from flash.arch import ArchSpec
from flash.device.base import Device
from flash.device.measurement import Measurement, Program
from flash.device.workload import Phase, Point, Workload
from flash.errors import InputError
from flash.latency.drift import comparable, reference_ms
from flash.latency.programs import Subject, cached_program, recorded_lower_s
from flash.latency.rows import conditions_of, joined, of_point
from flash.latency.settings import LatencySettings
from flash.latency.store import Conditions, MeasurementStore, StoredLatency, SubjectKind
from flash.lowering.lower import STAGE_SHARES
from flash.lowering.settings import LoweringSettings
from flash.progress import listening, progress_bar, stages
from flash.records import digest

logger = logging.getLogger(__name__)

_SLOW = 1.15
"""Slowdown of the reference program, relative to the best group, from which a group counts as
disturbed. On a busy machine it was 2.3 in all processes of a group, so that a comparison of these
processes with each other showed nothing."""
_MIN_MODELS_TO_TRANSFER = 8
"""Least number of whole models for a predictor that is transferred to another device."""
_MOST_FLUSH_MIB = 64
"""Upper limit of the flushed memory [MiB]: twice the largest cache expected for one core."""
_SHARED = 0.25
"""Processor time of other programs, as a share of the wall time, from which a warning is logged:
even on another core they take memory bandwidth and space in shared caches."""
_ERROR_FACTOR = {Phase.prefill: 1.0, Phase.decode: 2.0}
"""Factor of the accepted error by phase: decode varies about twice as much between processes."""


@dataclass(frozen=True, kw_only=True)
class Profiler:
    """Profiler of one device under one workload; stores every measurement.

    `measure_missing` times many subjects together with a reference program, for predictors;
    `measure_alone` times one subject without other programs; `measure_program` times a file with
    trained weights.

    Attributes:
        device: Device that runs the programs.
        workload: Latencies to time.
        lowering: Settings of the lowering of subjects to programs.
        store: Store of all measurements; new ones are appended.
        cache_dir: Folder for lowered programs.
        reference: Program that is timed with every group, in the same processes, so that groups
            can be compared; only `measure_missing` needs it. It should run about as long as a
            model: on a machine that is 10 % slower for a while, a short program still finds calm
            moments and does not show it.
        flush_mib: Size of the memory that is read between the calls of a block, to evict its
            weights from the caches [MiB]; see `Program`.
        settings: Size of groups, and the required precision of latencies.
    """

    device: Device
    workload: Workload
    lowering: LoweringSettings
    store: MeasurementStore
    cache_dir: Path
    reference: Subject | None = None
    flush_mib: int = 0
    settings: LatencySettings = field(default_factory=LatencySettings)

    def key(self, subject: Subject, point: Point) -> str:
        """Return the key of the subject's measurements in the store."""
        return self._conditions(subject, point).key(subject.kind, subject.to_dict())

    def attempts(self, subject: Subject, point: Point) -> list[StoredLatency]:
        """Return the measurements of a subject that were timed with this profiler's reference.

        The drift of the device is not known for others, such as those of an export and of
        `measure_alone`.
        """
        rows = self.store.attempts(self.key(subject, point))
        return [row for row in rows if row.result["reference"] == self._reference_key]

    def known_models(self) -> list[ArchSpec]:
        """Return the whole models that were timed with the same reference at the first point."""
        wanted = self._base(self.workload.points[0])
        found = (row.spec for row in self._comparable_models() if row.conditions == wanted)
        return list(dict.fromkeys(found))

    def attempts_of(self, device: str, point: Point) -> list[list[StoredLatency]]:
        """Return the measurements of each whole model at this point on another device of the store.

        If several have this name, or one had other threads, that with the most models is taken.

        Raises:
            InputError: The store holds too few measurements of the same programs on that device.
        """
        wanted = self._base(point)
        by_device: dict[str, dict[str, list[StoredLatency]]] = {}
        for row in self._comparable_models():
            theirs = row.conditions
            same = (theirs.point, theirs.lowering) == (wanted.point, wanted.lowering)
            if same and theirs.device["device"] == device:
                found = by_device.setdefault(digest(theirs.device), {})
                found.setdefault(row.key, []).append(row)
        found = max(by_device.values(), key=len, default={})
        if len(found) < _MIN_MODELS_TO_TRANSFER:
            devices = sorted({str(row.conditions.device["device"]) for row in self.store})
            raise InputError(
                f"latency.transfer_from={device}: expected a device with at least "
                f"{_MIN_MODELS_TO_TRANSFER} whole models of {point} and this lowering in "
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
        """Lower and measure subjects that the store lacks; repeat those that are imprecise."""
        if not self._due(subjects):
            return
        with self.store.exclusive(self.device.resource):
            repeated = False
            while due := self._due(subjects):  # ends, since the attempts are limited
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

    def measure_alone(self, subject: Subject) -> Measurement:
        """Measure a whole model at every point, in processes that run no other program.

        Points that were measured in this way before, under the same conditions, are taken from the
        store.
        """
        path = self.lowered(subject)
        missing = self._not_alone(subject)
        if missing:
            with self.store.exclusive(self.device.resource):
                missing = self._not_alone(subject)  # another process may have measured it
                if missing:
                    workload, program = self.workload.only(missing), subject.program(path)
                    measured = self.device.measure([program], workload)[0]
                    self._store(subject, missing, measured, None, recorded_lower_s(path))
        rows = {point: self._alone(subject, point)[-1] for point in self.workload.points}
        return joined(str(subject), rows)

    def measure_program(
        self,
        shape: Subject,
        program: Program,
        reference: tuple[Subject, Program] | None,
        lower_s: float,
    ) -> Measurement:
        """Measure a program with trained weights, and store the result as a further attempt.

        Args:
            shape: Model without its weights, since these do not change its latency.
            program: Program to measure.
            reference: Another model and its program, timed in the same processes; or None.
            lower_s: Time that the lowering of the program took [s].
        """
        other = reference[1] if reference is not None else None
        with self.store.exclusive(self.device.resource):
            measured = self.device.measure([program], self.workload, other)[0]
            key = subject_key(reference[0]) if reference is not None else None
            self._store(shape, self.workload.points, measured, key, lower_s)
        return measured

    def lowered(self, subject: Subject) -> Path:
        """Return the path of the subject's program, lowering it if the cache lacks it."""

        def announce(subject: Subject) -> None:
            logger.info("%s: lowering, minutes for a large model", subject)

        with stages(f"{subject}: lowering", STAGE_SHARES):
            return cached_program(subject, self.lowering, self.cache_dir, announce)

    def _alone(self, subject: Subject, point: Point) -> list[StoredLatency]:
        """Return the measurements of a subject in whose processes no other program ran."""
        rows = self.store.attempts(self.key(subject, point))
        return [
            row
            for row in rows
            if not any("reference_ms" in each for each in row.result["conditions"])
        ]

    def _not_alone(self, subject: Subject) -> tuple[Point, ...]:
        """Return the points at which the subject was not measured alone yet."""
        return tuple(point for point in self.workload.points if not self._alone(subject, point))

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
        """Return what to measure: missing latencies, and imprecise ones with attempts left."""
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
        """Return the subjects whose latency is not precise enough.

        Either its standard error is too large, or the reference program was clearly slower than
        its best in every attempt. A comparison of the processes of one attempt would not show the
        latter.
        """
        attempts = {
            subject: rows for subject in subjects if (rows := self.attempts(subject, point))
        }
        if not attempts:
            return set()
        values, errors = comparable(list(attempts.values()), point.phase)
        calmest = {s: min(map(reference_ms, rows)) for s, rows in attempts.items()}
        best = min(calmest.values())
        most = _ERROR_FACTOR[point.phase] * self.settings.precision_pct / 100
        return {
            subject
            for subject, imprecise in zip(attempts, errors > most * values, strict=True)
            if imprecise or calmest[subject] > _SLOW * best
        }

    @cached_property
    def _reference_key(self) -> str:
        assert self.reference is not None
        return subject_key(self.reference)

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
        """Measure and store a group; the reference program is timed in the same processes."""
        assert self.reference is not None

        made: set[Subject] = set()

        def announce(subject: Subject) -> None:
            made.add(subject)
            bar.set_postfix_str(f"lowering {subject}")

        def lowered(subject: Subject) -> Path:
            with listening(lambda name: bar.set_postfix_str(f"{subject}: {name}")):
                return cached_program(subject, self.lowering, self.cache_dir, announce)

        paths = []
        for subject in group:
            paths.append(lowered(subject))
            bar.update()
        reference_path = lowered(self.reference)
        bar.set_postfix_str("measuring")
        flush_mib = self.flush_mib
        measured = self.device.measure(
            [subject.program(path, flush_mib) for subject, path in zip(group, paths, strict=True)],
            self.workload.only(points),
            dataclasses.replace(self.reference.program(reference_path), name="reference"),
            lambda done, total: bar.set_postfix_str(f"measuring, process {done} of {total}"),
        )
        _warn_if_shared(measured[0])
        for subject, path, measurement in zip(group, paths, measured, strict=True):
            self._store(subject, points, measurement, self._reference_key, recorded_lower_s(path))
        if not self.settings.keep_programs:
            mine = {path for subject, path in zip(group, paths, strict=True) if subject in made}
            for path in mine - {reference_path}:
                path.unlink(missing_ok=True)  # another device may have measured it too

    def _store(
        self,
        subject: Subject,
        points: Iterable[Point],
        measured: Measurement,
        reference: str | None,
        lower_s: float,
    ) -> None:
        for point in points:
            row = StoredLatency(
                kind=subject.kind,
                subject=subject.to_dict(),
                conditions=self._conditions(subject, point),
                result={**of_point(measured, point), "reference": reference, "lower_s": lower_s},
            )
            self.store.append(row)


def flushed_mib(spec: ArchSpec, lowering: LoweringSettings) -> int:
    """Memory to read between two calls of a block, as the rest of a model would [MiB]."""
    return min(lowering.weight_bytes(spec) // 2**20, _MOST_FLUSH_MIB)


def subject_key(subject: Subject) -> str:
    """Return the hash by which rows of the store name their reference program."""
    return digest([subject.kind.value, subject.to_dict()], 24)


def _warn_if_shared(measured: Measurement) -> None:
    """Warn if other programs ran throughout; neither precision nor the reference would show it."""
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
