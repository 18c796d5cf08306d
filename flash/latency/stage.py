"""Stage 1 of the search: measure what is missing, fit the predictors (Sec. 3.4 of the paper)."""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flash.arch import (
    ArchSpec,
    SearchSpace,
    count_parameters,
    decode_flops,
    prefill_flops,
)
from flash.device import Device, Program, Workload
from flash.errors import require
from flash.files import atomic_write
from flash.latency.blocks import BlockPredictor
from flash.latency.composition import BlockTable, Grid, Part, grid_points
from flash.latency.gp import GaussianProcess
from flash.latency.prediction import Predictor, Scores, Values, cross_validate
from flash.latency.proxies import PowerLaw
from flash.latency.settings import LatencySettings, Objective, PredictorKind
from flash.latency.store import Conditions, MeasurementStore, Row, SubjectKind
from flash.lowering import Block, BlockKind, LoweringSettings, lower, lower_block
from flash.model import Decoder
from flash.progress import progress_bar

logger = logging.getLogger(__name__)

LOWERING_VERSION = 1
"""To be raised when flash.lowering writes other programs for the same spec and settings, so that
old programs are not taken from the cache nor old latencies from the store."""

_PROTOCOL = ("processes", "warmups", "runs")
_SLOW = 1.15
"""A group whose reference program is this much slower than before was disturbed."""
_POOL = 1024
"""Whole models are the first of a longer list, so asking for more keeps those already measured."""
_RESULT = {Objective.prefill: "ttft", Objective.decode: "decode"}


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
class LatencyModel:
    """Predictors of one device under one workload, and what they were made from.

    Attributes:
        prefill: Predicts the time to first token.
        decode: Predicts the time of one generated token.
        objective: Which of the two the search minimises.
        scores: Cross-validation for each phase: of the chosen predictor, and of the baselines
            `params` and `flops` on the same whole models.
        models: The measured whole models; the backbone is the last.
        values_ms: Their measured latencies for each phase [ms].
        rows: Every measurement that was used.
    """

    prefill: Predictor
    decode: Predictor
    objective: Objective
    scores: dict[Objective, dict[str, Scores]]
    models: tuple[ArchSpec, ...]
    values_ms: dict[Objective, Values]
    rows: tuple[Row, ...]

    @property
    def target(self) -> Predictor:
        """Predictor of the latency that the search minimises."""
        return self.prefill if self.objective is Objective.prefill else self.decode

    def describe(self) -> str:
        """Cross-validation as text, one line for each phase and predictor."""
        return "\n".join(
            f"{phase.value:7s} {name:6s} {scores}"
            for phase, by_name in self.scores.items()
            for name, scores in by_name.items()
        )

    def metrics(self) -> dict[str, float]:
        """Cross-validation as numbers for a logger, `latency/<phase>/<predictor>/<score>`."""
        return {
            f"latency/{phase.value}/{name}/{key}": float(value)
            for phase, by_name in self.scores.items()
            for name, scores in by_name.items()
            for key, value in dataclasses.asdict(scores).items()
        }


