"""The loss curve of a run: interruptions, observers, and continuation for more tokens."""

import dataclasses

import pytest

from flash.errors import InputError
from flash.model.decoder import Decoder
from flash.training.fit import fit
from flash.training.loss_curve import Curve
from flash.training.result import STABLE
from flash.training.settings import (
    Precision,
    RecipeSettings,
    Schedule,
    TrainerSettings,
    native_precision,
)
from tests.conftest import SMALL
from tests.training.decoders import make_model, same_weights

RECIPE = RecipeSettings(
    name="t",
    tokens=12 * 128,
    batch_size=4,
    lr=3e-3,
    warmup_ratio=0.25,
    decay_ratio=0.5,
    schedule=Schedule.wsd,
)
TRAINER = TrainerSettings(precision=Precision.fp32, checkpoint_every_steps=1)


def test_parts_of_a_curve_are_means_over_equal_parts_of_the_run():
    assert Curve.of([3.0, 1.0, 2.0], 4) == Curve((3.0, 1.0, 2.0), 4)
    curve = Curve.of([float(i) for i in range(50)], 96)
    assert curve.parts == 32
    assert curve.losses == tuple(3.0 * i + 1 for i in range(16))  # the 17th part is not finished
    assert curve.points(9600)[:2] == [[300.0, 1.0], [600.0, 4.0]]


def test_a_run_that_goes_on_for_longer_is_the_longer_run(data, tmp_path):
    longer = RECIPE.longer(20 * 128, 32)
    assert (RECIPE.stable_steps(32), longer.stable_steps(32)) == (6, 10)
    short, whole, resumed = make_model(), make_model(), Decoder(SMALL)
    first = fit(short, data, RECIPE, TRAINER, folder=tmp_path / "short", keep_stable=True)
    expected = fit(whole, data, longer, TRAINER)
    done = fit(resumed, data, longer, TRAINER, start=tmp_path / "short" / STABLE)
    assert same_weights(resumed, whole)
    assert not same_weights(short, whole)
    assert done.steps == 20
    assert list(done.curve) == list(expected.curve)
    assert list(done.curve[:8]) == list(first.curve[:8])
    assert done.curve[8] != first.curve[8]  # the learning rate of the short run has begun to fall


def test_a_stopped_run_keeps_its_curve(data, tmp_path):
    seen = []

    def stop_once(curve):
        seen.append(len(curve.losses))
        if len(seen) == 5:
            raise InputError("enough")

    with pytest.raises(InputError, match="enough"):
        fit(make_model(), data, RECIPE, TRAINER, folder=tmp_path, watch=stop_once)
    resumed = fit(Decoder(SMALL), data, RECIPE, TRAINER, folder=tmp_path, watch=stop_once)
    assert seen == [
        1,
        2,
        3,
        4,
        5,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
        12,
    ]  # part 5 ended before its checkpoint was written
    assert list(resumed.curve) == list(fit(make_model(), data, RECIPE, TRAINER).curve)


def test_a_cosine_schedule_cannot_be_continued():
    assert dataclasses.replace(RECIPE, schedule=Schedule.cosine).stable_steps(32) == 0


def test_automatic_precision_is_settled_when_settings_are_made(monkeypatch):
    fp32, bf16 = Precision.fp32, Precision.bf16
    for words, expected in (
        ({"GenuineIntel", "avx512_bf16", "amx_bf16"}, bf16),
        ({"GenuineIntel", "avx512_bf16"}, fp32),
        ({"AuthenticAMD", "avx512_bf16"}, bf16),
        ({"AuthenticAMD", "avx2"}, fp32),
        ({"asimd", "bf16"}, bf16),
    ):
        monkeypatch.setattr("flash.training.settings._cpu_words", lambda known=words: known)
        assert TrainerSettings().precision is expected
    assert native_precision("gpu") is Precision.bf16
    assert TrainerSettings(precision=Precision.fp32).precision is Precision.fp32
