"""Facts about tasks as objectives: proposals, noise, storage, and errors of settings."""

import itertools
import sqlite3

import numpy as np
import pytest

from flash.errors import InputError
from flash.evaluation.settings import SuiteSettings, TaskSettings
from flash.search.acquisition import greedy_batch
from flash.search.frontier import write_report
from flash.search.logs import trial_table
from flash.search.loop import EvaluationError, frontier, rescore
from flash.search.objectives import Objective, Quantity
from flash.search.pareto import hypervolume
from flash.search.quality import Quality, TaskError
from flash.search.settings import Sampler, SearchJobSettings
from flash.search.study import reopen_study
from flash.search.surrogate import Observations, draw
from flash.training.loss_curve import Curve
from tests.search import toy_search as toy

BESIDE = ["prefill", "task:toy", "quality"]
INSTEAD = ["task:toy", "prefill"]


def test_a_task_has_a_name_in_settings_and_a_key_in_results():
    task = Objective.parse("task:next_sentence")
    assert (task.name, task.key, task.unit) == (
        "task:next_sentence",
        "error_pct:next_sentence",
        "%",
    )
    assert Objective.of_key(task.key) == task
    assert task.learned
    assert [each.learned for each in map(Objective, Quantity)].count(True) == 2
    for name in ("task", "task:"):
        with pytest.raises(InputError, match=f"^objective {name}: expected task:NAME"):
            Objective.parse(name)
    with pytest.raises(InputError, match="^unknown objective tusk:a; "):
        Objective.parse("tusk:a")


@pytest.mark.parametrize("names", [BESIDE, INSTEAD])
def test_the_frontier_is_that_of_the_errors_beside_or_instead_of_the_loss(tmp_path, names):
    trials = toy.run(tmp_path / "study.db", objectives=names)
    problem = toy.make_problem(toy.make_settings(objectives=names))
    learned = ["quality", "task:toy"] if "quality" in names else ["task:toy"]
    assert [each.name for each in problem.objectives] == [*learned, "prefill"]
    assert all(t.loss == toy.loss(t.spec) for t in trials)
    assert all(t.errors == toy.errors(t.spec) for t in trials)
    points = np.array([t.point(problem.objectives) for t in trials])
    front = {t.number for t in frontier(trials, problem)}
    for trial in trials:
        own = points[trial.number]
        beaten = np.all(points <= own, axis=1) & np.any(points < own, axis=1)
        same = [t.number for t in trials if tuple(points[t.number]) == tuple(own)]
        assert (trial.number in front) == (not beaten.any() and trial.number == same[0])
    again = reopen_study(tmp_path / "study.db", "toy")
    assert again.trials() == trials
    report = write_report(tmp_path / "frontier.json", "toy", trials, problem, 3, {})
    assert report["objectives"] == [each.key for each in problem.objectives]
    assert report["reference"][toy.TASK] == toy.errors(toy.BACKBONE)[toy.TASK].pct + 15
    assert report["trials"][3]["errors"][toy.TASK]["questions"] == toy.QUESTIONS


def test_a_killed_search_of_a_task_makes_the_proposals_of_an_uninterrupted_one(tmp_path):
    whole = toy.run(tmp_path / "whole.db", objectives=BESIDE)

    def dies(spec, number, watch):
        if number == 13:
            raise KeyboardInterrupt
        return Quality(toy.loss(spec), errors=toy.errors(spec))

    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "cut.db", objectives=BESIDE, evaluate=dies)
    cut = toy.run(tmp_path / "cut.db", objectives=BESIDE)
    assert [t.spec for t in cut] == [t.spec for t in whole]


def test_trials_of_a_task_are_judged_anew_by_their_loss_alone(tmp_path):
    toy.run(tmp_path / "study.db", objectives=BESIDE)
    trials = rescore(reopen_study(tmp_path / "study.db", "toy").trials(), toy.PROBLEM)
    best = min(trials, key=lambda trial: trial.loss)
    assert best.number in {t.number for t in frontier(trials, toy.PROBLEM)}


