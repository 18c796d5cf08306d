"""Stage 1 of the search: measure missing latencies, fit the predictors (Sec. 3.4 of the paper)."""

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
from flash.latency.profiler import Profiler, flushed_mib
from flash.latency.programs import Subject
from flash.latency.settings import LatencySettings, PredictorKind
from flash.latency.store import MeasurementStore, StoredLatency
from flash.latency.transfer import TransferPredictor
from flash.lowering.blocks import Block, BlockKind
from flash.lowering.settings import LoweringSettings
from flash.terminal import table

logger = logging.getLogger(__name__)

_LEAST_JUDGED = 6
"""Least number of whole models for an estimate of the error."""
_MOST_BEYOND = 0.05
"""Largest share of candidates outside the range of the measured models when measuring ends."""
_POOL = 1024
"""Length of the list of which the first models are measured: a larger number extends the set."""
_MOST_TRANSFERRED = 19
"""Most whole models, beside the backbone, that are measured on a device after the first one."""
_TAUGHT = 128
"""Members of the space on which the first device's predictor teaches that of another one."""


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Predictors of one device under one workload, with the measurements they were fitted to.

    Attributes:
        predictor: Kind of the predictors.
        predictors: Predictor of each latency of the workload.
        objective: Latency that the search minimizes.
        scores: Cross-validation at each point: of the chosen predictor, and of the baselines
            `params` and `flops` on the same whole models.
        models: The measured whole models; the last is the backbone.
        values_ms: Measured latencies of `models` at each point [ms], corrected for drift.
        left_out_ms: Leave-one-out predictions of the chosen predictor for `models` [ms].
        rows: All measurements that were used.
    """

    predictor: PredictorKind
    predictors: Mapping[Point, Predictor]
    objective: Point
    scores: Mapping[Point, Mapping[str, Scores]]
    models: tuple[ArchSpec, ...]
    values_ms: Mapping[Point, Values]
    left_out_ms: Mapping[Point, Values]
    rows: tuple[StoredLatency, ...]

    def predict(self, specs: Sequence[ArchSpec]) -> list[dict[str, dict[str, float]]]:
        """Return `mean_ms`, `low_ms` and `high_ms` by name of the point, for each architecture."""
        found: list[dict[str, dict[str, float]]] = [{} for _ in specs]
        for point, predictor in self.predictors.items():
            interval = predictor.predict(specs)
            ends = zip(interval.mean, interval.low, interval.high, strict=True)
            for each, (mean, low, high) in zip(found, ends, strict=True):
                values = {"mean_ms": float(mean), "low_ms": float(low), "high_ms": float(high)}
                each[point.name] = values
        return found

    def describe(self) -> str:
        """Format the cross-validation as a table, one row for each point and predictor."""
        rows = [
            [point.name, name, f"{each.r2:.3f}", f"{each.mape_pct:.1f} %"]
            + [f"{each.kendall_tau:.2f}", f"{100 * each.coverage_90:.0f} %", str(each.n)]
            for point, by_name in self.scores.items()
            for name, each in by_name.items()
        ]
        header = ["point", "predictor", "R2", "MAPE", "Kendall tau", "90 % interval holds", "n"]
        few = min(each.n for by_name in self.scores.values() for each in by_name.values()) < 15
        note = "\nfew models: take the figures as a sanity check only" if few else ""
        return table([header, *rows]) + note

    def metrics(self) -> dict[str, float]:
        """Return the cross-validation for a logger, by `latency/<point>/<predictor>/<score>`."""
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
    first: LatencyModel | None = None,
) -> LatencyModel:
    """Measure latencies that the store lacks for this device and workload; fit the predictors.

    A call after a kill continues: measured groups are in the store, lowered programs in
    `cache_dir`. Only one process at a time measures on a device for the same store; others wait.

    Args:
        space: Search space whose latencies are to be predicted.
        backbone: Backbone; measured too, as a reference and for calibration.
        device: Device that runs the programs.
        workload: Latencies to time.
        lowering: Settings of the lowering.
        settings: Kind of predictor and numbers of measurements.
        store: Store of measurements; new ones are appended.
        cache_dir: Folder for lowered programs.
        seed: Seed of the choice of whole models.
        first: Predictors of another device at the same points. This one's start from them, so that
            few whole models have to be measured.

    Raises:
        InputError: The device cannot run the workload or time what the predictor needs.
        DeviceError: A process on the device died or took too long.
    """
    if first is not None:
        settings = _of_further_device(settings)
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
    is_blocks = settings.predictor is PredictorKind.blocks
    grid = make_grid(space, backbone, settings) if is_blocks else None
    sources = _sources(profiler, space, first, seed)
    models = _measure(profiler, space, backbone, grid, seed, sources)
    model = _fit(profiler, backbone, grid, models, sources)
    for line in model.describe().splitlines():
        logger.info("latency: %s", line)
    return model


def _of_further_device(settings: LatencySettings) -> LatencySettings:
    """Return the settings of a device whose predictor starts from that of another one."""
    few = min(settings.whole_models, _MOST_TRANSFERRED)
    return dataclasses.replace(settings, predictor=PredictorKind.analytical, whole_models=few)


def _check(
    device: Device, workload: Workload, lowering: LoweringSettings, settings: LatencySettings
) -> None:
    """Check before any work that the workload can be measured.

    Raises:
        InputError: The context is too long, or the device cannot time blocks.
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


