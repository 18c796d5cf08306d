"""Results of exports: files of older versions."""

import dataclasses
import math
from typing import Any

import pytest

from flash.export.result import ProgramQuality
from flash.lowering.loss_change import LossChange
from flash.records import convert

CHANGE = LossChange(float_loss=2.0, loss=2.01, se=0.002, tokens=511)
FLAT = {"float_loss": 2.0, "pte_loss": 2.01, "tokens": 511, "agreement": 0.9}


def read(values: dict[str, Any]) -> ProgramQuality:
    return convert(ProgramQuality, ProgramQuality.present(values))


def test_the_quality_of_a_program_is_read_back():
    quality = ProgramQuality(change=CHANGE, agreement=0.9)
    assert read(dataclasses.asdict(quality)) == quality


def test_results_of_older_versions_are_read():
    quality = ProgramQuality(change=CHANGE, agreement=0.9)
    assert read({**FLAT, "se": 0.002}) == quality
    oldest = read(FLAT).change
    assert math.isnan(oldest.se)
    assert oldest.perplexity_pct == pytest.approx(1.005, abs=1e-3)