@pytest.mark.parametrize("sampler", [each for each in Sampler if each is not Sampler.additive])
def test_every_sampler_finds_candidates_for_a_task(tmp_path, sampler):
    trials = toy.run(tmp_path / "study.db", objectives=INSTEAD, sampler=sampler, trials=16)
    assert len({t.spec for t in trials}) == 16
    with pytest.raises(InputError, match=r"^sampler=additive: expected another one"):
        toy.make_settings(objectives=INSTEAD, sampler=Sampler.additive)


def test_no_trial_of_a_task_is_stopped_for_its_training_loss(tmp_path):
    def hopeless(spec, number, watch):
        worst = 9.0 if number > 10 else toy.loss(spec)
        curve = [worst + 2 / i for i in range(1, 9)]
        for done in range(1, 9):
            watch(Curve(tuple(curve[:done]), 8))
        points = [[256.0 * i, each] for i, each in enumerate(curve, start=1)]
        return Quality(worst, {"curve": points}, toy.errors(spec))

    assert any(t.stopped for t in toy.run(tmp_path / "loss.db", evaluate=hopeless))
    asked = toy.run(tmp_path / "task.db", evaluate=hopeless, objectives=BESIDE)
    assert all(t.complete for t in asked)


def test_a_failed_trial_has_no_errors_and_teaches_nothing(tmp_path):
    def fails(spec, number, watch):
        if number == 2:
            raise EvaluationError("diverged")
        return Quality(toy.loss(spec), errors=toy.errors(spec))

    trials = toy.run(tmp_path / "study.db", evaluate=fails, objectives=INSTEAD)
    assert trials[2].errors == {}
    assert trials[2].learned([Objective.parse("task:toy")]) is None
    assert len(trials) == 20


def test_the_table_of_trials_has_the_errors_even_if_the_first_trial_failed(tmp_path):
    def fails(spec, number, watch):
        if number == 0:
            raise EvaluationError("diverged")
        return Quality(toy.loss(spec), errors=toy.errors(spec))

    trials = toy.run(tmp_path / "study.db", evaluate=fails, objectives=BESIDE, trials=8)
    problem = toy.make_problem(toy.make_settings(objectives=BESIDE))
    columns, rows = trial_table(write_report(tmp_path / "r.json", "toy", trials, problem, 3, {}))
    place = columns.index(toy.TASK)
    assert [row[place] for row in rows] == [None, *(t.errors[toy.TASK].pct for t in trials[1:])]


@pytest.mark.parametrize("names", [BESIDE, INSTEAD])
def test_a_damaged_database_is_one_line(tmp_path, names):
    toy.run(tmp_path / "study.db", objectives=names, trials=4)
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("delete from trial_user_attributes where key = 'errors'")
    with pytest.raises(InputError, match=r"^trial 0 of the study: errors\.error_pct:toy=null: exp"):
        reopen_study(tmp_path / "study.db", "toy").trials()
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("delete from trial_user_attributes where key = 'loss'")
    with pytest.raises(InputError, match="^trial 0 of the study: (loss|errors)"):
        reopen_study(tmp_path / "study.db", "toy").trials()


def test_what_a_killed_worker_had_told_of_an_unfinished_trial_does_not_count(tmp_path):
    settings = toy.make_settings(objectives=INSTEAD)
    study = toy.open_toy(tmp_path / "study.db", toy.make_space(), settings)
    specs = toy.make_space().stratified(np.random.default_rng(0), 2)
    costs = {key: [float(v) for v in values] for key, values in toy.costs(specs).items()}
    study.plan(specs, costs, (0, 2))
    study.enqueue(toy.make_space())
    with study.working():
        trial = study.start()
        study._set(trial, "loss", 2.0)
        study._set(trial, "errors", {toy.TASK: {"pct": 1.0, "stderr_pct": 0.1, "questions": 9}})
        [first, _] = study.trials()
    assert first.loss is None
    assert first.learned(settings.order(Objective.prefill)[:1]) is None


@pytest.mark.parametrize(
    "key", ["error_pct", "loss:x", "prefill_ms:x", "error_pct:", "speed", "speed:x", "error_pct@x"]
)
def test_keys_of_no_objective_are_refused(key):
    with pytest.raises(ValueError, match="is no"):
        Objective.of_key(key)


