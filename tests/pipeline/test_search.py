"""Searches from stage 1 to the frontier, continued, judged anew and promoted."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import MISSING

from flash.device.host import HostDevice
from flash.device.settings import DeviceKind
from flash.errors import DeviceError, InputError
from flash.export.predicted import predicted_latencies
from flash.model.settings import BackboneSettings
from flash.paths import Runs
from flash.report.figures import all_figures
from flash.report.page import render
from flash.report.reading import read as read_report
from flash.report.reading import read_study
from flash.report.table import measured_rows
from flash.search.run import run_search
from flash.search.settings import SearchLimits, SearchStage
from tests.conftest import SMALL
from tests.pipeline.conftest import RECIPE, TRAINER, search_settings, with_lowering
from tests.report.toy_study import write_model


def test_a_study_is_not_continued_with_what_would_change_its_figures(common, searched):
    settings = search_settings(common)
    changed = {
        "data.document_masks": {"data": dataclasses.replace(settings.data, document_masks=True)},
        "data.validation_sequences": {
            "data": dataclasses.replace(settings.data, validation_sequences=7)
        },
        "trainer.max_steps": {"trainer": dataclasses.replace(TRAINER, max_steps=1)},
        "lowering.embedding_bits": {"device": with_lowering(embedding_bits=8)},
    }
    for key, other in changed.items():
        with pytest.raises(InputError, match=rf"these differ: {key} \(was "):
            run_search(dataclasses.replace(settings, **other))


def test_the_search_writes_what_train_and_export_take_by_name(common, searched):
    found = Runs(Path(common["runs"])).found_arch
    assert len(searched["trials"]) == 5
    assert searched["frontier"]
    for number in searched["frontier"]:
        values = yaml.safe_load((found / f"{searched['names'][str(number)]}.yaml").read_text())
        spec = next(t["spec"] for t in searched["trials"] if t["number"] == number)
        assert values == spec
        predicted = searched["predicted"][str(number)]["prefill_32"]
        assert predicted["low_ms"] <= predicted["mean_ms"] <= predicted["high_ms"]


def test_trials_keep_their_curves_and_those_of_the_frontier_their_checkpoints(common, searched):
    folder = Runs(Path(common["runs"])).study("t") / "trials"
    kept = {int(path.name.partition("_")[0]): path for path in folder.iterdir()}
    assert sorted(kept) == sorted(searched["frontier"])
    for trial in searched["trials"]:
        assert [tokens for tokens, _ in trial["extra"]["curve"]] == [128, 256, 384, 512]
        assert len(trial["extra"]["importance"]) > 8
        assert trial["extra"]["seed"] == 0
    for path in kept.values():
        assert [file.name for file in path.iterdir()] == ["stable.ckpt"]


def test_a_finished_search_measures_and_trains_nothing(common, searched, monkeypatch):
    monkeypatch.setattr("flash.search.evaluate.ShortTraining.__call__", pytest.fail)
    monkeypatch.setattr("flash.device.host.HostDevice.measure", pytest.fail)
    monkeypatch.setattr("flash.latency.programs.lower", pytest.fail)
    again = run_search(search_settings(common))
    assert again["trials"] == searched["trials"]
    assert again["winners"] == searched["winners"]


def test_a_phone_that_is_unplugged_after_the_last_trial_does_not_cost_the_frontier(
    common, searched, monkeypatch
):
    identify, calls = HostDevice._identify, []

    def unplugged(device):
        calls.append(device)
        if len(calls) > 1:
            raise DeviceError("phone: gone")
        return identify(device)

    monkeypatch.setattr(HostDevice, "_identify", unplugged)
    assert run_search(search_settings(common))["device"] == searched["device"]
    assert len(calls) == 1


def test_a_study_of_another_recipe_is_refused(common, searched):
    settings = search_settings(common)
    settings.recipe = dataclasses.replace(RECIPE, lr=1e-4)
    with pytest.raises(InputError, match=r"search\.study=t: .*recipe\.lr"):
        run_search(settings)


def test_a_search_needs_backbone_weights(common, tmp_path):
    settings = search_settings({**common, "runs": str(tmp_path)})
    settings.backbone = BackboneSettings(name="random", arch=SMALL.to_dict())
    with pytest.raises(InputError, match=r"backbone\.weights=null"):
        run_search(settings)


def test_stage_one_alone_needs_no_weights_and_reports_the_predictor(common, searched, capsys):
    settings = search_settings(common)
    shape = {"name": "small", "arch": SMALL.to_dict()}
    settings = dataclasses.replace(
        settings, stage=SearchStage.latency, backbone=BackboneSettings(**shape), data=MISSING
    )
    report = run_search(settings)
    assert report["metrics"]["latency/prefill_32/blocks/n"] == 3
    printed = capsys.readouterr().out
    assert re.search("^prefill_32 +blocks ", printed, re.MULTILINE)
    assert max(map(len, printed.splitlines())) <= 80
    folder = Path(common["runs"]) / "latency" / "host"
    assert json.loads((folder / "latency.json").read_text())["device"] == report["device"]
    with (folder / "measurements.csv").open() as file:
        table = list(csv.DictReader(file))
    assert all(float(line["ms"]) > 0 and float(line["se_ms"]) >= 0 for line in table)
    assert {line["phase"] for line in table} == {"prefill", "decode"}


def test_one_search_for_two_devices(common, searched, monkeypatch, capsys):
    monkeypatch.setattr("flash.search.evaluate.ShortTraining.__call__", pytest.fail)
    settings = search_settings(common)
    second = dataclasses.replace(settings.device, name="second", processes=1)
    settings.devices = {"other": second}
    settings.latency = dataclasses.replace(settings.latency, whole_models=4)
    settings.search = dataclasses.replace(settings.search, study="both", from_study="t")
    report = run_search(settings)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "price of one model for all" in printed
    assert [*report["devices"]] == ["host", "second"]
    assert report["devices"]["second"]["device"]["device"] == "second"
    scores = report["devices"]["second"]["latency_scores"]
    assert scores["latency/prefill_32/analytical/n"] == 5
    read = read_study(Runs(Path(common["runs"])), "both")
    assert read.device_names == "host + second"
    drawn = all_figures(read)
    assert len(drawn["devices"].layout.xaxis2.title.text) > 0
    page = render(read_report(Runs(Path(common["runs"])), ["both"]))
    assert "Winners on each device" in page
    assert "Measured on each device" not in page
    runs, program = Runs(Path(common["runs"])), settings.device.lowering
    found = {
        name: predicted_latencies(runs, HostDevice(device), program, SMALL)
        for name, device in (("host", settings.device), ("second", second))
    }
    assert found["host"].backbone_ms != found["second"].backbone_ms
    report_of_exports(Runs(Path(common["runs"])))
    settings.devices["other"] = dataclasses.replace(second, kind=DeviceKind.ssh, cpus=None)
    with pytest.raises(InputError, match=r"^devices\.other\.ssh\.host="):
        run_search(settings)


def report_of_exports(runs: Runs) -> None:
    """Check what the report shows of a winner that was exported on both devices."""
    winner = read_study(runs, "both").winners[0]
    for name, device in ((winner.name, "host"), (f"{winner.name}-device_second", "second")):
        write_model(runs, name, winner.spec, device)
        path = runs.export(name) / "export.json"
        values = json.loads(path.read_text())
        latencies = values["measurement"]["latencies"]
        latencies |= {f"{key.partition('_')[0]}_32": each for key, each in [*latencies.items()]}
        predicted = {"mean_ms": 11.0, "low_ms": 10.0, "high_ms": 12.0}
        values |= {"predicted": {"prefill_32": predicted}}
        path.write_text(json.dumps(values))
    data = read_report(runs, ["both"])
    assert "Measured on each device" in render(data)
    [study] = data.studies
    columns, [line] = measured_rows(study)
    assert columns[1::3] == ["host TTFT [ms]", "second TTFT [ms]"]
    assert line[0] == winner.name
    assert line[1] == line[4] == "11.5 +- 0.1"
    assert not {model.name for model in data.others} & {f"{winner.name}-device_second"}
    drawn = all_figures(study)["predicted_against_measured"]
    names = [trace.name for trace in drawn.data]
    assert "exported models on host" in names
    assert "exported models on second" in names


def test_new_limits_and_objectives_need_no_training(common, searched, monkeypatch):
    monkeypatch.setattr("flash.search.evaluate.ShortTraining.__call__", pytest.fail)
    monkeypatch.setattr("flash.device.host.HostDevice.measure", pytest.fail)
    sizes = sorted(trial["costs"]["size_mib"] for trial in searched["trials"])
    settings = search_settings(common)
    settings.search = dataclasses.replace(
        settings.search,
        study="small",
        from_study="t",
        objectives=["size", "quality"],
        limits=SearchLimits(size_mib=sizes[2]),
    )
    report = run_search(settings)
    assert report["objectives"] == ["loss", "size_mib"]
    trials = {trial["number"]: trial for trial in report["trials"]}
    assert report["frontier"]
    assert all(trials[n]["costs"]["size_mib"] <= sizes[2] for n in report["frontier"])
    assert [t["loss"] for t in report["trials"]] == [t["loss"] for t in searched["trials"]]
    settings.seed += 1
    with pytest.raises(InputError, match=r"search\.from_study=t: .*seed"):
        run_search(settings)


def test_a_baseline_is_trained_once_and_sets_the_reference_point(common, searched, monkeypatch):
    settings = search_settings(common)
    baseline = {"model_dim": 32, "layer_types": ["full_attention"]}
    settings.search = dataclasses.replace(
        settings.search, study="above", from_study="t", baseline=baseline
    )
    report = run_search(settings)
    backbone = searched["reference"]
    assert report["reference"]["prefill_ms"] < backbone["prefill_ms"]
    assert 0 < abs(report["reference"]["loss"] - backbone["loss"]) < 6
    monkeypatch.setattr("flash.search.evaluate.ShortTraining.__call__", pytest.fail)
    assert run_search(settings)["reference"] == report["reference"]
    settings.search.baseline = {**baseline, "ffn_dim": 96}
    with pytest.raises(InputError, match=r"search\.baseline=.*member of space test: ffn_dim=96"):
        run_search(settings)
    settings.search.baseline = {"model_dim": 48}  # an illegal architecture
    with pytest.raises(InputError, match=r"search\.baseline\.model_dim=48: expected a mult"):
        run_search(settings)


def test_the_best_trials_are_trained_longer_once(common, searched, monkeypatch):
    settings = search_settings(common)
    settings.stage = SearchStage.promote
    settings.search = dataclasses.replace(settings.search, promote=2, promote_tokens=512)
    with pytest.raises(InputError, match=r"promote_tokens=512: expected more than"):
        run_search(settings)
    settings.search = dataclasses.replace(settings.search, promote_tokens=1024)
    report = run_search(settings)
    for row in report["trials"]:  # continued from the checkpoints of their trials
        short = searched["trials"][row["number"]]["extra"]["curve"]
        assert row["info"]["tokens"] == 1024
        assert row["info"]["curve"][0][1] == short[0][1]
    assert {row["number"] for row in report["trials"]} <= set(searched["frontier"])
    assert all(row["long_loss"] is not None for row in report["trials"])
    monkeypatch.setattr("flash.search.evaluate.ShortTraining.__call__", pytest.fail)
    assert run_search(settings) == report
