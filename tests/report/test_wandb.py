"""Facts about offline W&B runs, whose content is read from their files."""

import json

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from flash.paths import Runs
from flash.report.command import log_to_wandb
from flash.report.figures import all_figures, study_figures
from flash.report.reading import read, read_study
from flash.search.logs import log_study, trial_table
from flash.search.settings import Sampler
from flash.training.loggers import close_logger, make_logger
from flash.training.settings import LoggerKind, LoggerSettings
from tests.report.toy_study import with_curves, write_promotion, write_study
from tests.search import toy_search as toy

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


def logger_of(kind, runs):
    settings = LoggerSettings(name=kind.value, kind=kind, offline=True)
    return make_logger(settings, folder=runs.logs, run="toy", job="search", config={})


def media(runs, kind):
    """Find the media files of a W&B run by the key under which they were logged."""
    paths = [path for path in runs.logs.rglob(f"media/{kind}/**/*.json")]
    return {path.name.rsplit("_", 2)[0]: path for path in paths}


def test_every_figure_of_the_page_is_in_the_report_run(written, monkeypatch):
    monkeypatch.setattr("flash.report.command.has_wandb_key", lambda: False)
    runs, _ = written
    data = read(runs)
    log_to_wandb(data, runs, "flash")
    assert media(runs, "plotly").keys() == all_figures(read_study(runs, "toy")).keys()
    assert media(runs, "table").keys() == {"result"}


def test_a_search_logs_its_figures_and_a_table_of_all_trials(written):
    runs, report = written
    logger = logger_of(LoggerKind.wandb, runs)
    assert isinstance(logger, WandbLogger)
    log_study(logger, report, lambda: study_figures(runs, "toy"))
    close_logger(logger)
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
def test_other_loggers_get_the_metrics_and_no_figure_is_drawn(written, kind):
    runs, report = written
    logger = logger_of(kind, runs)
    log_study(logger, report, pytest.fail)
    if isinstance(logger, CSVLogger):
        logger.save()
        text = (runs.logs / "csv" / "metrics.csv").read_text()
        assert str(report["hypervolume"][-1]) in text
