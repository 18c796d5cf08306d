"""Predictions per second for random specs of the paper's space, on one thread.

Each predictor is fitted to 33 models with synthetic latencies, since speed does not depend on the
values. The case `specs` starts from a list of `ArchSpec`, `table` from a `SpecTable` built before,
and `table/of_specs` is the building of the table.
"""

import time
from collections.abc import Callable

import numpy as np
from record import SMOKE, Recorder

import conf
from flash.arch import prefill_flops
from flash.device.workload import Phase, Point
from flash.latency.analytical import AnalyticalPredictor
from flash.latency.blocks import BlockPredictor
from flash.latency.composition import BlockTable, Grid, grid_points
from flash.latency.cost_model import SpecTable, flops, parameters
from flash.latency.gp import GaussianProcess
from flash.latency.power_law import PowerLaw
from flash.latency.prediction import Predictor
from flash.lowering.settings import LoweringSettings

# Drawing a spec takes a tenth of a millisecond, so that few of many are distinct.
ROUNDS, NUM_SPECS, NUM_DISTINCT = (1, 200, 50) if SMOKE else (5, 100_000, 5_000)
POINT = Point(Phase.prefill, 512)
SPACE, BACKBONE = conf.space("flash"), conf.flash_backbone()


def _blocks() -> BlockPredictor:
    grid = Grid(
        model_dims=grid_points(SPACE.model_dims, 3),
        ffn_dims=grid_points(SPACE.ffn_dims, 3),
        kinds=SPACE.kinds,
        heads=SPACE.heads,
        vocab_sizes=SPACE.vocab_sizes,
    )
    parts_ms = {part: 1e-3 * part.model_dim * (part.ffn_dim or 64) ** 0.5 for part in grid.parts()}
    return BlockPredictor(BlockTable(POINT, BACKBONE, grid, parts_ms, LoweringSettings()))


def _rate(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return NUM_SPECS / (time.perf_counter() - start)


def main() -> None:
    record = Recorder("throughput_predictors")
    rng = np.random.default_rng(0)
    distinct = [SPACE.sample(rng) for _ in range(NUM_DISTINCT)]
    specs = [distinct[i] for i in rng.integers(NUM_DISTINCT, size=NUM_SPECS)]
    table = SpecTable.of(specs)
    fitted = [BACKBONE, *SPACE.stratified(rng, 32)]
    values_ms = np.array([1e-8 * prefill_flops(spec, 512) for spec in fitted])
    values_ms *= np.exp(0.02 * rng.standard_normal(len(fitted)))
    predictors: dict[str, Predictor] = {
        "blocks": _blocks(),
        "gp": GaussianProcess(),
        "analytical": AnalyticalPredictor(POINT, LoweringSettings()),
        "params": PowerLaw(parameters),
        "flops": PowerLaw(lambda counted: flops(counted, POINT)),
    }
    rates = [_rate(lambda: SpecTable.of(specs)) for _ in range(ROUNDS)]
    record.add("table/of_specs", "specs_per_s", rates, "1/s")
    for name, predictor in predictors.items():
        predictor.fit(fitted, values_ms)
        for kind, given in (("specs", specs), ("table", table)):

            def run(predictor=predictor, given=given) -> object:
                return predictor.predict(given)

            rates = [_rate(run) for _ in range(ROUNDS)]
            record.add(f"{name}/{kind}", "predictions_per_s", rates, "1/s")
    record.close()


if __name__ == "__main__":
    main()
