"""Facts about the transfer of a predictor from one device to another."""

import numpy as np
import pytest

from flash.latency.analytical import AnalyticalPredictor
from flash.latency.prediction import score
from flash.latency.transfer import TransferPredictor
from tests.latency.simulated import (
    BACKBONE,
    DECODE_512,
    FLASH,
    PREFILL_512,
    SDPA,
    SimulatedDevice,
)

FIRST = SimulatedDevice(attention=4e6, gemm=4e7, elements=2e6)
SECOND = {
    "two_threads": SimulatedDevice(
        attention=7.5e6, gemm=7.6e7, elements=3e6, stream=1.8e7, operator_ms=0.003
    ),
    "other_ratios": SimulatedDevice(attention=2e7, gemm=1.2e8, elements=2e5, operator_ms=0.02),
}


def scores_of(predictor, device, point, num, seed):
    rng = np.random.default_rng(seed)
    specs = [BACKBONE, *FLASH.stratified(rng, num - 1)]
    predictor.fit(specs, device.measure(specs, point, rng, SDPA))
    unseen = FLASH.stratified(rng, 80)
    return score(predictor.predict(unseen), device.measure(unseen, point, rng, SDPA))


def source(point, seed=0):
    rng = np.random.default_rng(seed)
    specs = [BACKBONE, *FLASH.stratified(rng, 32)]
    return AnalyticalPredictor(point, SDPA).fit(specs, FIRST.measure(specs, point, rng, SDPA))


@pytest.mark.parametrize("point", [PREFILL_512, DECODE_512], ids=str)
@pytest.mark.parametrize("device", SECOND.values(), ids=SECOND)
def test_transfer_is_no_worse_than_starting_anew(device, point):
    known = source(point)
    errors, errors_anew, coverage = [], [], []
    for num in (4, 8, 20):
        transferred, anew = (
            [scores_of(make(), device, point, num, seed) for seed in range(5)]
            for make in (lambda: TransferPredictor(known), lambda: AnalyticalPredictor(point, SDPA))
        )
        errors.append(np.mean([s.mape_pct for s in transferred]))
        errors_anew.append(np.mean([s.mape_pct for s in anew]))
        coverage.append(np.mean([s.coverage_90 for s in transferred]))
        assert errors[-1] < 1.1 * errors_anew[-1], num
    assert np.mean(errors) <= 1.01 * np.mean(errors_anew)
    assert 0.82 <= np.mean(coverage) <= 0.98


def test_four_models_are_enough_for_a_device_with_like_ratios():
    known = source(PREFILL_512)
    scores = [
        scores_of(TransferPredictor(known), SECOND["two_threads"], PREFILL_512, 4, seed)
        for seed in range(5)
    ]
    assert np.mean([s.mape_pct for s in scores]) < 3.5  # the noise alone makes 2.1 %


def test_the_source_is_left_as_it_is():
    known = source(PREFILL_512)
    before = known.predict([BACKBONE]).mean
    scores_of(TransferPredictor(known), SECOND["other_ratios"], PREFILL_512, 8, 0)
    np.testing.assert_array_equal(known.predict([BACKBONE]).mean, before)
