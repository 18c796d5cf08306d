from dataclasses import replace
from statistics import median

import numpy as np
import pytest
import torch
from botorch.exceptions.errors import ModelFittingError
from optuna.trial import TrialState

from flash.arch import parse_pattern
from flash.search import sampler, surrogate
from flash.search.acquisition import greedy_batch
from flash.search.loop import frontier
from flash.search.parameters import distributions, member, parameters
from flash.search.pareto import hypervolume
from flash.search.sampler import propose
from flash.search.settings import Sampler
from flash.search.surrogate import features
from flash.search.trial import Trial
from tests.search import toy_search as toy

SPACE, WIDE = toy.make_space(), toy.make_wide_space()


def make_trials(specs, start=0):
    return [
        Trial(
            number=start + i,
            spec=spec,
            costs={key: float(v[0]) for key, v in toy.costs([spec]).items()},
            state=TrialState.COMPLETE,
            loss=toy.loss(spec),
            batch=(start, len(specs)),
        )
        for i, spec in enumerate(specs)
    ]


def ask(trials, n, space=SPACE, seed=0, **changes):
    settings = toy.make_settings(**changes)
    problem = toy.make_problem(settings)
    return propose(space, trials, n, problem=problem, settings=settings, seed=seed)


def hypervolume_after(num_trials, seed, space, **changes):
    trials = make_trials(ask([], 8, space, seed, **changes))
    while len(trials) < num_trials:
        trials += make_trials(ask(trials, 4, space, seed, **changes), start=len(trials))
    return hypervolume([t.point(toy.PROBLEM.objectives) for t in trials], toy.PROBLEM.reference)


@pytest.mark.parametrize("space", [SPACE, WIDE], ids=["plain", "wide"])
@pytest.mark.parametrize("kind", Sampler)
def test_proposals_are_members_never_repeat_and_depend_on_the_seed_alone(kind, space):
    trials = []
    for n in (8, 4, 4, 4):
        specs = ask(trials, n, space, sampler=kind)
        assert len(specs) == n
        assert specs == ask(trials, n, space, sampler=kind)
        assert all(spec in space for spec in specs)
        trials += make_trials(specs, start=len(trials))
    assert len({trial.spec for trial in trials}) == len(trials)
    assert ask(trials, 4, space, sampler=kind) != ask(trials, 4, space, sampler=kind, seed=1)


def test_the_parameters_of_a_member_make_it_again():
    rng = np.random.default_rng(0)
    for space in (SPACE, WIDE):
        for spec in space.stratified(rng, 50):
            values = parameters(space, spec)
            assert member(space, values) == spec
            assert values.keys() == distributions(space, spec.num_layers).keys()


def test_start_up_includes_the_largest_member():
    assert toy.BACKBONE in ask([], 8)


def test_failed_and_running_trials_are_not_proposed_again_and_teach_nothing():
    trials = make_trials(ask([], 16))
    for state in (TrialState.FAIL, TrialState.RUNNING):
        trials[3] = replace(trials[3], state=state, loss=None)
        specs = ask(trials, 4)
        assert len(specs) == 4
        assert not {trial.spec for trial in trials} & set(specs)


@pytest.mark.parametrize("losses", [[None] * 8, [2.0] + [None] * 7, [2.0] * 8])
def test_without_two_different_losses_proposals_are_random(losses):
    trials = [
        replace(trial, loss=loss, state=TrialState.FAIL if loss is None else TrialState.COMPLETE)
        for trial, loss in zip(make_trials(ask([], 8)), losses, strict=True)
    ]
    assert ask(trials, 4) == ask(trials, 4, sampler=Sampler.random)


def test_an_exhausted_space_gives_fewer_and_then_none():
    space = toy.make_space(depth=4, min_dim=256)  # only patterns of 4 layers and FFN widths
    space = toy.SearchSpace(
        replace(space.settings, ffn_dim=toy.FfnChoices(min=768, max=768)), toy.BACKBONE
    )
    trials = []
    while specs := ask(trials, 8, space):
        trials += make_trials(specs, start=len(trials))
    assert len({trial.spec for trial in trials}) == space.count()


