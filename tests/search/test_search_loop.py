import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from flash.arch import ArchSpec
from flash.errors import InputError
from flash.search.frontier import write_frontier, write_report
from flash.search.loop import EvaluationError, frontier, hypervolume_history
from flash.search.names import arch_name
from flash.search.quality import Quality
from tests.search import toy_search as toy


def outcome(trials):
    return [(t.number, t.spec, t.loss, t.costs, t.state, t.batch) for t in trials]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return toy.run(tmp_path_factory.mktemp("undisturbed") / "study.db")


def test_interrupted_search_resumes_identically(tmp_path, undisturbed):
    stops = iter((0, 5, 7, 8, 10, 19))
    stop = next(stops)
    evaluated = []

    def evaluate(spec, number, watch):
        nonlocal stop
        if number == stop:
            stop = next(stops, None)
            raise KeyboardInterrupt
        evaluated.append(number)
        return Quality(toy.loss(spec))

    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            toy.run(tmp_path / "study.db", evaluate=evaluate)
    trials = toy.run(tmp_path / "study.db", evaluate=evaluate)
    assert outcome(trials) == outcome(undisturbed)
    assert evaluated == list(range(20))


def test_killed_search_resumes_identically(tmp_path, undisturbed):
    path = tmp_path / "study.db"
    with subprocess.Popen(
        [sys.executable, toy.__file__, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        assert process.stdout is not None
        assert any(line.strip() == "9" for line in process.stdout)  # trial 9 never ends
        process.send_signal(signal.SIGKILL)
    evaluated = []

    def evaluate(spec, number, watch):
        evaluated.append(number)
        return Quality(toy.loss(spec))

    assert outcome(toy.run(path, evaluate=evaluate)) == outcome(undisturbed)
    assert evaluated == list(range(9, 20))


@pytest.mark.parametrize("queued", [3, 11])
def test_kill_while_a_batch_is_queued_changes_nothing(tmp_path, undisturbed, queued, monkeypatch):
    numbers = itertools.count()
    add_trial = optuna.Study.add_trial

    def interrupted(self, trial):
        if next(numbers) == queued:
            raise KeyboardInterrupt
        add_trial(self, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "study.db", trials=12)
    assert outcome(toy.run(tmp_path / "study.db", trials=12)) == outcome(undisturbed[:12])


def test_a_finished_search_starts_nothing_and_more_trials_continue_it(tmp_path, undisturbed):
    path = tmp_path / "study.db"
    for trials in (8, 8, 12):
        assert outcome(toy.run(path, trials=trials)) == outcome(undisturbed[:trials])


def test_a_failed_trial_keeps_its_reason_and_the_search_goes_on(tmp_path):
    def evaluate(spec, number, watch):
        if number == 2:
            raise EvaluationError("diverged at step 7")
        return Quality(float("nan") if number == 9 else toy.loss(spec), {"steps": 10})

    trials = toy.run(tmp_path / "study.db", evaluate=evaluate, trials=12)
    assert [t.number for t in trials if t.state is TrialState.FAIL] == [2, 9]
    assert trials[2].extra["reason"] == "diverged at step 7"
    assert trials[9].extra["reason"] == "the loss is nan"
    assert trials[2].loss is None
    assert trials[3].extra["steps"] == 10
    assert trials[3].extra["seconds"] >= 0
    assert len(trials) == len({t.spec for t in trials}) == 12
    assert not {2, 9} & {t.number for t in frontier(trials, toy.PROBLEM)}


def test_a_bug_in_the_evaluation_stops_the_search(tmp_path):
    def evaluate(spec, number, watch):
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        toy.run(tmp_path / "study.db", evaluate=evaluate)


def test_a_trial_that_keeps_killing_its_process_fails(tmp_path):
    def evaluate(spec, number, watch):
        if number == 1:
            raise SystemError
        return Quality(toy.loss(spec))

    for _ in range(3):
        with pytest.raises(SystemError):
            toy.run(tmp_path / "study.db", evaluate=evaluate, trials=4, retries=2)
    trials = toy.run(tmp_path / "study.db", evaluate=evaluate, trials=4, retries=2)
    assert trials[1].extra["reason"] == "its process died 3 times"
    assert all(t.complete for t in trials if t.number != 1)


def test_another_fingerprint_is_refused_with_what_differs(tmp_path):
    path = tmp_path / "study.db"
    toy.open_toy(path, toy.make_space(), device="phone")
    toy.open_toy(path, toy.make_space(), device="phone")
    with pytest.raises(InputError, match="device .was phone, is now laptop.; choose another"):
        toy.open_toy(path, toy.make_space(), device="laptop")
    with pytest.raises(InputError, match=r"space.num_layers.max .was 8, is now 7.") as error:
        toy.open_toy(path, toy.make_space(depth=7), device="phone")
    assert "model_dim" not in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("trials", 0), ("study", "a/b"), ("pool_size", 2)])