def collect(
    *,
    space: SearchSpace,
    backbone: ArchSpec,
    device: Device,
    workload: Workload,
    lowering: LoweringSettings,
    settings: LatencySettings,
    store: MeasurementStore,
    cache_dir: Path,
    seed: int = 0,
) -> LatencyModel:
    """Measure what the store lacks for this device and workload, and fit the predictors.

    A killed call goes on where it was: finished groups are in the store, lowered programs in
    `cache_dir`. Only one process measures for a store at a time; others wait.

    Args:
        space: Candidates whose latency is wanted.
        backbone: Measured too, as a reference and for calibration.
        device: Runs the programs.
        workload: What is timed.
        lowering: How models become programs.
        settings: Predictor and numbers of measurements.
        store: Measurements so far; grows.
        cache_dir: Folder for lowered programs.
        seed: Chooses the whole models.
    """
    require(
        workload.context <= lowering.max_context,
        "lowering.max_context",
        lowering.max_context,
        f"at least {workload.context}, for the prompt and for the tokens decoded",
    )
    models = whole_models(space, backbone, settings.num_whole_models, seed)
    grid = None
    if settings.predictor is PredictorKind.blocks:
        grid = make_grid(space, backbone, settings)
    parts = {} if grid is None else {part: _block(part, backbone) for part in grid.parts()}
    subjects = [
        *(Subject(block=block) for block in parts.values()),
        *(Subject(spec=spec) for spec in models),
    ]
    conditions = Conditions(
        workload=workload.to_dict(),
        protocol={name: getattr(device.settings, name) for name in _PROTOCOL},
        lowering=_plain(lowering),
        runtime=f"executorch {version('executorch')}",
        device=device.identity(),
    )
    bench = _Bench(
        conditions=conditions,
        device=device,
        workload=workload,
        lowering=lowering,
        settings=settings,
        store=store,
        cache_dir=cache_dir,
    )
    bench.measure_missing(subjects)
    rows = [_stored(store, conditions, subject) for subject in subjects]
    by_part = dict(zip(parts, rows, strict=False))
    model = _fit(settings, workload, backbone, grid, by_part, models, rows)
    for line in model.describe().splitlines():
        logger.info("latency: %s", line)
    return model


def whole_models(space: SearchSpace, backbone: ArchSpec, num: int, seed: int) -> list[ArchSpec]:
    """`num` members of the space (fewer if it is tiny) spread over its sizes, then the backbone."""
    last = backbone.replace(tie_embeddings=True)  # tied or not, the programs are the same
    pool = space.stratified(np.random.default_rng(seed), max(num, _POOL))
    return [*[spec for spec in pool if spec != last][:num], last]


def make_grid(space: SearchSpace, backbone: ArchSpec, settings: LatencySettings) -> Grid:
    """Blocks to measure so that the space and the backbone lie between measured points."""
    kinds = {*space.kinds, *backbone.layer_types}
    return Grid(
        model_dims=grid_points([*space.model_dims, backbone.model_dim], settings.grid_widths),
        ffn_dims=grid_points([*space.ffn_dims, backbone.ffn_dim], settings.grid_ffn),
        kinds=tuple(sorted(kinds, key=lambda kind: kind.value)),
    )


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """What measuring needs, for all groups alike."""

    conditions: Conditions
    device: Device
    workload: Workload
    lowering: LoweringSettings
    settings: LatencySettings
    store: MeasurementStore
    cache_dir: Path

    def measure_missing(self, subjects: Sequence[Subject]) -> None:
        """Lower and measure, in groups, each subject that the store lacks."""
        by_key = {self.conditions.key(s.kind, s.to_dict()): s for s in subjects}
        if not self.store.missing(by_key):
            return
        with self.store.exclusive():
            missing = [by_key[key] for key in self.store.missing(by_key)]
            num_blocks = sum(subject.kind is SubjectKind.block for subject in missing)
            logger.info(
                "latency: %d blocks and %d whole models to measure, %d are in the store",
                num_blocks,
                len(missing) - num_blocks,
                len(by_key) - len(missing),
            )
            best_ms = math.inf
            size = self.settings.group_size
            with progress_bar("latency programs", len(missing), unit="program") as bar:
                for start in range(0, len(missing), size):
                    group = missing[start : start + size]
                    reference_ms = self._measure_group(group, subjects[-1], bar)
                    _warn_if_slow(reference_ms, best_ms)
                    best_ms = min(best_ms, reference_ms)

    def _measure_group(self, group: Sequence[Subject], reference: Subject, bar: tqdm) -> float:
        """Returns the TTFT of the reference program [ms], which takes turns with the group."""
        paths = []
        for subject in group:
            paths.append(self._lowered(subject, bar))
            bar.update()
        reference_path = self._lowered(reference, bar)
        bar.set_postfix_str("measuring")
        measured = self.device.measure(
            [subject.program(path) for subject, path in zip(group, paths, strict=True)],
            self.workload,
            dataclasses.replace(reference.program(reference_path), name="reference"),
            lambda done, total: bar.set_postfix_str(f"measuring, process {done} of {total}"),
        )
        for subject, measurement in zip(group, measured, strict=True):
            row = Row(
                kind=subject.kind,
                subject=subject.to_dict(),
                conditions=self.conditions,
                result=measurement.to_dict(),
            )
            self.store.append(row)
        if not self.settings.keep_programs:
            for path in {*paths} - {reference_path}:
                path.unlink()
        return min(each["reference_ttft_ms"] for each in measured[0].conditions)

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


