"""Facts about offline W&B runs, whose content is read from their files."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState

from flash.paths import Runs
from flash.report.figures import all_figures, study_figures
from flash.report.reading import read, read_study
from flash.report.wandb_run import log_report, result_table
from flash.search.logs import SearchLog, log_study, trial_table
from flash.search.loop import frontier, hypervolume_history
from flash.search.settings import Sampler
from flash.tracking.backend import JobType, RunInfo
from flash.tracking.settings import LoggerKind, LoggerSettings
from flash.tracking.tracker import open_tracker
from tests.report.toy_study import with_curves, write_promotion, write_study
from tests.search import toy_search as toy
from tests.tracking.offline import read_runs

STOPPED = {9, 14}


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "study.db"
    return with_curves(toy.run(path, sampler=Sampler.random), STOPPED)


@pytest.fixture
def written(tmp_path, trials):
    """Folder `runs` with a study, and the content of its `frontier.json`."""
    runs = Runs(tmp_path)
    report = write_study(runs, trials)
    write_promotion(runs, report, 3)
    return runs, report


def tracker_of(kind, runs):
    settings = LoggerSettings(name=kind.value, kind=kind, offline=True)
    info = RunInfo(job=JobType.search, name="toy", key="k", group="toy")
    return open_tracker(settings, runs.logs, info)


def media(runs, kind):
    """Find the media files of a W&B run by the key under which they were logged."""
    paths = [path for path in runs.logs.rglob(f"media/{kind}/**/*.json")]
    return {path.name.rsplit("_", 2)[0]: path for path in paths}


def test_the_report_logs_every_figure_of_the_page_and_its_table_in_numbers(written):
    runs, _ = written
    data = read(runs)
    log_report(data, runs, LoggerSettings(name="wandb", project="p", offline=True))
    log_report(data, runs, LoggerSettings(name="wandb", project="p", offline=True))
    assert media(runs, "plotly").keys() == all_figures(read_study(runs, "toy")).keys()
    first, second = read_runs(runs.logs)
    assert first.run.run_id == second.run.run_id
    assert (first.run.run_group, first.run.job_type, first.run.project) == ("toy", "report", "p")
    table = json.loads(media(runs, "table")["result"].read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["model"] for row in rows] == [model.name for model in data.models]
    assert [row["parameters"] for row in rows] == [model.parameters for model in data.models]
    for row, model in zip(rows, data.models, strict=True):
        assert row["prefill_64_predicted_low_ms"] == model.predicted["prefill_64"]["low_ms"]
        assert all(isinstance(row[name], float | None) for name in row if name.endswith("_ms"))


def test_the_table_of_results_links_to_the_runs_of_trainings(written, monkeypatch):
    runs, report = written
    data = read(runs)
    winner = data.models[1]
    trained = SimpleNamespace(
        before=SimpleNamespace(loss=4.0, bits_per_byte=2.0),
        after=SimpleNamespace(loss=3.0, bits_per_byte=1.5),
    )
    links = {runs.model(winner.name): "https://example.org/run"}
    columns, [row] = result_table([replace(winner, trained=trained)], runs, links)
    values = dict(zip(columns, row, strict=True))
    assert values["train_run"] == "https://example.org/run"
    assert (values["loss_before"], values["loss_after"]) == (4.0, 3.0)


def test_a_search_logs_every_trial_its_frontier_and_its_best(written, trials):
    runs, _ = written
    failed = replace(trials[3], state=TrialState.FAIL, loss=None, extra={"reason": "diverged"})
    trials = [*trials[:3], failed, *trials[4:]]
    backbone_ms = float(toy.latency([toy.BACKBONE])[0])
    with tracker_of(LoggerKind.wandb, runs) as tracker:
        log = SearchLog(tracker, toy.PROBLEM, backbone_ms)
        for number, trial in enumerate(trials):
            log.log_trial(trial, trials[: number + 1])
    [run] = read_runs(runs.logs)
    rows = [row for row in run.history if "search/state" in row]
    assert [row["search/trial"] for row in rows] == [trial.number for trial in trials]
    states = [trial.state.name.lower() for trial in trials]
    assert [row["search/state"] for row in rows] == states
    for row, trial in zip(rows, trials, strict=True):
        assert row.get("search/loss") == trial.loss
        assert ("search/estimated_loss" in row) == trial.stopped
    history = hypervolume_history(trials, toy.PROBLEM)
    assert [row["search/hypervolume"] for row in rows] == pytest.approx(history)
    best = min((trial for trial in trials if trial.complete), key=lambda trial: trial.loss)
    assert run.summary["search/loss"] == best.loss
    assert run.summary["search/trial"] == best.number
    assert run.summary["search/hypervolume"] == pytest.approx(history[-1])
    assert run.summary["search/pruned_trials"] == len(STOPPED)
    assert run.summary["search/failed_trials"] == 1
    fast = [t.loss for t in trials if t.complete and t.costs["prefill_ms"] <= 0.75 * backbone_ms]
    assert run.summary["search/best_loss_at_75pct_latency"] == min(fast)
    path = run.path.parent / "files" / run.summary["search/frontier"]["path"]
    table = json.loads(path.read_text())
    front = frontier(trials, toy.PROBLEM)
    assert [row[0] for row in table["data"]] == [trial.number for trial in front]


def test_a_search_logs_its_figures_and_a_table_of_all_trials(written):
    runs, report = written
    with tracker_of(LoggerKind.wandb, runs) as tracker:
        log_study(tracker, report, lambda: study_figures(runs, "toy"))
    assert media(runs, "plotly").keys() == study_figures(runs, "toy").keys()
    table = json.loads(media(runs, "table")["trials"].read_text())
    columns, rows = trial_table(report)
    assert (table["columns"], table["data"]) == (columns, rows)


def test_the_table_of_trials_holds_all_of_them_with_their_state(written):
    _, report = written
    columns, rows = trial_table(report)
    trials = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["number"] for row in trials] == [trial["number"] for trial in report["trials"]]
    assert {row["number"] for row in trials if row["state"] == "pruned"} == STOPPED
    assert {row["number"] for row in trials if row["frontier"]} == set(report["frontier"])
    assert {"loss", "prefill_ms", "decode_ms", "size_mib", "memory_mib"} <= set(columns)
    for row in trials:
        assert len(row["pattern"]) == row["num_layers"]
        assert row["pattern"].count("-") == row["skip_attention"]
        assert (row["loss"] is None) == (row["number"] in STOPPED)


@pytest.mark.parametrize("kind", [LoggerKind.csv, LoggerKind.none])
def test_other_loggers_get_the_metrics_and_no_figure_is_drawn(written, trials, kind):
    runs, report = written
    with tracker_of(kind, runs) as tracker:
        SearchLog(tracker, toy.PROBLEM, 1.0).log_trial(trials[-1], trials)
        log_study(tracker, report, pytest.fail)
    paths = list((runs.logs / "csv").rglob("metrics.csv"))
    assert len(paths) == (kind is LoggerKind.csv)
    for path in paths:
        [row] = csv.DictReader(path.read_text().splitlines())
        assert row["search/state"] == "complete"
        assert float(row["search/hypervolume"]) == pytest.approx(report["hypervolume"][-1])
    before = [path.read_bytes() for path in paths]
    with tracker_of(kind, runs) as tracker:  # the same run, which goes on
        tracker.log({"search/hypervolume": 0.0}, 1)
    assert [path.read_bytes() for path in paths] == before
    assert len(list((runs.logs / "csv").rglob("metrics.csv"))) == 2 * len(paths)
