"""Facts about a study in the real optuna-dashboard, read through its JSON API."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import pytest

from flash.search.loop import EvaluationError, Quality
from tests.search import toy_search as toy


def evaluate(spec, number, watch):
    if number == 3:
        raise EvaluationError("out of memory")
    return Quality(toy.loss(spec), {"tokens": 512})


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


def test_a_failed_trial_says_why(opened):
    _, study = opened
    attrs = {attr["key"]: attr["value"] for attr in study["trials"][3]["user_attrs"]}
    assert study["trials"][3]["state"] == "Fail"
    assert "out of memory" in attrs["reason"]