def _warn_if_slow(reference_ms: float, best_ms: float) -> None:
    if reference_ms > _SLOW * best_ms:
        logger.warning(
            "latency: this group ran on a busy device: the reference program took %.1f ms, %.1f ms "
            "in an earlier group; its latencies are likely too high",
            reference_ms,
            best_ms,
        )


def _fit(
    settings: LatencySettings,
    workload: Workload,
    backbone: ArchSpec,
    grid: Grid | None,
    parts: dict[Part, Row],
    models: Sequence[ArchSpec],
    rows: Sequence[Row],
) -> LatencyModel:
    """Fit and cross-validate both phases. The rows of the whole models are the last ones."""
    predictors: dict[Objective, Predictor] = {}
    values_ms: dict[Objective, Values] = {}
    scores: dict[Objective, dict[str, Scores]] = {}
    for phase, name in _RESULT.items():
        measured = [row.result for row in rows[-len(models) :]]
        values = np.array([result[f"{name}_ms"] for result in measured], dtype=float)
        errors = np.array([result[f"{name}_se_ms"] for result in measured], dtype=float)
        table = None
        if grid is not None:
            parts_ms = {part: float(row.result[f"{name}_ms"]) for part, row in parts.items()}
            table = BlockTable(backbone, grid, parts_ms)
        scores[phase] = {}
        for kind in dict.fromkeys((settings.predictor, PredictorKind.params, PredictorKind.flops)):
            make = _maker(kind, phase, workload, table)
            scores[phase][kind.value] = cross_validate(make, models, values, errors)
        make = _maker(settings.predictor, phase, workload, table)
        predictors[phase] = make().fit(models, values, errors)
        values_ms[phase] = values
    return LatencyModel(
        prefill=predictors[Objective.prefill],
        decode=predictors[Objective.decode],
        objective=settings.objective,
        scores=scores,
        models=tuple(models),
        values_ms=values_ms,
        rows=tuple(rows),
    )


def _maker(
    kind: PredictorKind, phase: Objective, workload: Workload, table: BlockTable | None
) -> Callable[[], Predictor]:
    """What gives an unfitted predictor of this kind."""
    match kind:
        case PredictorKind.blocks:
            assert table is not None
            return lambda: BlockPredictor(table)
        case PredictorKind.gp:
            return GaussianProcess
        case PredictorKind.params:
            return lambda: PowerLaw(lambda spec: count_parameters(spec).total)
        case PredictorKind.flops if phase is Objective.prefill:
            return lambda: PowerLaw(lambda spec: prefill_flops(spec, workload.prompt_tokens))
        case PredictorKind.flops:
            return lambda: PowerLaw(lambda spec: decode_flops(spec, workload.decode_context))


def _block(part: Part, backbone: ArchSpec) -> Block:
    ffn_dim = backbone.ffn_dim if part.ffn_dim is None else part.ffn_dim
    spec = backbone.replace(model_dim=part.model_dim, ffn_dim=ffn_dim)
    return Block.of(BlockKind[part.name], spec)


def _stored(store: MeasurementStore, conditions: Conditions, subject: Subject) -> Row:
    row = store.get(conditions.key(subject.kind, subject.to_dict()))
    assert row is not None, f"{subject} was not measured"
    return row


def _plain(settings: LoweringSettings) -> dict[str, Any]:
    """The settings as JSON values, with the version of the programs."""
    values = {
        key: value.value if isinstance(value, Enum) else value
        for key, value in dataclasses.asdict(settings).items()
    }
    return {"version": LOWERING_VERSION, **values}
