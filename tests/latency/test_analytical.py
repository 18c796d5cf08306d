"""Facts about counted work and the analytical predictor, on a simulated device."""

from dataclasses import replace

import numpy as np
import pytest

from flash.arch import Attention
from flash.device.workload import Phase, Point
from flash.latency.analytical import AnalyticalPredictor
from flash.latency.cost_model import WORK_COLUMNS, SpecTable, nominal_work_ms, parameters
from flash.latency.gp import GaussianProcess
from flash.latency.power_law import PowerLaw
from flash.latency.prediction import score
from flash.lowering.settings import LoweringSettings, SlidingForm
from tests.latency.simulated import (
    BACKBONE,
    DECODE_512,
    FLASH,
    LOWERING,
    POINTS,
    PREFILL_512,
    SDPA,
    TINY,
    SimulatedDevice,
)

DEVICES = {
    "nominal": SimulatedDevice(),
    "slow_attention": SimulatedDevice(attention=3e6, elements=2e6),
    "slow_products": SimulatedDevice(
        gemm=2e7, stream=8e6, attention=3e7, elements=1e5, operator_ms=0.02
    ),
}
RING = LoweringSettings(max_context=2304, sliding=SlidingForm.ring)


def work_of(spec, point, lowering=LOWERING):
    work = nominal_work_ms(SpecTable.of([spec]), point, lowering, lowering.chunk)[0]
    return dict(zip(WORK_COLUMNS, work, strict=True))


def scores_of(predictor, device, space, point, lowering, seed, num):
    rng = np.random.default_rng(seed)
    specs = [*space.stratified(rng, num - 1), space.base]
    measured = device.measure(specs, point, rng, lowering)
    unseen = space.stratified(np.random.default_rng(seed + 1000), 100)
    prediction = predictor.fit(specs, measured).predict(unseen)
    return score(prediction, device.measure(unseen, point, rng, lowering))


def test_work_adds_up_over_layers():
    one, two = (
        work_of(FLASH.make(1024, 2048, BACKBONE.layer_types[:depth]), PREFILL_512, SDPA)
        for depth in (1, 2)
    )
    for name in ("ffn_gemm", "attention_gemm", "full", "operators"):
        assert two[name] == pytest.approx(2 * one[name])
    assert two["head"] == one["head"]


def test_attention_of_a_prompt_grows_with_its_square_and_a_mask_costs_every_slot():
    for lowering, least in ((SDPA, 3), (LOWERING, 2.5)):  # a part is linear
        short, long = (
            work_of(BACKBONE, Point(Phase.prefill, n), lowering)["full"] for n in (512, 1024)
        )
        assert least < long / short < 4
    sliding = BACKBONE.replace(layer_types=BACKBONE.layer_types[:1])
    full = work_of(sliding, PREFILL_512, SDPA)
    masked = sliding.replace(layer_types=("sliding_attention",))
    assert work_of(masked, PREFILL_512, SDPA)["sliding"] > 3 * full["full"]
    assert work_of(masked, PREFILL_512, RING)["sliding"] < full["full"]
    assert work_of(masked, PREFILL_512, RING)["mask"] == 0


def test_the_tail_of_a_model_sees_one_token_of_a_prompt():
    full, skip = Attention.full_attention, Attention.skip_attention
    tailed, short = (
        BACKBONE.replace(layer_types=kinds)
        for kinds in ((full, skip, full, skip, skip), (full, skip))
    )
    whole = replace(LOWERING, prefill_last_only=False)
    left, all_of_it, body = (
        work_of(spec, PREFILL_512, lowering)
        for spec, lowering in ((tailed, LOWERING), (tailed, whole), (short, whole))
    )
    assert body["ffn_gemm"] < left["ffn_gemm"] < 1.05 * body["ffn_gemm"] + all_of_it["head"]
    assert body["full"] < left["full"] < 0.7 * all_of_it["full"]
    assert left["head"] == all_of_it["head"]
    assert work_of(tailed, DECODE_512, LOWERING) == work_of(tailed, DECODE_512, whole)


def test_a_prompt_in_chunks_reads_the_weights_once_a_chunk():
    table = SpecTable.of([BACKBONE])
    point = Point(Phase.prefill, 2048)
    whole, chunked = (nominal_work_ms(table, point, SDPA, chunk)[0] for chunk in (2048, 512))
    assert chunked[WORK_COLUMNS.index("head")] == pytest.approx(
        4 * whole[WORK_COLUMNS.index("head")]
    )
    assert chunked[WORK_COLUMNS.index("full")] == pytest.approx(
        whole[WORK_COLUMNS.index("full")], rel=0.1
    )
    # Matrix products work on all keys up to the end of the call: in one call on twice as many.
    whole, chunked = (nominal_work_ms(table, point, LOWERING, chunk)[0] for chunk in (2048, 512))
    assert 0.6 < chunked[WORK_COLUMNS.index("full")] / whole[WORK_COLUMNS.index("full")] < 0.7


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize(
    ("space", "lowering", "points"),
    [(FLASH, LOWERING, POINTS), (TINY, LoweringSettings(max_context=1024), POINTS[::2])],
    ids=["flash", "tiny"],
)
def test_ten_models_are_enough_on_any_device(device, space, lowering, points):
    for point in points:
        scores = [
            scores_of(
                AnalyticalPredictor(point, lowering), device, space, point, lowering, seed, 10
            )
            for seed in range(3)
        ]
        # The noise of the measurements alone makes 2.1 %.
        assert np.mean([s.mape_pct for s in scores]) < 4.5, point
        assert np.mean([s.r2 for s in scores]) > 0.95, point


def test_intervals_hold_as_often_as_they_say():
    coverage = [
        scores_of(
            AnalyticalPredictor(point, LOWERING),
            DEVICES["nominal"],
            FLASH,
            point,
            LOWERING,
            seed,
            num,
        ).coverage_90
        for point in (PREFILL_512, DECODE_512)
        for num in (12, 33)
        for seed in range(6)
    ]
    assert 0.84 <= np.mean(coverage) <= 0.96


def test_analytical_predictor_beats_the_process_over_shapes_and_parameters():
    point, device = PREFILL_512, DEVICES["nominal"]
    errors = {
        name: np.mean([
            scores_of(make(), device, FLASH, point, LOWERING, seed, 16).mape_pct
            for seed in range(4)
        ])
        for name, make in {
            "analytical": lambda: AnalyticalPredictor(point, LOWERING),
            "gp": GaussianProcess,
            "params": lambda: PowerLaw(parameters),
        }.items()
    }
    assert 1.2 * errors["analytical"] < errors["gp"]
    assert 1.5 * errors["gp"] < errors["params"]


def test_ring_form_is_learned_as_well():
    scores = scores_of(
        AnalyticalPredictor(PREFILL_512, RING), DEVICES["nominal"], FLASH, PREFILL_512, RING, 0, 16
    )
    assert scores.mape_pct < 4
