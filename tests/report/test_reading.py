"""Facts about what the report reads, and about results that are missing or damaged."""

import json
import re

import pytest

from flash.errors import InputError
from flash.paths import Runs
from flash.provenance import machine, provenance
from flash.report.command import main
from flash.report.page import render
from flash.report.reading import read
from flash.search.settings import Sampler
from flash.training.result import TrainResult
from tests.report.toy_study import rename_study, write_model, write_study
from tests.search import toy_search as toy


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return toy.run(tmp_path_factory.mktemp("study") / "study.db", sampler=Sampler.random)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "runs")


def test_models_without_any_search_are_reported(runs, capsys):
    write_model(runs, "mine", toy.BACKBONE)
    assert main(["--runs", str(runs.root)]) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in ("mine", "2.500", "2.250", "11.5 +- 0.1"))
    page = runs.report.read_text()
    assert "<h1>Models</h1>" in page
    assert "main(): &lt;b&gt;" in page


def test_an_empty_folder_is_one_line(runs):
    with pytest.raises(InputError, match=r"runs: no finished search and no .* run flash search"):
        main(["--runs", str(runs.root)])


def test_a_damaged_result_is_said_and_the_others_are_shown(runs, trials, capsys):
    write_study(runs, trials)
    write_model(runs, "mine", toy.BACKBONE)
    write_model(runs, "torn", toy.BACKBONE)
    path = runs.model("torn") / "result.json"
    path.write_text(path.read_text()[:50])
    (runs.export("mine") / "model.pte").unlink()
    assert main(["--runs", str(runs.root)]) == 0
    said = capsys.readouterr()
    assert re.search(r"warning: .*torn/result\.json: damaged .* train again", said.err)
    assert re.search(r"warning: .*mine/model\.pte: missing; run flash export again", said.err)
    assert "mine" in said.out
    page = runs.report.read_text()
    assert "torn/result.json: damaged" in page
    assert "mine/model.pte: missing" in page


@pytest.mark.parametrize(
    "key", ["hypervolume", "reference", "latency_points", "device", "workload", "settings"]
)
def test_a_study_that_lacks_a_part_is_said_and_left_out(runs, trials, key):
    report = write_study(runs, trials)
    write_model(runs, "mine", toy.BACKBONE)
    path = runs.study("toy") / "frontier.json"
    path.write_text(json.dumps({k: v for k, v in report.items() if k != key}))
    data = read(runs)
    assert data.studies == []
    assert re.search(rf"frontier\.json: damaged \({key}: missing\)", data.faults[0])
    assert [model.name for model in data.models] == ["mine"]
    render(data)


def test_an_unfinished_study_is_said(runs, trials):
    write_study(runs, trials)
    runs.study("half").mkdir()
    data = read(runs, ["toy", "half"])
    assert [study.name for study in data.studies] == ["toy"]
    assert re.search(r"half/frontier\.json: missing, .*search\.study=half", data.faults[0])


@pytest.mark.parametrize("form", [["--study", "toy,toy_phone"], ["study=toy,toy_phone"]])
def test_studies_are_side_by_side(runs, trials, form, capsys):
    write_study(runs, trials)
    rename_study(runs, "toy_phone", device="phone")
    assert main([f"runs={runs.root}", *form]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("toy on toy ", "toy on phone ", "toy_phone_"))
    page = runs.report.read_text()
    assert "<h1>Studies toy, toy_phone</h1>" in page
    for figure in ("comparison", "toy-frontier", "toy_phone-frontier"):
        assert f'id="{figure}"' in page
    best = min(trials, key=lambda trial: trial.loss)
    assert f">{best.spec}</td>" in page.partition("Members of a frontier")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study=tpy"], r"--study tpy: no such study in .*studies; did you mean 'toy'\?"),
        (["studies=toy"], r"studies=toy: no such option of the report; did you mean 'study'\?"),
    ],
)
def test_a_wrong_word_is_one_line(runs, trials, words, message):
    write_study(runs, trials)
    with pytest.raises(InputError, match=message):
        main([f"runs={runs.root}", *words])


def test_a_trial_shows_what_was_measured_on_the_device_of_its_study(runs, trials):
    report = write_study(runs, trials)
    rename_study(runs, "toy_phone", device="phone")
    number = report["winners"][0]
    name, spec = report["names"][str(number)], trials[number].spec
    write_model(runs, name, spec, device=None)
    write_model(runs, f"{name}-phone", spec, device="phone")
    study = read(runs, ["toy"]).studies[0]
    model = next(trial.model for trial in study.trials if trial.number == number)
    assert model is not None
    assert model.exported is not None
    assert model.exported.name == name
    (runs.export(name) / "export.json").unlink()
    study = read(runs, ["toy"]).studies[0]
    assert all(model.exported is None for model in study.models)


def test_a_training_with_options_is_that_of_its_winner(runs, trials):
    report = write_study(runs, trials)
    number = report["winners"][0]
    name, spec = report["names"][str(number)], trials[number].spec
    write_model(runs, f"{name}-mine", spec)
    write_model(runs, f"{name}-mine-tokens_8192", spec)
    write_model(runs, f"{name}0", spec)
    data = read(runs, ["toy"])
    [model] = [model for model in data.models if model.name == name]
    assert model.trained is not None
    assert model.exported is not None
    assert (model.trained.name, model.exported.name) == (f"{name}-mine", f"{name}-mine")
    others = {f"{name}-mine-tokens_8192", f"{name}0"}
    assert {model.name for model in data.models if model.study is None} == others


def test_a_result_has_the_name_of_its_folder(runs):
    write_model(runs, "mine", toy.BACKBONE)
    for folder in (runs.model, runs.export):
        folder("mine").rename(folder("renamed"))
    data = read(runs)
    assert [model.name for model in data.models] == ["renamed"]
    assert data.faults == []


def test_models_of_other_studies_are_left_out(runs, trials):
    write_study(runs, trials)
    rename_study(runs, "other", device="phone")
    write_model(runs, "other_3", toy.BACKBONE)
    write_model(runs, "mine", toy.BACKBONE)
    names = [model.name for model in read(runs, ["toy"]).models]
    assert "mine" in names
    assert "other_3" not in names


def test_a_result_keeps_its_origin_and_an_old_one_has_none(runs):
    write_model(runs, "mine", toy.BACKBONE)
    found = TrainResult.read(runs.model("mine"))
    assert found is not None
    assert (
        found.provenance.keys()
        == provenance().keys()
        == {
            "command",
            "date",
            "commit",
            "versions",
            "machine",
        }
    )
    assert found.provenance["machine"].partition(" x ")[0] in machine()
    path = runs.model("mine") / "result.json"
    values = json.loads(path.read_text())
    del values["provenance"]
    path.write_text(json.dumps(values))
    old = TrainResult.read(runs.model("mine"))
    assert old is not None
    assert old.provenance == {}
    assert "not recorded" in render(read(runs))
