"""Facts about objectives, limits, rescored frontiers, and longer training of the best trials."""

from dataclasses import replace

import numpy as np
import pytest

from flash.errors import InputError
from flash.search.acquisition import greedy_batch
from flash.search.baselines import AdditiveScores
from flash.search.frontier import write_report
from flash.search.loop import EvaluationError, frontier, hypervolume_history, rescore
from flash.search.objectives import Objective
from flash.search.pareto import hypervolume
from flash.search.promote import compare, promote
from flash.search.quality import Quality
from flash.search.sampler import check_limits, propose
from flash.search.settings import Sampler, SearchLimits
from flash.search.study import reopen_study
from tests.search import toy_search as toy

OBJECTIVES = (
    ["quality"],
    ["quality", "decode"],
    ["size", "quality", "prefill"],
    ["quality", "prefill", "decode", "memory", "size"],
)


@pytest.mark.parametrize("names", OBJECTIVES)
def test_any_objectives_beside_quality_can_be_searched(tmp_path, names):
    settings = {"objectives": [*names], "trials": 12}
    trials = toy.run(tmp_path / "study.db", **settings)
    problem = toy.make_problem(toy.make_settings(**settings))
    assert all(t.complete for t in trials)
    assert problem.objectives[0] == Objective.quality
    assert {o.name for o in problem.objectives} == set(names)
    report = write_report(tmp_path / "frontier.json", "toy", trials, problem, 3, {})
    assert report["objectives"][0] == "loss"
    assert len(report["reference"]) == len(names) + 1  # and the headline latency
    points = np.array([t.point(problem.objectives) for t in trials])
    front = {t.number for t in frontier(trials, problem)}
    for trial in trials:
        beaten = np.all(points <= points[trial.number], axis=1) & np.any(
            points < points[trial.number], axis=1
        )
        assert (trial.number in front) == (not beaten.any())


def test_a_given_reference_stands_and_the_rest_follows_from_the_baseline():
    settings = toy.make_settings(reference={"prefill": 40.0}, max_cost_ratio=0.5)
    objectives = (Objective.quality, Objective.prefill, Objective.decode, Objective.size)
    costs = {"loss": 2.0, "prefill_ms": 100.0, "decode_ms": 10.0, "size_mib": 8.0}
    assert settings.worst(objectives, costs, {"size_mib": 3.0}) == (3.0, 40.0, 5.0, 3.0)
    assert toy.make_settings(reference={"quality": 2.5}).worst(objectives[:1], costs, {}) == (2.5,)
    with pytest.raises(InputError, match=r"^reference\.prefil=1.0: .*mean 'prefill'"):
        toy.make_settings(reference={"prefil": 1.0})
    with pytest.raises(InputError, match=r"^reference\.decode=-1.0: expected a positive"):
        toy.make_settings(reference={"decode": -1.0})


@pytest.mark.parametrize("names", [["prefill"], ["quality", "size", "size"], []])
def test_objectives_without_quality_or_twice_the_same_are_refused(names):
    with pytest.raises(InputError, match="^objectives="):
        toy.make_settings(objectives=[*names] or ["size"])


def test_other_objectives_are_another_study(tmp_path):
    toy.run(tmp_path / "study.db", trials=4)
    with pytest.raises(InputError, match="objectives .was"):
        toy.run(tmp_path / "study.db", objectives=["quality", "size"])


LIMITS = {"prefill_ms": 12.0, "size_mib": 0.75}


@pytest.mark.parametrize("sampler", Sampler)
def test_every_proposal_obeys_the_limits(tmp_path, sampler):
    settings = {"limits": SearchLimits(**LIMITS), "sampler": sampler, "trials": 16}
    trials = toy.run(tmp_path / "study.db", **settings)
    assert len(trials) == 16
    assert max(t.costs["prefill_high_ms"] for t in trials) <= LIMITS["prefill_ms"]
    assert max(t.costs["size_mib"] for t in trials) <= LIMITS["size_mib"]
    free = toy.make_problem()
    assert toy.make_problem(toy.make_settings(**settings)).reference[1] == 12.0
    assert free.reference[1] > 12.0


