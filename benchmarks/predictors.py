"""Accuracy and cost of latency predictors on whole models of the paper's space.

The dataset is benchmarks/data/flash_space.jsonl. Cases are `<predictor>/<latency>`. `blocks` is
calibrated on the default 4 models and the backbone, and tested on the others. `analytical_8` and
`analytical_12` are fitted to 8 and 12 models selected by active learning, and tested on the others.
All other cases are leave-one-out. `cost_s` is the cost of the predictor: lowering and device time
of all programs of its fit. `cost_share_of_800` is that cost relative to 800 such whole models, the
paper's stage 1.
"""

from collections.abc import Callable, Iterable

import flash_space
import numpy as np
from record import SMOKE, Recorder

import conf
from flash.arch import ArchSpec
from flash.device.workload import Point
from flash.latency.active_learning import choose
from flash.latency.analytical import AnalyticalPredictor
from flash.latency.blocks import BlockPredictor
from flash.latency.composition import BlockTable
from flash.latency.cost_model import flops, parameters
from flash.latency.drift import comparable
from flash.latency.fit import grid_subjects, make_grid
from flash.latency.gp import GaussianProcess
from flash.latency.power_law import PowerLaw
from flash.latency.prediction import Prediction, Predictor, cross_predict, score
from flash.latency.profiler import Profiler
from flash.latency.programs import Subject
from flash.latency.settings import LatencySettings
from flash.latency.store import StoredLatency

PAPER_MODELS = 800
CALIBRATION_MODELS = LatencySettings().calibration_models


def cost_s(bench: Profiler, subjects: Iterable[Subject]) -> float:
    """Sum the lowering and device time of all latencies of the subjects [s]."""
    rows: list[StoredLatency] = []
    lowering_s = 0.0
    for subject in subjects:
        mine = [row for point in bench.workload.points for row in bench.attempts(subject, point)]
        lowering_s += mine[0].result["lower_s"]
        rows += mine
    return lowering_s + device_s(rows)


def device_s(rows: Iterable[StoredLatency]) -> float:
    """Time that the device spent on these measurements, each process counted once [s]."""
    processes = {
        each["started"]: each["process"]["wall_s"]
        for row in rows
        for each in row.result["conditions"]
    }
    return sum(processes.values())


def main() -> None:
    record = Recorder("predictors")
    bench = flash_space.recorded()
    models = flash_space.models()
    whole = [Subject(spec=spec) for spec in models]
    backbone = conf.flash_backbone()
    grid = make_grid(conf.space("flash"), backbone, flash_space.SETTINGS)
    parts = grid_subjects(grid, backbone)
    whole_s, parts_s = cost_s(bench, whole), cost_s(bench, parts)
    paper_s = whole_s / len(models) * PAPER_MODELS

    for point in bench.workload.points[: 1 if SMOKE else None]:
        all_ms, errors = comparable(
            [bench.attempts(subject, point) for subject in (*parts, *whole)], point.phase
        )
        values, errors = all_ms[len(parts) :], errors[len(parts) :]

        def analytical(point: Point = point) -> AnalyticalPredictor:
            return AnalyticalPredictor(point, bench.lowering, bench.lowering.chunk)

        makers: dict[str, tuple[Callable[[], Predictor], float]] = {
            "analytical": (analytical, whole_s),
            "gp": (GaussianProcess, whole_s),
            "params": (lambda: PowerLaw(parameters), whole_s),
            "flops": (lambda point=point: PowerLaw(lambda t: flops(t, point)), whole_s),
        }
        for name, (make, spent_s) in makers.items():
            left_out = cross_predict(make, models, values, errors, folds=len(models))
            _report(record, f"{name}/{point}", left_out, values, spent_s, paper_s)
        fits: list[tuple[str, Predictor, list[int], float]] = [
            ("analytical_8", analytical(), _pick(analytical(), models, 8), 0.0),
            ("analytical_12", analytical(), _pick(analytical(), models, 12), 0.0),
        ]
        parts_ms = dict(zip(grid.parts(), all_ms[: len(parts)].tolist(), strict=True))
        table = BlockTable(point, backbone, grid, parts_ms, bench.lowering)
        ratios = table.compose(models).total_ms / values
        record.add(f"blocks/{point}", "sum_over_measured", ratios.tolist(), "ratio")
        few = [*range(CALIBRATION_MODELS), len(models) - 1]
        fits.append(("blocks", BlockPredictor(table), few, parts_s))
        for name, unfitted, picked, more_s in fits:
            rest = [i for i in range(len(models)) if i not in picked]
            fitted = unfitted.fit([models[i] for i in picked], values[picked], errors[picked])
            prediction = fitted.predict([models[i] for i in rest])
            spent_s = more_s + cost_s(bench, [whole[i] for i in picked])
            _report(record, f"{name}/{point}", prediction, values[rest], spent_s, paper_s)
    record.close()


def _pick(unfitted: AnalyticalPredictor, models: list[ArchSpec], num: int) -> list[int]:
    """Return the indices of the backbone and of models chosen before any measurement."""
    chosen = {models[-1], *choose(unfitted, [models[-1]], models, num - 1)}
    return [i for i, spec in enumerate(models) if spec in chosen]


def _report(
    record: Recorder,
    case: str,
    prediction: Prediction,
    values: np.ndarray,
    spent_s: float,
    paper_s: float,
) -> None:
    scores = score(prediction, values)
    record.add(case, "r2", [scores.r2], "ratio")
    record.add(case, "mape_pct", [scores.mape_pct], "%")
    record.add(case, "kendall_tau", [scores.kendall_tau], "ratio")
    record.add(case, "coverage_90", [scores.coverage_90], "ratio")
    record.add(case, "tested_on", [scores.n], "models")
    record.add(case, "cost_s", [spent_s], "s")
    record.add(case, "cost_share_of_800", [spent_s / paper_s], "ratio")


if __name__ == "__main__":
    main()