def test_a_failed_fit_falls_back_to_random_and_says_so(monkeypatch, caplog):
    def fail(*_):
        raise ModelFittingError("all attempts failed")

    monkeypatch.setattr(surrogate, "fit_model", fail)
    assert len(ask(make_trials(ask([], 8)), 4)) == 4
    assert "all attempts failed" in caplog.text


def test_of_very_many_trials_the_frontier_and_a_sample_teach(monkeypatch):
    learned = []
    draw = surrogate.draw_values

    def spy(space, specs, losses, others, seed):
        learned.append(list(specs))
        return draw(space, specs, losses, others, seed)

    monkeypatch.setattr(sampler, "draw_values", spy)
    monkeypatch.setattr(sampler, "_MOST_LEARNED", 12)
    trials = make_trials(ask([], 40))
    assert ask(trials, 4) == ask(trials, 4)
    assert not {trial.spec for trial in trials} & set(ask(trials, 4))
    assert len(learned[0]) == 12
    assert learned[0] == learned[1]
    assert {trial.spec for trial in frontier(trials, toy.PROBLEM)} <= set(learned[0])


@pytest.mark.parametrize("space", [SPACE, WIDE], ids=["plain", "wide"])
def test_features_lie_in_the_unit_cube(space):
    rng = np.random.default_rng(0)
    rows = np.array([features(space, spec) for spec in space.stratified(rng, 200)])
    assert rows.min() >= 0
    assert rows.max() <= 1
    assert rows.std(axis=0).min() > 0.02  # each feature tells members apart


def test_features_tell_early_from_late():
    early, late = (
        features(SPACE, SPACE.make(256, 768, parse_pattern(pattern)))
        for pattern in ("-FFFFFFF", "FFFFFFF-")
    )
    assert np.linalg.norm(early - late) > 0.5
    kinds = parse_pattern("FFFF")
    rising, falling = (
        features(WIDE, WIDE.make(256, widths, kinds))
        for widths in ((256, 256, 768, 768), (768, 768, 256, 256))
    )
    assert np.linalg.norm(rising - falling) > 0.5


def test_greedy_batch_takes_the_greatest_expected_hypervolume_gain():
    rng = np.random.default_rng(0)
    draws = rng.normal(2.0, 0.5, size=(8, 12))
    latencies = rng.uniform(1.0, 6.0, size=12)
    reference = (2.5, 5.0)

    def volume(members):  # the mean over draws, by BoTorch
        return np.mean([
            hypervolume(np.column_stack([d[members], latencies[members]]), reference) for d in draws
        ])

    members, expected = [0, 1, 2, 3], []
    for _ in range(3):
        left = [i for i in range(4, 12) if i not in expected]
        expected.append(max(left, key=lambda i: volume([*members, *expected, i])))
    assert greedy_batch(draws[None], latencies[:, None], 4, 3, reference) == expected


def test_the_loss_model_predicts_unseen_specs():
    rng = np.random.default_rng(0)
    specs = SPACE.stratified(rng, 80)
    rows = np.array([features(SPACE, spec) for spec in specs])
    losses = np.array([toy.loss(spec) for spec in specs])
    losses = (losses - losses.mean()) / losses.std()
    model = surrogate.fit_model(rows[:60], losses[:60])
    with torch.no_grad():
        mean = model.posterior(torch.from_numpy(rows[60:])).mean.squeeze(-1).numpy()
    assert np.corrcoef(mean, losses[60:])[0, 1] > 0.95


@pytest.mark.slow
def test_the_model_beats_random_in_the_median_of_five_seeds():
    def volumes(kind):
        settings = {"sampler": kind, "pool_size": 512}
        return [hypervolume_after(40, seed, SPACE, **settings) for seed in range(5)]

    ours, random = volumes(Sampler.flash), volumes(Sampler.random)
    print("flash", ours, "random", random)
    assert median(ours) > median(random)
