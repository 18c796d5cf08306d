"""Steps that must be left out, gradients of micro-batches, and the estimate of time and cost."""

import dataclasses
import logging
import math

import pytest
import torch

from flash.errors import InputError
from flash.training.fit import fit
from flash.training.lightning_module import LanguageModeling
from flash.training.loss_curve import Curve
from flash.training.settings import LrReference, OnSpike, Precision, RecipeSettings, TrainerSettings
from flash.training.stability import StepGuard, StepStatus
from tests.training.decoders import make_model, same_weights

RECIPE = RecipeSettings(name="test", tokens=24 * 128, batch_size=4, lr=3e-3)
TRAINER = TrainerSettings(precision=Precision.fp32, checkpoint_every_steps=10)


@pytest.fixture
def spoil(monkeypatch):
    """A function that multiplies the loss of some steps by a factor."""

    def spoil(steps, factor):
        losses = LanguageModeling.losses

        def spoiled(self, batch):
            sums, count = losses(self, batch)
            if self.trainer.global_step in steps:
                sums = type(sums)(*(part * factor for part in sums))
            return sums, count

        monkeypatch.setattr(LanguageModeling, "losses", spoiled)

    return spoil


def test_a_step_without_a_finite_gradient_is_left_out(data, spoil):
    spoil({3, 7}, math.nan)
    model = make_model()
    done = fit(model, data, RECIPE, TRAINER)
    assert (done.steps, done.skipped_steps) == (24, 2)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_too_many_in_a_row_end_the_run(data, spoil):
    spoil(range(5, 24), math.inf)
    with pytest.raises(InputError, match=r"recipe\.lr=0\.003: training diverged, 4 steps in a row"):
        fit(make_model(), data, RECIPE, dataclasses.replace(TRAINER, max_skipped=3))


def test_a_short_run_of_nothing_but_bad_steps_is_no_result(data, spoil):
    spoil(range(24), math.nan)
    with pytest.raises(InputError, match="diverged, its last 4 of 4 steps"):
        fit(make_model(), data, RECIPE, dataclasses.replace(TRAINER, max_steps=4))


def test_the_count_of_steps_left_out_survives_an_interruption(data, spoil, tmp_path):
    spoil({3, 15}, math.nan)
    fit(make_model(), data, RECIPE, dataclasses.replace(TRAINER, max_steps=10), folder=tmp_path)
    assert fit(make_model(), data, RECIPE, TRAINER, folder=tmp_path).skipped_steps == 2


def test_a_spike_is_left_out_or_rewound(data, spoil, tmp_path):
    spoil({20}, 50.0)
    calm = make_model()
    fit(calm, data, RECIPE, TRAINER)
    watchful = dataclasses.replace(TRAINER, spike_factor=10.0)
    skipping, rewinding = make_model(), make_model()
    assert fit(skipping, data, RECIPE, watchful).skipped_steps == 1
    assert not same_weights(calm, skipping)
    rewind = dataclasses.replace(watchful, on_spike=OnSpike.rewind, max_steps=21)
    done = fit(rewinding, data, RECIPE, rewind, folder=tmp_path)
    assert (done.steps, done.skipped_steps) == (21, 1)
    at_20 = make_model()  # the checkpoint before the spike is of step 20
    fit(at_20, data, RECIPE, dataclasses.replace(watchful, max_steps=20))
    assert same_weights(rewinding, at_20)


def test_a_spike_is_far_above_the_recent_losses():
    guard = StepGuard(5.0, 3, 1e-3)
    for i in range(20):
        assert guard.check(2.0 + 0.01 * (i % 5), 1.0) is StepStatus.good
    assert guard.check(2.1, 1.0) is StepStatus.good
    assert guard.check(2.5, 1.0) is StepStatus.spike
    assert guard.check(2.0, math.nan) is StepStatus.non_finite
    assert guard.check(2.0, 1.0) is StepStatus.good
    assert (guard.skipped, guard.skipped_in_a_row) == (2, 0)
    assert StepGuard(None, 3, 1e-3).check(1e6, 1.0) is StepStatus.good


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_add_up_to_the_batch(data, micro_batch):
    whole, parts = make_model(), make_model()
    expected = fit(whole, data, RECIPE, TRAINER)
    done = fit(parts, data, RECIPE, dataclasses.replace(TRAINER, micro_batch=micro_batch))
    assert done.steps == expected.steps
    assert list(done.curve) == pytest.approx(list(expected.curve), rel=1e-4)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_activation_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    plain, kept = make_model(), make_model()
    kept.checkpoint_layers = True
    tokens = torch.randint(0, 320, (2, 20))
    for model in (plain, kept):
        model(tokens).logsumexp(-1).sum().backward()
    for a, b in zip(plain.parameters(), kept.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_learning_rate_scales_from_where_it_was_found():
    reference = LrReference(model_dim=1280, batch_tokens=2_000_000)
    recipe = RecipeSettings(name="x", tokens=1, batch_size=250, lr=4e-4, lr_reference=reference)
    assert recipe.peak_lr(1280, 2000) == pytest.approx(2e-4)
    assert recipe.peak_lr(640, 2000) == pytest.approx(4e-4)
    assert RecipeSettings(name="x", tokens=1, lr=4e-4).peak_lr(640, 2000) == 4e-4
    by_width = dataclasses.replace(recipe, lr_reference=LrReference(model_dim=1280))
    assert by_width.peak_lr(640, 2000) == pytest.approx(8e-4)


def test_a_run_says_how_long_it_will_take_and_what_it_will_cost(data, monkeypatch, caplog):
    monkeypatch.setattr("flash.training.callbacks.measure_peak_flops", lambda *args: 1e5)
    caplog.set_level(logging.INFO)
    trainer = dataclasses.replace(TRAINER, usd_per_hour=2.0)
    fit(make_model(), data, RECIPE, trainer, label="small")
    logged = [r.getMessage() for r in caplog.records if "hours" in r.getMessage()]
    assert len(logged) == 1  # by the times of the first steps the run is too short for a second
    assert logged[0].startswith("small: 3,072 tokens in 24 steps on 1 device(s): about")
    assert logged[0].endswith("USD")


def test_a_resumed_guard_checks_as_one_that_was_not_stopped():
    whole, resumed = StepGuard(5.0, 3, 1e-3), StepGuard(5.0, 3, 1e-3)
    for i in range(20):
        whole.check(2.0 + 0.01 * (i % 5), 1.0)
    resumed.load_state_dict(whole.state_dict())
    assert resumed.check(2.5, 1.0) is whole.check(2.5, 1.0) is StepStatus.spike
    assert (resumed.skipped, resumed.skipped_in_a_row) == (1, 1)


def test_a_step_left_out_leaves_no_hole_in_the_curve():
    assert Curve.of([math.nan if i == 3 else float(i // 2) for i in range(64)], 64).losses[1] == 1.0