def test_a_latency_whose_interval_reaches_beyond_the_limit_is_off_the_frontier(tmp_path):
    trials = toy.run(tmp_path / "study.db", trials=12)
    slowest = frontier(trials, toy.PROBLEM)[-1]
    for limit, stays in ((1.05, False), (1.11, True)):  # the interval ends at 1.1 of the mean
        limits = SearchLimits(prefill_ms=limit * slowest.costs["prefill_ms"])
        within = frontier(trials, toy.make_problem(toy.make_settings(limits=limits)))
        assert (slowest.number in {t.number for t in within}) == stays


def test_limits_that_hardly_any_member_obeys_are_reached_on_foot():
    space = toy.make_space()
    rng = np.random.default_rng(0)
    drawn = toy.costs(space.stratified(rng, 2000))["prefill_high_ms"]
    settings = toy.make_settings(limits=SearchLimits(prefill_ms=float(drawn.min()) * 1.3))
    problem = toy.make_problem(settings)
    specs = propose(space, [], 8, problem=problem, settings=settings, seed=1)
    assert len(set(specs)) == 8
    assert problem.violation(specs).max() <= 0


def test_limits_that_nothing_meets_say_by_how_much():
    settings = toy.make_settings(limits=SearchLimits(prefill_ms=1.0, size_mib=100.0))
    with pytest.raises(InputError, match=r"search.limits.prefill_ms=1 .*has \d.*raise") as error:
        check_limits(toy.make_space(), toy.make_problem(settings), 0)
    assert "size_mib" not in str(error.value)
    with pytest.raises(InputError, match="^decode_ms=-1"):
        SearchLimits(decode_ms=-1)


def test_greedy_batch_in_three_dimensions_takes_the_greatest_gain():
    rng = np.random.default_rng(0)
    draws = rng.normal(2.0, 0.5, size=(8, 12))
    costs = rng.uniform(1.0, 6.0, size=(12, 2))
    reference = (2.5, 5.0, 5.5)

    def volume(members):  # the mean over draws, by BoTorch
        return np.mean([
            hypervolume(np.column_stack([d[members], costs[members]]), reference) for d in draws
        ])

    chosen = greedy_batch(draws[None], costs, 4, 3, reference)
    members = [0, 1, 2, 3]
    for point in chosen:
        gains = {i: volume([*members, i]) for i in range(4, 12) if i not in members}
        assert gains[point] >= volume(members) + 0.9 * (max(gains.values()) - volume(members))
        members.append(point)


def test_pending_trials_send_the_next_batch_elsewhere():
    draws = np.array([[[2.0, 1.0, 1.0, 1.5]]])  # observed, then two alike and another
    costs = np.array([[4.0], [2.0], [2.0], [1.0]])
    assert greedy_batch(draws, costs, 1, 1, (3.0, 5.0)) == [1]
    assert greedy_batch(draws, costs, 2, 1, (3.0, 5.0)) == [3]


def test_finished_trials_give_a_new_frontier_without_training(tmp_path):
    path = tmp_path / "study.db"
    trials = toy.run(path)
    study = reopen_study(path, "toy")
    assert [t.spec for t in study.trials()] == [t.spec for t in trials]

    def other(specs):  # a device whose attention is free
        known = dict(toy.costs(specs))
        known["prefill_ms"] = np.array([s.num_layers * s.ffn_dim / 100 for s in specs], dtype=float)
        return known

    problem = replace(toy.PROBLEM, costs=other, limits={"prefill_ms": 40.0})
    again = rescore(study.trials(), problem)
    assert [t.loss for t in again] == [t.loss for t in trials]
    front = frontier(again, problem)
    assert front
    assert all(t.costs["prefill_ms"] == t.spec.num_layers * t.spec.ffn_dim / 100 for t in front)
    assert max(t.costs["prefill_ms"] for t in front) <= 40.0
    assert {t.number for t in front} != {t.number for t in frontier(trials, toy.PROBLEM)}