def test_greedy_batch_with_two_uncertain_objectives_takes_the_greatest_mean_gain():
    rng = np.random.default_rng(0)
    draws = rng.normal(2.0, 0.5, size=(2, 8, 12))
    costs = rng.uniform(1.0, 6.0, size=(12, 1))
    reference = (2.5, 2.6, 5.5)

    def volume(members):  # the mean over draws, by BoTorch
        return np.mean([
            hypervolume(np.column_stack([a[members], b[members], costs[members]]), reference)
            for a, b in zip(*draws, strict=True)
        ])

    members = [0, 1, 2, 3]
    for point in greedy_batch(draws, costs, 4, 3, reference):
        gains = {i: volume([*members, i]) for i in range(4, 12) if i not in members}
        assert gains[point] >= volume(members) + 0.9 * (max(gains.values()) - volume(members))
        members.append(point)
    assert greedy_batch(draws, np.zeros((12, 0)), 4, 2, reference[:2])  # no known objective


def test_the_known_noise_of_few_questions_is_not_learned_by_heart():
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(40, 3))
    truth = 50 + 10 * points[:, 0]
    seen = truth + rng.normal(0, 5.0, size=40)
    noisy, exact = (
        draw(points, Observations(seen, np.full(40, noise), logarithmic=False), points[:1], 0)
        for noise in (5.0, 0.05)
    )
    off = [float(np.abs(each.mean(axis=0)[:40] - truth).mean()) for each in (noisy, exact)]
    assert off[0] < 0.6 * off[1]
    assert np.abs(exact.mean(axis=0)[:40] - seen).max() < 1.0  # believed, as it was told


def test_equal_answers_tell_nothing_and_stop_nothing(tmp_path):
    same = draw(np.eye(3), Observations(np.full(3, 75.0), None, logarithmic=False), np.eye(3), 0)
    assert np.all(same == 75.0)

    def guesses(spec, number, watch):
        return Quality(toy.loss(spec), errors={toy.TASK: TaskError(75.0, 2.0, 400)})

    trials = toy.run(tmp_path / "study.db", objectives=BESIDE, evaluate=guesses)
    assert len(trials) == 20


@pytest.mark.parametrize(
    ("error", "noise"),
    [
        (TaskError(50.0, 2.5, 400), 2.5),
        (TaskError(0.0, 0.0, 20), 2.5),  # half a question
        (TaskError(50.0, None, 400), None),
    ],
)
def test_the_noise_of_an_error_is_that_of_half_a_question_or_more(error, noise):
    assert error.noise_pct == noise


CHOICE = TaskSettings(name="choice", title="Choice", metric="acc,none")
LENGTH = TaskSettings(name="length", title="Length", metric="bits_per_byte,none", percent=False)


@pytest.mark.parametrize(
    ("suite", "objectives", "message"),
    [
        (None, ["task:choice"], r"task choice: expected suite=NAME"),
        ([CHOICE], ["quality", "task:chioce"], r"task chioce: expected one of suite=own: choice"),
        ([CHOICE, LENGTH], ["task:length"], r"task length: .*share of right .*bits_per_byte"),
    ],
)
def test_tasks_that_the_suite_does_not_have_are_refused(suite, objectives, message):
    search = toy.make_settings(objectives=objectives)
    with pytest.raises(InputError, match=rf"^search\.objectives=\[.*\]: {message}"):
        SearchJobSettings(
            search=search, suite=None if suite is None else SuiteSettings(name="own", tasks=suite)
        )


def test_a_task_is_enough():
    assert toy.make_settings(objectives=["task:a"]).tasks == ["a"]
    assert toy.make_settings(objectives=["size", "task:b", "quality"]).tasks == ["b"]
    assert toy.make_settings().tasks == []


@pytest.mark.parametrize("names", [["prefill"], ["task:a", "task:a"]])
def test_what_needs_no_training_and_a_task_twice_are_refused(names):
    with pytest.raises(InputError, match=r"expected quality or task:NAME and any others, each"):
        toy.make_settings(objectives=names)


def test_the_order_of_objectives_is_one_whatever_was_typed():
    orders = {
        toy.make_settings(objectives=[*names]).order(Objective.prefill)
        for names in itertools.permutations(BESIDE)
    }
    assert len(orders) == 1