def test_bad_settings_name_their_key(key, value):
    with pytest.raises(InputError, match=f"^{key}="):
        toy.make_settings(**{key: value})


def test_trials_show_their_sizes_and_kinds_as_parameters(tmp_path):
    trials = toy.run(tmp_path / "study.db", trials=4)
    stored = optuna.load_study(study_name="toy", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert stored.metric_names == ["loss", "prefill_ms"]
    for trial, frozen in zip(trials, stored.trials, strict=True):
        assert frozen.params["ffn_dim"] == trial.spec.ffn_dim
        assert frozen.params["layer_00"] == trial.spec.layer_types[0].value
        assert len(frozen.params) == 3 + trial.spec.num_layers
        assert frozen.user_attrs["pattern"] == trial.spec.pattern


def test_names_of_found_architectures_are_for_ever(tmp_path, undisturbed):
    trials = undisturbed
    front = frontier(trials, toy.PROBLEM)
    paths = write_frontier(tmp_path / "arch", "toy", trials, toy.PROBLEM)
    assert [path.stem for path in paths] == [arch_name("toy", t.number, t.spec) for t in front]
    assert all(re.fullmatch(r"toy_\d+_[0-9a-f]{4}", path.stem) for path in paths)
    assert [ArchSpec.from_dict(yaml.safe_load(p.read_text())) for p in paths] == [
        t.spec for t in front
    ]
    assert [t.costs["prefill_ms"] for t in front] == sorted(t.costs["prefill_ms"] for t in front)
    before = {path: path.read_text() for path in paths}
    earlier = write_frontier(tmp_path / "arch", "toy", trials[:4], toy.PROBLEM)
    assert sorted((tmp_path / "arch").iterdir()) == sorted({*paths, *earlier})
    assert {path: path.read_text() for path in paths} == before
    # A study of this name that was begun anew has other architectures, and other names for them.
    spec = trials[0].spec
    other = spec.replace(ffn_dim=spec.ffn_dim + 64)
    assert arch_name("toy", 0, spec) != arch_name("toy", 0, other)
    paths[0].write_text("mine: 1\n")
    with pytest.raises(InputError, match="something else wrote it"):
        write_frontier(tmp_path / "arch", "toy", trials, toy.PROBLEM)


def test_report_holds_everything(tmp_path, undisturbed):
    trials = undisturbed
    write_report(tmp_path / "frontier.json", "toy", trials, toy.PROBLEM, 3, {"unit": "nats"})
    report = json.loads((tmp_path / "frontier.json").read_text())
    assert report["unit"] == "nats"
    assert report["frontier"] == [t.number for t in frontier(trials, toy.PROBLEM)]
    assert set(report["winners"]) <= set(report["frontier"])
    assert len(report["winners"]) == 3
    assert report["hypervolume"] == hypervolume_history(trials, toy.PROBLEM)
    assert report["hypervolume"] == sorted(report["hypervolume"])
    assert ArchSpec.from_dict(report["trials"][4]["spec"]) == trials[4].spec