@pytest.mark.parametrize("known", [True, False])
def test_a_study_to_be_judged_anew_must_exist(tmp_path, known):
    if known:
        toy.run(tmp_path / "study.db", trials=2)
    with pytest.raises(InputError, match="search.from_study=none: expected a study that exists"):
        reopen_study(tmp_path / "study.db", "none")


def test_promoted_trials_are_trained_once_and_ranked(tmp_path):
    path = tmp_path / "study.db"
    trials = toy.run(path)
    study = reopen_study(path, "toy")
    best = [t.number for t in frontier(trials, toy.PROBLEM)]
    seen = []

    def longer(spec, number):
        seen.append(number)
        if len(seen) == 2:
            raise EvaluationError("diverged")
        return Quality(toy.loss(spec) - 0.5)

    report = promote(study, toy.PROBLEM, 4, longer, 1000)
    assert set(seen) <= set(best)
    assert [row["number"] for row in report["trials"]] == seen
    assert report["trials"][1]["long_loss"] is None
    assert report["trials"][1]["reason"] == "diverged"
    assert (report["kendall_tau"], report["swapped"], report["pairs"]) == (1.0, 0, 3)
    assert promote(study, toy.PROBLEM, 4, pytest.fail, 1000) == report


def test_swapped_pairs_are_counted():
    rows = [{"loss": short, "long_loss": long} for short, long in [(1, 3), (2, 2), (3, 4)]]
    assert compare(rows) == {"kendall_tau": pytest.approx(1 / 3), "swapped": 1, "pairs": 3}
    assert compare(rows[:1])["kendall_tau"] is None


def test_additive_scores_find_the_best_pattern_of_each_count():
    space = toy.make_space(depth=5, min_depth=4)
    specs = space.stratified(np.random.default_rng(0), 60)
    scores = AdditiveScores(space, specs, [toy.loss(spec) for spec in specs])
    found = scores.best_patterns(4)

    def counts(pattern):
        return tuple(pattern.count(kind) for kind in space.kinds)

    best = {}
    for pattern in toy.all_patterns(space, 4):
        value = float(scores.predict([space.make(256, 768, pattern)])[0])
        best[counts(pattern)] = min(value, best.get(counts(pattern), np.inf))
    for pattern in found:
        assert space.make(256, 768, pattern).longest_efficient_run <= 2
    lowest = {}
    for pattern in found:
        value = float(scores.predict([space.make(256, 768, pattern)])[0])
        lowest[counts(pattern)] = min(value, lowest.get(counts(pattern), np.inf))
    assert {key: pytest.approx(value) for key, value in best.items()} == {
        key: value for key, value in lowest.items() if key in best
    }


def test_hypervolume_history_is_that_of_all_points_so_far(tmp_path):
    trials = toy.run(tmp_path / "study.db", trials=12)
    points = [t.point(toy.PROBLEM.objectives) for t in trials]
    expected = [hypervolume(points[: i + 1], toy.PROBLEM.reference) for i in range(12)]
    assert hypervolume_history(trials, toy.PROBLEM) == pytest.approx(expected)
    sizes = sorted(t.costs["size_mib"] for t in frontier(trials, toy.PROBLEM))
    limited = replace(toy.PROBLEM, limits={"size_mib": 0.99 * sizes[len(sizes) // 2]})
    inside = [t.point(toy.PROBLEM.objectives) for t in frontier(trials, limited)]
    last = hypervolume_history(trials, limited)[-1]
    assert last == pytest.approx(hypervolume(inside, limited.reference))
    assert last < expected[-1]
