"""Stage 1 of the search: measure what is missing, fit the predictors (Sec. 3.4 of the paper)."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flash.arch import ArchSpec, Attention, SearchSpace
from flash.device.base import Device
from flash.device.workload import Point, Workload
from flash.errors import InputError, require
from flash.latency.active_learning import ErrorEstimate, choose, extrapolates, stop
from flash.latency.analytical import AnalyticalPredictor
from flash.latency.blocks import BlockPredictor
from flash.latency.composition import BlockShape, BlockTable, Grid, grid_points
from flash.latency.cost_model import Values, flops, parameters
from flash.latency.drift import comparable
from flash.latency.gp import GaussianProcess
from flash.latency.power_law import PowerLaw
from flash.latency.prediction import Predictor, Scores, cross_predict, score
from flash.latency.profiler import Profiler
from flash.latency.programs import Subject
from flash.latency.settings import LatencySettings, PredictorKind
from flash.latency.store import MeasurementStore, StoredLatency
from flash.latency.transfer import TransferPredictor
from flash.lowering.blocks import Block, BlockKind
from flash.lowering.settings import LoweringSettings

logger = logging.getLogger(__name__)

BYTES_PER_MIB = 2**20
_MOST_FLUSH_MIB = 64
"""Twice the largest cache that one core is likely to see."""
_LEAST_JUDGED = 6
"""Whole models from which the error is worth estimating."""
_MOST_BEYOND = 0.05
"""Share of the candidates that may lie beyond the measured models when measuring ends."""
_POOL = 1024
"""Whole models are the first of a longer list, so asking for more keeps those already measured."""


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Predictors of one device under one workload, and what they were made from.

    Attributes:
        predictors: One for each latency of the workload.
        objective: Which of them the search minimises.
        scores: Cross-validation at each point: of the chosen predictor, and of the baselines
            `params` and `flops` on the same whole models.
        models: The measured whole models; the backbone is the last.
        values_ms: Their measured latencies at each point [ms], freed from drift of the device.
        left_out_ms: What the chosen predictor says of them when fitted to the others [ms].
        rows: Every measurement that was used.
    """

    predictors: Mapping[Point, Predictor]
    objective: Point
    scores: Mapping[Point, Mapping[str, Scores]]
    models: tuple[ArchSpec, ...]
    values_ms: Mapping[Point, Values]
    left_out_ms: Mapping[Point, Values]
    rows: tuple[StoredLatency, ...]

    def describe(self) -> str:
        """Cross-validation as text, one line for each point and predictor."""
        width = max(len(point.name) for point in self.scores)
        return "\n".join(
            f"{point.name:{width}s} {name:8s} {scores}"
            for point, by_name in self.scores.items()
            for name, scores in by_name.items()
        )

    def metrics(self) -> dict[str, float]:
        """Cross-validation as numbers for a logger, `latency/<point>/<predictor>/<score>`."""
        return {
            f"latency/{point.name}/{name}/{key}": float(value)
            for point, by_name in self.scores.items()
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

    Raises:
        InputError: What cannot be measured on this device.
    """
    _check(device, workload, lowering, settings)
    profiler = make_profiler(
        backbone=backbone,
        device=device,
        workload=workload,
        lowering=lowering,
        settings=settings,
        store=store,
        cache_dir=cache_dir,
    )
    grid, blocks = None, []
    if settings.predictor is PredictorKind.blocks:
        grid = make_grid(space, backbone, settings)
        blocks = grid_subjects(grid, backbone)
    # The store may know more models than are asked for: they cost nothing, so they all count.
    last = backbone.as_program()
    known = [spec for spec in profiler.known_models() if spec != last and spec in space]
    if settings.predictor is PredictorKind.analytical:
        models = _measure_actively(profiler, space, known, last, seed)
    else:
        planned = whole_models(space, backbone, settings.num_whole_models, seed)
        models = [*dict.fromkeys([*planned[:-1], *known]), last]
        profiler.measure_missing([*blocks, *(Subject(spec=spec) for spec in models)])
    model = _fit(profiler, backbone, grid, models)
    for line in model.describe().splitlines():
        logger.info("latency: %s", line)
    return model


def _check(
    device: Device, workload: Workload, lowering: LoweringSettings, settings: LatencySettings
) -> None:
    """See before any work that what is asked for can be measured.

    Raises:
        InputError: It cannot.
    """
    require(
        workload.context <= lowering.max_context,
        "device.lowering.max_context",
        lowering.max_context,
        f"at least {workload.context}, for the prompt and for the tokens decoded",
    )
    if settings.predictor is PredictorKind.blocks and not device.times_blocks:
        raise InputError(
            f"latency.predictor=blocks: expected one of whole models, as device="
            f"{device.settings.name} cannot time blocks; choose latency=analytical"
        )


def _measure_actively(
    profiler: Profiler, space: SearchSpace, known: Sequence[ArchSpec], last: ArchSpec, seed: int
) -> list[ArchSpec]:
    """Measure what teaches most until the predictor is good enough; the models, `last` last.

    Ends when the error of left-out models is below the target and hardly any candidate lies beyond
    the measured ones, or when `whole_models` are measured.
    """
    settings, objective = profiler.settings, profiler.workload.first(profiler.settings.objective)
    make = _maker(settings.predictor, objective, profiler, None)
    pool = space.stratified(np.random.default_rng(seed), _POOL)
    models = [*known, last]
    chooser = _source(profiler, objective) or AnalyticalPredictor(
        objective, profiler.lowering, profiler.lowering.chunk
    )

    def grown() -> list[ArchSpec]:
        num = min(settings.group_size, settings.whole_models - len(models) + 1)
        return [*models[:-1], *choose(chooser, models, pool, num), last]

    if len(models) < _LEAST_JUDGED:
        models = grown()
    while True:
        profiler.measure_missing([Subject(spec=spec) for spec in models])
        estimate, beyond = None, 1.0
        if len(models) >= _LEAST_JUDGED:
            values, errors = _whole_ms(profiler, models, objective)
            estimate = ErrorEstimate.of(
                cross_predict(make, models, values, errors, folds=len(models)), values
            )
            if settings.transfer_from is None:
                chooser.fit(models, values, errors)
            beyond = float(extrapolates(chooser, models, pool).mean())
            logger.info(
                "latency: %d whole models, %s: error %.1f %% (surely below %.1f %%), %.0f %% of "
                "the candidates beyond them",
                len(models),
                objective,
                estimate.mape_pct,
                estimate.upper_pct,
                100 * beyond,
            )
        covered = estimate if beyond <= _MOST_BEYOND else None
        budget = settings.whole_models
        if stop(covered, settings.target_error_pct, len(models) - 1, budget) is not None:
            return models
        models = grown()


def _source(profiler: Profiler, point: Point) -> AnalyticalPredictor | None:
    """Predictor of the device `transfer_from`, fitted to its measurements; None without one."""
    device = profiler.settings.transfer_from
    if device is None:
        return None
    attempts = profiler.attempts_of(device, point)
    values, errors = comparable(attempts, point.phase)
    specs = [rows[0].spec for rows in attempts]
    return AnalyticalPredictor(point, profiler.lowering, profiler.lowering.chunk).fit(
        specs, values, errors
    )


def make_profiler(
    *,
    backbone: ArchSpec,
    device: Device,
    workload: Workload,
    lowering: LoweringSettings,
    settings: LatencySettings,
    store: MeasurementStore,
    cache_dir: Path,
) -> Profiler:
    """A profiler whose reference program is the lower half of the backbone.

    That has every operator of a model and about the running time of a candidate.
    """
    half = backbone.as_program().replace(
        layer_types=(Attention.full_attention,) * max(1, backbone.num_layers // 2)
    )
    weights = lowering.weight_bytes(backbone)
    return Profiler(
        reference=Subject(spec=half),
        flush_mib=min(weights // BYTES_PER_MIB, _MOST_FLUSH_MIB),
        device=device,
        workload=workload,
        lowering=lowering,
        settings=settings,
        store=store,
        cache_dir=cache_dir,
    )


def whole_models(space: SearchSpace, backbone: ArchSpec, num: int, seed: int) -> list[ArchSpec]:
    """`num` members of the space (fewer if it is tiny) spread over its sizes, then the backbone."""
    last = backbone.as_program()
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


def _whole_ms(
    profiler: Profiler, models: Sequence[ArchSpec], point: Point
) -> tuple[Values, Values]:
    """Latencies of measured models at one point and their standard errors [ms]."""
    attempts = [profiler.attempts(Subject(spec=spec), point) for spec in models]
    return comparable(attempts, point.phase)


def _fit(
    profiler: Profiler, backbone: ArchSpec, grid: Grid | None, models: Sequence[ArchSpec]
) -> LatencyModel:
    """Fit and cross-validate every point."""
    chosen = profiler.settings.predictor
    subjects = [
        *(grid_subjects(grid, backbone) if grid else ()),
        *(Subject(spec=spec) for spec in models),
    ]
    predictors: dict[Point, Predictor] = {}
    values_ms: dict[Point, Values] = {}
    left_out_ms: dict[Point, Values] = {}
    scores: dict[Point, dict[str, Scores]] = {}
    all_rows: list[StoredLatency] = []
    for point in profiler.workload.points:
        attempts = [profiler.attempts(subject, point) for subject in subjects]
        all_rows += [row for rows in attempts for row in rows]
        all_ms, all_errors_ms = comparable(attempts, point.phase)
        values, errors = all_ms[-len(models) :], all_errors_ms[-len(models) :]
        table = None
        if grid is not None:
            parts_ms = dict(zip(grid.parts(), all_ms.tolist(), strict=False))
            table = BlockTable(point, backbone, grid, parts_ms, profiler.lowering)
        scores[point] = {}
        for kind in dict.fromkeys((chosen, PredictorKind.params, PredictorKind.flops)):
            make = _maker(kind, point, profiler, table)
            left_out = cross_predict(make, models, values, errors)
            scores[point][kind.value] = score(left_out, values)
            if kind is chosen:
                left_out_ms[point] = left_out.mean
        predictors[point] = _maker(chosen, point, profiler, table)().fit(models, values, errors)
        values_ms[point] = values
    return LatencyModel(
        predictors=predictors,
        objective=profiler.workload.first(profiler.settings.objective),
        scores=scores,
        models=tuple(models),
        values_ms=values_ms,
        left_out_ms=left_out_ms,
        rows=tuple(all_rows),
    )


def _maker(
    kind: PredictorKind, point: Point, profiler: Profiler, table: BlockTable | None
) -> Callable[[], Predictor]:
    """A function that makes an unfitted predictor of this kind."""
    match kind:
        case PredictorKind.analytical if (source := _source(profiler, point)) is not None:
            return lambda: TransferPredictor(source)
        case PredictorKind.analytical:
            return lambda: AnalyticalPredictor(point, profiler.lowering, profiler.lowering.chunk)
        case PredictorKind.blocks:
            assert table is not None
            return lambda: BlockPredictor(table)
        case PredictorKind.gp:
            return GaussianProcess
        case PredictorKind.params:
            return lambda: PowerLaw(parameters)
        case PredictorKind.flops:
            return lambda: PowerLaw(lambda counts: flops(counts, point))


def grid_subjects(grid: Grid, backbone: ArchSpec) -> list[Subject]:
    """The blocks of a grid, in its order."""

    def block(part: BlockShape) -> Block:
        ffn_dim = backbone.ffn_dim if part.ffn_dim is None else part.ffn_dim
        spec = backbone.replace(model_dim=part.model_dim, ffn_dim=ffn_dim)
        return Block.of(BlockKind[part.name], spec)

    return [Subject(block=block(part)) for part in grid.parts()]
