"""The estimate of a search's duration, against the trials themselves."""

import dataclasses

import pytest

from flash.arch import Choices, FfnChoices, SearchSpace, SpaceSettings
from flash.search.estimate import step_seconds, trial_hours
from flash.training.settings import Precision, RecipeSettings, TrainerSettings
from tests.conftest import SMALL

RECIPE = RecipeSettings(name="test", tokens=64 * 256, batch_size=2)
TRAINER = TrainerSettings(precision=Precision.fp32)
SPACE = SearchSpace(
    SpaceSettings(
        name="one",
        num_layers=Choices(min=3, max=3),
        model_dim=Choices(min=64, max=64, step=32),
        ffn_dim=FfnChoices(min=128, max=128, step=32),
    ),
    SMALL,
)


def test_hours_are_steps_times_the_duration_of_one(monkeypatch):
    assert step_seconds(SMALL, RECIPE, TRAINER, 128) > 0
    monkeypatch.setattr("flash.search.estimate.step_seconds", lambda *_: 2.0)
    assert trial_hours(SPACE, RECIPE, TRAINER, 128, SMALL) == pytest.approx(64 * 2 / 3600, rel=0.2)


def test_a_teacher_that_runs_along_takes_time_and_a_heard_one_none(monkeypatch):
    monkeypatch.setattr("flash.search.estimate.step_seconds", lambda *_: 1.0)
    plain = trial_hours(SPACE, RECIPE, TRAINER, 128, SMALL)
    along = dataclasses.replace(RECIPE, kd_weight=0.5)
    assert trial_hours(SPACE, along, TRAINER, 128, SMALL) > 1.2 * plain
    heard = dataclasses.replace(along, kd_top_k=8)
    assert trial_hours(SPACE, heard, TRAINER, 128, SMALL) == plain
