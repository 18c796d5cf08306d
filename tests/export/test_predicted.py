"""Predictions of stage 1 and measurements of exports are of the same state of the machine."""

import pytest

from flash.export.predicted import PredictedLatencies
from tests.search import toy_search as toy

BACKBONE = toy.BACKBONE
FOUND = PredictedLatencies(
    by_point={
        "prefill_64": {"mean_ms": 10.0, "low_ms": 9.0, "high_ms": 12.0},
        "decode_64": {"mean_ms": 2.0, "low_ms": 1.0, "high_ms": 3.0},
    },
    backbone=BACKBONE.as_program(),
    backbone_ms={"prefill_64": 40.0, "decode_64": 4.0},
)


def test_latencies_are_slower_by_as_much_as_the_backbone():
    found = FOUND.at(BACKBONE, {"prefill_64": 44.0, "decode_64": 3.0})
    prefill, decode = found["prefill_64"], found["decode_64"]
    assert prefill == pytest.approx({
        "mean_ms": 11.0,
        "low_ms": 9.9,
        "high_ms": 13.2,
        "slowdown": 1.1,
    })
    assert decode == pytest.approx({
        "mean_ms": 1.5,
        "low_ms": 0.75,
        "high_ms": 2.25,
        "slowdown": 0.75,
    })


def test_another_reference_or_none_leaves_the_prediction():
    raw = {point: {**values, "slowdown": 1.0} for point, values in FOUND.by_point.items()}
    other = BACKBONE.replace(ffn_dim=2 * BACKBONE.ffn_dim)
    assert FOUND.at(other, {"prefill_64": 44.0, "decode_64": 3.0}) == raw
    assert FOUND.at(None, {}) == raw
    only = FOUND.at(BACKBONE, {"prefill_64": 44.0})
    assert [only[point]["slowdown"] for point in only] == pytest.approx([1.1, 1.0])