_Sources = Mapping[Point, AnalyticalPredictor]
"""Predictors of another device from which those of this one start; empty without one."""


def _measure(
    profiler: Profiler,
    space: SearchSpace,
    backbone: ArchSpec,
    grid: Grid | None,
    seed: int,
    sources: _Sources,
) -> list[ArchSpec]:
    """Measure what the predictors need; return the whole models, the backbone at the end."""
    settings, last = profiler.settings, backbone.as_program()
    # All whole models in the store are used: further ones cost no measurement.
    known = [spec for spec in profiler.known_models() if spec != last and spec in space]
    if settings.predictor is PredictorKind.analytical:
        return _measure_actively(profiler, space, known, last, seed, sources)
    planned = whole_models(space, backbone, settings.num_whole_models, seed)
    models = [*dict.fromkeys([*planned[:-1], *known]), last]
    blocks = grid_subjects(grid, backbone) if grid else []
    profiler.measure_missing([*blocks, *(Subject(spec=spec) for spec in models)])
    return models


def _measure_actively(
    profiler: Profiler,
    space: SearchSpace,
    known: Sequence[ArchSpec],
    last: ArchSpec,
    seed: int,
    sources: _Sources,
) -> list[ArchSpec]:
    """Measure the most informative models until the predictor is accurate enough.

    Ends when the error of left-out models is below the target and at most `_MOST_BEYOND` of the
    candidates require extrapolation, or when `whole_models` models or the whole space are measured.

    Returns:
        The measured models, with `last` at the end.
    """
    settings, objective = profiler.settings, profiler.workload.first(profiler.settings.objective)
    source = sources.get(objective)
    make = _maker(settings.predictor, objective, profiler, None, source)
    pool = space.stratified(np.random.default_rng(seed), _POOL)
    models = [*known, last]
    chooser = source or AnalyticalPredictor(objective, profiler.lowering, profiler.lowering.chunk)

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
            if source is None:
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
        measured, models = models, grown()
        if models == measured:  # all of a small space
            return models


