"""Facts about a study in the real optuna-dashboard, read through its JSON API."""

import json
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.error import URLError

import plotly.graph_objects as go
import pytest

from flash.arch import count_parameters
from flash.search.logs import show_curves
from flash.search.loop import EvaluationError
from flash.search.names import arch_name
from flash.search.quality import Quality
from flash.search.study import reopen_study
from tests.search import toy_search as toy

CURVE = [[256.0, 5.5], [512.0, 4.5]]


def evaluate(spec, number, watch):
    if number == 3:
        raise EvaluationError("out of memory")
    return Quality(toy.loss(spec), {"tokens": 512, "curve": CURVE})


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def dashboard(storage):
    """Running server; yields a function that queries its API."""
    base = f"http://127.0.0.1:{free_port()}"
    command = [Path(sys.executable).with_name("optuna-dashboard"), storage]
    address = ["--host", "127.0.0.1", "--port", base.rpartition(":")[2]]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(path):
        with opener.open(base + path, timeout=30) as answer:
            return json.load(answer)

    server = subprocess.Popen([*command, *address], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                get("/api/meta")
                break
            except URLError:
                assert server.poll() is None, server.stderr and server.stderr.read()
                assert time.monotonic() < until
                time.sleep(0.1)
        yield get
    finally:
        server.terminate()
        server.communicate(timeout=30)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Trials of a study, and the same study as the dashboard reports it."""
    path = tmp_path_factory.mktemp("study") / "study.db"
    trials = toy.run(path, trials=12, evaluate=evaluate)
    figure = go.Figure(go.Scatter(x=[256, 512], y=[5.5, 4.5], name="curve of a trial"))
    show_curves(reopen_study(path, "toy"), 12, lambda: {"learning_curves": figure})
    with dashboard(f"sqlite:///{path}") as get:
        (summary,) = get("/api/studies")["study_summaries"]
        study = get(f"/api/studies/{summary['study_id']}")
    return trials, study


def test_the_study_has_the_name_and_the_objectives_of_the_search(opened):
    _, study = opened
    assert study["name"] == "toy"
    assert study["directions"] == ["minimize", "minimize"]
    assert study["objective_names"] == ["loss", "prefill_ms"]


def test_every_trial_is_there_with_its_values_and_parameters(opened):
    trials, study = opened
    assert [shown["number"] for shown in study["trials"]] == list(range(12))
    for shown, trial in zip(study["trials"], trials, strict=True):
        assert shown["state"].lower() == trial.state.name.lower()
        if trial.complete:
            assert shown["values"] == [trial.loss, trial.costs["prefill_ms"]]
        values = {param["name"]: param["param_external_value"] for param in shown["params"]}
        for size in ("num_layers", "model_dim", "ffn_dim"):
            assert values.pop(size) == str(getattr(trial.spec, size))
        assert list(values.values()) == [kind.value for kind in trial.spec.layer_types]
        attrs = {attr["key"]: attr["value"] for attr in shown["user_attrs"]}
        assert attrs["pattern"] == trial.spec.pattern


def test_parameters_that_all_trials_have_can_be_compared(opened):
    _, study = opened
    common = {param["name"] for param in study["intersection_search_space"]}
    assert {"num_layers", "model_dim", "ffn_dim", "layer_00"} <= common


def attributes(shown):
    return {attr["key"]: attr["value"] for attr in shown["user_attrs"]}


def test_costs_and_size_are_numbers_that_the_dashboard_can_plot(opened):
    trials, study = opened
    sortable = {attr["key"] for attr in study["union_user_attrs"] if attr["sortable"]}
    assert {*trials[0].costs, "parameters"} <= sortable
    for shown, trial in zip(study["trials"], trials, strict=True):
        found = attributes(shown)
        assert {key: float(found[key]) for key in trial.costs} == trial.costs
        assert found["parameters"] == str(count_parameters(trial.spec).total)


def test_every_trial_has_the_name_of_its_architecture(opened):
    trials, study = opened
    for shown, trial in zip(study["trials"], trials, strict=True):
        name = attributes(shown)["name"].strip('"')
        assert name == arch_name("toy", trial.number, trial.spec)


def test_the_curve_of_a_trial_is_its_intermediate_values(opened):
    trials, study = opened
    assert study["has_intermediate_values"]
    for shown, trial in zip(study["trials"], trials, strict=True):
        points = [[each["step"], each["value"]] for each in shown["intermediate_values"]]
        assert points == (CURVE if trial.complete else [])


def test_the_learning_curves_are_a_plot_of_the_study(opened):
    _, study = opened
    (plot,) = study["plotly_graph_objects"]
    assert plot["id"] == "learning_curves"
    assert json.loads(plot["graph_object"])["data"][0]["name"] == "curve of a trial"


def test_a_study_of_an_older_version_goes_on(tmp_path):
    path = tmp_path / "study.db"
    toy.run(path, trials=8, evaluate=evaluate)
    with closing(sqlite3.connect(path)) as database, database:
        new = "key in ('name', 'parameters') or key like '%_ms' or key like '%_mib'"
        database.execute(f"delete from trial_user_attributes where {new}")
        database.execute("delete from trial_intermediate_values")
    trials = toy.run(path, trials=12, evaluate=evaluate)
    assert sum(trial.complete for trial in trials) == 11
    assert all(trial.costs["prefill_ms"] > 0 for trial in trials)


def test_a_failed_trial_says_why(opened):
    _, study = opened
    attrs = attributes(study["trials"][3])
    assert study["trials"][3]["state"] == "Fail"
    assert "out of memory" in attrs["reason"]
