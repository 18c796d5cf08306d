"""Stage 1 of the search: measure what is missing, fit the predictors (Sec. 3.4 of the paper)."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from flash.arch import ArchSpec, SearchSpace, count_parameters, decode_flops, prefill_flops
from flash.device import Device, Workload
from flash.errors import require
from flash.latency.bench import PROTOCOL, Bench, Subject, comparable, plain
from flash.latency.blocks import BlockPredictor
from flash.latency.composition import BlockTable, Grid, Part, grid_points
from flash.latency.gp import GaussianProcess
from flash.latency.prediction import Predictor, Scores, Values, cross_predict, score
from flash.latency.proxies import PowerLaw
from flash.latency.settings import LatencySettings, Objective, PredictorKind
from flash.latency.store import Conditions, MeasurementStore, Row
from flash.lowering import Block, BlockKind, LoweringSettings

logger = logging.getLogger(__name__)

_POOL = 1024
"""Whole models are the first of a longer list, so asking for more keeps those already measured."""


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
        values_ms: Their measured latencies for each phase [ms], freed from drift of the device.
        left_out_ms: What the chosen predictor says of them when fitted to the others [ms].
        rows: Every measurement that was used.
    """

    prefill: Predictor
    decode: Predictor
    objective: Objective
    scores: dict[Objective, dict[str, Scores]]
    models: tuple[ArchSpec, ...]
    values_ms: dict[Objective, Values]
    left_out_ms: dict[Objective, Values]
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
    subjects = [
        *(Subject(block=_block(part, backbone)) for part in (grid.parts() if grid else ())),
        *(Subject(spec=spec) for spec in models),
    ]
    conditions = conditions_of(device, workload, lowering)
    bench = Bench(
        reference=subjects[-1],
        conditions=conditions,
        device=device,
        workload=workload,
        lowering=lowering,
        settings=settings,
        store=store,
        cache_dir=cache_dir,
    )
    bench.measure_missing(subjects)
    model = _fit(settings, workload, backbone, grid, models, bench.rows(subjects))
    for line in model.describe().splitlines():
        logger.info("latency: %s", line)
    return model


def conditions_of(device: Device, workload: Workload, lowering: LoweringSettings) -> Conditions:
    """What a measurement on this device depends on, as the store keys it."""
    return Conditions(
        workload=workload.to_dict(),
        protocol={name: getattr(device.settings, name) for name in PROTOCOL},
        lowering=plain(lowering),
        runtime=f"executorch {version('executorch')}",
        device=device.identity(),
    )


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


def _fit(
    settings: LatencySettings,
    workload: Workload,
    backbone: ArchSpec,
    grid: Grid | None,
    models: Sequence[ArchSpec],
    rows: Sequence[Row],
) -> LatencyModel:
    """Fit and cross-validate both phases. The rows are those of the grid, then of the models."""
    predictors: dict[Objective, Predictor] = {}
    values_ms: dict[Objective, Values] = {}
    left_out_ms: dict[Objective, Values] = {}
    scores: dict[Objective, dict[str, Scores]] = {}
    for phase in Objective:
        all_ms, all_errors_ms = comparable(rows, phase)
        values, errors = all_ms[-len(models) :], all_errors_ms[-len(models) :]
        table = None
        if grid is not None:
            parts_ms = dict(zip(grid.parts(), all_ms.tolist(), strict=False))
            table = BlockTable(backbone, grid, parts_ms)
        scores[phase] = {}
        for kind in dict.fromkeys((settings.predictor, PredictorKind.params, PredictorKind.flops)):
            make = _maker(kind, phase, workload, table)
            left_out = cross_predict(make, models, values, errors)
            scores[phase][kind.value] = score(left_out, values)
            if kind is settings.predictor:
                left_out_ms[phase] = left_out.mean
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
        left_out_ms=left_out_ms,
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