def _sources(
    profiler: Profiler, space: SearchSpace, first: LatencyModel | None, seed: int
) -> _Sources:
    """Fit predictors of another device: to what `first` predicts, or to what the store holds."""
    device, lowering = profiler.settings.transfer_from, profiler.lowering
    if first is None and device is None:
        return {}
    found: dict[Point, AnalyticalPredictor] = {}
    for point in profiler.workload.points:
        if first is not None:
            specs = space.stratified(np.random.default_rng(seed), _TAUGHT)
            values, errors = first.predictors[point].predict(specs).mean, None
        else:
            assert device is not None
            attempts = profiler.attempts_of(device, point)
            values, errors = comparable(attempts, point.phase)
            specs = [rows[0].spec for rows in attempts]
        found[point] = AnalyticalPredictor(point, lowering, lowering.chunk).fit(
            specs, values, errors
        )
    return found


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
    """Make a profiler whose reference program is the lower half of the backbone.

    This half has every operator of a model and runs about as long as a candidate.
    """
    half = backbone.as_program().replace(
        layer_types=(Attention.full_attention,) * max(1, backbone.num_layers // 2)
    )
    return Profiler(
        reference=Subject(spec=half),
        flush_mib=flushed_mib(backbone, lowering),
        device=device,
        workload=workload,
        lowering=lowering,
        settings=settings,
        store=store,
        cache_dir=cache_dir,
    )


def whole_models(space: SearchSpace, backbone: ArchSpec, num: int, seed: int) -> list[ArchSpec]:
    """Choose `num` members of the space (fewer if it is tiny), spread over its sizes.

    The backbone is added at the end.
    """
    last = backbone.as_program()
    pool = space.stratified(np.random.default_rng(seed), max(num, _POOL))
    return [*[spec for spec in pool if spec != last][:num], last]


def make_grid(space: SearchSpace, backbone: ArchSpec, settings: LatencySettings) -> Grid:
    """Choose the blocks to measure: space and backbone lie between the points of their grid."""
    kinds = {*space.kinds, *backbone.layer_types}
    return Grid(
        model_dims=grid_points([*space.model_dims, backbone.model_dim], settings.grid_widths),
        ffn_dims=grid_points([*space.ffn_dims, *backbone.ffn_dims], settings.grid_ffn),
        kinds=tuple(sorted(kinds, key=lambda kind: kind.value)),
        heads=tuple(dict.fromkeys([*space.heads, (backbone.num_heads, backbone.num_kv_heads)])),
        vocab_sizes=tuple(dict.fromkeys([*space.vocab_sizes, backbone.vocab_size])),
    )


def _whole_ms(
    profiler: Profiler, models: Sequence[ArchSpec], point: Point
) -> tuple[Values, Values]:
    """Return latencies of measured models at one point, and their standard errors [ms]."""
    attempts = [profiler.attempts(Subject(spec=spec), point) for spec in models]
    return comparable(attempts, point.phase)


def _fit(
    profiler: Profiler,
    backbone: ArchSpec,
    grid: Grid | None,
    models: Sequence[ArchSpec],
    sources: _Sources,
) -> LatencyModel:
    """Fit and cross-validate the predictor of every point."""
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
            make = _maker(kind, point, profiler, table, sources.get(point))
            left_out = cross_predict(make, models, values, errors)
            scores[point][kind.value] = score(left_out, values)
            if kind is chosen:
                left_out_ms[point] = left_out.mean
        make = _maker(chosen, point, profiler, table, sources.get(point))
        predictors[point] = make().fit(models, values, errors)
        values_ms[point] = values
    return LatencyModel(
        predictor=chosen,
        predictors=predictors,
        objective=profiler.workload.first(profiler.settings.objective),
        scores=scores,
        models=tuple(models),
        values_ms=values_ms,
        left_out_ms=left_out_ms,
        rows=tuple(all_rows),
    )


def _maker(
    kind: PredictorKind,
    point: Point,
    profiler: Profiler,
    table: BlockTable | None,
    source: AnalyticalPredictor | None,
) -> Callable[[], Predictor]:
    """Return a function that makes an unfitted predictor of this kind."""
    match kind:
        case PredictorKind.analytical if source is not None:
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
    """Return the blocks of a grid, in the order of `Grid.parts`."""

    def block(part: BlockShape) -> Block:
        num_heads, num_kv_heads = part.heads or (backbone.num_heads, backbone.num_kv_heads)
        spec = backbone.replace(
            model_dim=part.model_dim,
            ffn_dim=part.ffn_dim or backbone.ffn_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            vocab_size=part.vocab_size or backbone.vocab_size,
        )
        return Block.of(BlockKind[part.name], spec)

    return [Subject(block=block(part)) for part in grid.parts()]
