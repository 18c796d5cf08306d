"""Facts about early stopping: savings, and an error rate within the setting."""

import numpy as np
import pytest
from optuna.trial import TrialState

from flash.search.loop import frontier
from flash.search.pruner import MIN_TRIALS, LossPrediction, TrialPruned, maybe_prune
from flash.search.quality import Quality
from flash.search.trial import Trial
from flash.training.loss_curve import Curve
from tests.search import toy_search as toy

PARTS = 4


def curve_of(final: float, rng: np.random.Generator) -> list[float]:
    """Draw the losses of a run that ends near `final`; early losses correlate less with it."""
    noise = rng.normal(size=PARTS) * 0.02 * np.arange(PARTS, 0, -1)
    return list(final**0.8 * 1.5 * np.exp(noise))


def trial(number, loss, cost, curve, state=TrialState.COMPLETE):
    return Trial(
        number=number,
        spec=toy.BACKBONE,
        costs={"prefill_ms": cost},
        state=state,
        loss=loss if state is TrialState.COMPLETE else None,
        extra={"curve": [[0.0, each] for each in curve]},
        batch=(0, 1),
    )


def verdict(running, curve, trials, error):
    """Return the first decision of the pruner to stop a run, at any of its rungs."""
    for parts in range(1, PARTS + 1):
        try:
            maybe_prune(running, Curve(tuple(curve[:parts]), PARTS), trials, toy.PROBLEM, error)
        except TrialPruned as pruned:
            return pruned
    return None


@pytest.mark.parametrize("error", [0.05, 0.2])
def test_stopped_trials_that_would_have_reached_the_frontier_are_as_rare_as_was_said(error):
    rng = np.random.default_rng(0)
    stopped = wrong = good = 0
    for _ in range(3000):
        finals = 2.2 + 0.8 * rng.random(20)
        costs = 10 + 10 * rng.random(20)
        done = [trial(i, finals[i], costs[i], curve_of(finals[i], rng)) for i in range(20)]
        final, cost = 2.2 + 0.8 * rng.random(), 10 + 10 * rng.random()
        running = trial(20, final, cost, [], TrialState.RUNNING)
        ended = verdict(running, curve_of(final, rng), done, error) is not None
        rivals = [loss for loss, at in zip(finals, costs, strict=True) if at <= cost]
        reaches = final < min([toy.PROBLEM.reference[0], *rivals])
        stopped, wrong, good = stopped + ended, wrong + (ended and reaches), good + reaches
    assert stopped > 900  # of about 2500 that are beaten
    assert wrong <= error * good


def test_a_few_complete_trials_end_none_and_neither_does_an_error_of_zero():
    rng = np.random.default_rng(0)
    losses = np.linspace(2.2, 3.0, MIN_TRIALS)
    done = [trial(i, loss, 1.0, curve_of(loss, rng)) for i, loss in enumerate(losses)]
    running, bad = trial(9, 0, 30.0, [], TrialState.RUNNING), curve_of(9.0, rng)
    assert verdict(running, bad, done, 0.05) is not None
    assert verdict(running, bad, done[1:], 0.05) is None
    assert verdict(running, bad, done, 0.0) is None
    cheapest = trial(9, 0, 0.5, [], TrialState.RUNNING)  # none is as cheap, so only 9 nats count
    assert verdict(cheapest, curve_of(3.0, rng), done, 0.05) is None


def test_a_forecast_is_a_line_in_logarithms():
    partial = np.array([2.0, 3.0, 4.0, 5.0])
    exact = LossPrediction.of(partial, 0.5 * partial**0.7, 6.0)
    assert np.exp(exact.mean) == pytest.approx(0.5 * 6.0**0.7)
    assert exact.scale == pytest.approx(0, abs=1e-9)
    noisy = LossPrediction.of(partial, [1.0, 1.3, 1.2, 1.5], 3.0)
    far = LossPrediction.of(partial, [1.0, 1.3, 1.2, 1.5], 30.0)
    assert noisy.probability_below(10.0) > 0.99
    assert 0.4 < noisy.probability_below(float(np.exp(noisy.mean))) < 0.6
    assert far.scale > noisy.scale
    constant = LossPrediction.of([2.0] * 3, [1.0, 2.0, 3.0], 2.0)
    assert constant.mean == pytest.approx(np.log([1.0, 2.0, 3.0]).mean())


def evaluation(evaluated=None):
    """Evaluator of trials whose training losses predict the final loss well."""

    def evaluate(spec, number, watch):
        curve = [toy.loss(spec) * (1.2 + 0.1 * part) for part in range(PARTS, 0, -1)]
        for parts in range(1, PARTS + 1):
            try:
                watch(Curve(tuple(curve[:parts]), PARTS))
            except TrialPruned as pruned:
                pruned.info["curve"] = [[parts, loss] for loss in curve[:parts]]
                raise
        if evaluated is not None:
            evaluated.append(number)
        return Quality(toy.loss(spec), {"curve": [[0, loss] for loss in curve]})

    return evaluate


def test_a_search_stops_beaten_trials_and_learns_from_them(tmp_path):
    path, evaluated = tmp_path / "study.db", []
    trials = toy.run(path, evaluate=evaluation(evaluated), trials=32)
    stopped = [t for t in trials if t.stopped]
    assert len(stopped) >= 4
    assert {t.number for t in trials} - {t.number for t in stopped} == set(evaluated)
    for each in stopped:
        assert each.loss is None
        assert each.expected_loss == pytest.approx(toy.loss(each.spec), rel=1e-3)
        assert "chance of reaching the frontier" in each.extra["reason"]
        rivals = [
            t.loss
            for t in trials[: each.number]
            if t.complete and t.costs["prefill_ms"] <= each.costs["prefill_ms"]
        ]
        assert toy.loss(each.spec) > min([toy.PROBLEM.reference[0], *rivals])
    assert not {t.number for t in frontier(trials, toy.PROBLEM)} & {t.number for t in stopped}
    again = toy.run(path, evaluate=pytest.fail, trials=32)
    assert [t.number for t in again if t.stopped] == [t.number for t in stopped]
    assert toy.run(tmp_path / "all.db", evaluate=evaluation(), trials=32, stop_error=0.0)
