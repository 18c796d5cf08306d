"""End-to-end tests on a very small backbone: search, training, export and report."""

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from omegaconf import MISSING

from flash.arch import Attention, CacheFormat, Choices, SpaceSettings
from flash.device.host import HostDevice
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.errors import CheckFailed, DeviceError, InputError
from flash.evaluation.run import EvaluatedModel, program_of
from flash.evaluation.settings import EvaluateSettings, ModelFormat, SuiteSettings, TaskSettings
from flash.export.job import ExportJob
from flash.export.predicted import predicted_latencies
from flash.export.result import ExportResult
from flash.export.run import export
from flash.export.settings import ExportFormat, ExportSettings
from flash.latency.settings import LatencySettings
from flash.latency.store import MeasurementStore
from flash.lowering.settings import GateSettings, LoweringSettings
from flash.model.settings import BackboneSettings
from flash.model.weights import read_metadata
from flash.paths import Runs
from flash.records import file_digest
from flash.report.page import render
from flash.report.reading import read
from flash.report.table import as_text, quantization_rows
from flash.report.wandb_run import log_report
from flash.rounding.settings import TrainedRounding
from flash.search.objectives import Objective
from flash.search.run import run_search
from flash.search.settings import SearchJobSettings, SearchLimits, SearchSettings, SearchStage
from flash.tracking.settings import LoggerSettings
from flash.training.run import train
from flash.training.settings import (
    Precision,
    RecipeSettings,
    Schedule,
    TrainerSettings,
    TrainSettings,
)
from tests.conftest import SMALL
from tests.tracking.offline import read_runs

SPACE = SpaceSettings(
    name="test",
    num_layers=Choices(min=1, max=2),
    model_dim=Choices(min=32, max=64, step=32),
    ffn_dim=Choices(min=64, max=128, step=64),
    kinds=[Attention.full_attention, Attention.skip_attention],
    max_efficient_run=1,
)
DEVICE = DeviceSettings(
    name="host",
    processes=1,
    warmups=1,
    runs=2,
    lowering=LoweringSettings(max_context=64),
    workload=Workload(prompts=[32], contexts=[32], decode_tokens=4),
)
LATENCY = LatencySettings(grid_widths=2, grid_ffn=2, calibration_models=2, precision_pct=1000.0)
RECIPE = RecipeSettings(
    name="t", tokens=512, batch_size=4, lr=3e-3, calibration_tokens=256, schedule=Schedule.wsd
)
TRAINER = TrainerSettings(precision=Precision.fp32)
LOGGER = LoggerSettings(name="wandb", offline=True)
# With random weights, quantization to 4 bits changes most likeliest tokens; only the limits of the
# other stages stay tight.
GATE = GateSettings(prefill_tokens=8, decode_tokens=4, min_agreement_quantized=0.0)


def _device(**lowering) -> DeviceSettings:
    """Return `DEVICE` with other settings of the lowering."""
    return dataclasses.replace(DEVICE, lowering=dataclasses.replace(DEVICE.lowering, **lowering))


@pytest.fixture(scope="module")
def common(corpus, backbone_folder, tmp_path_factory):
    from flash.data.settings import DataKind, DataSettings

    data = DataSettings(
        name="test",
        kind=DataKind.folder,
        path=str(corpus),
        validation_percent=20,
        seq_len=32,
        validation_sequences=8,
    )
    return {
        "backbone": BackboneSettings(name="small", weights=str(backbone_folder)),
        "data": data,
        "trainer": TRAINER,
        "logger": LOGGER,
        "runs": str(tmp_path_factory.mktemp("work") / "runs"),
    }


def _search_settings(common) -> SearchJobSettings:
    return SearchJobSettings(
        **common,
        space=SPACE,
        latency=LATENCY,
        device=DEVICE,
        recipe=RECIPE,
        search=SearchSettings(
            study="t",
            trials=5,
            batch=2,
            startup_trials=3,
            winners=1,
            max_loss_increase=6.0,
            max_cost_ratio=3.0,
        ),
    )


@pytest.fixture(scope="module")
def searched(common):
    return run_search(_search_settings(common))


@pytest.fixture(scope="module")
def winner(common, searched):
    """Name and architecture of the trained and exported winner.

    The backbone is exported first.
    """
    name = (Runs(Path(common["runs"])).study("t") / "winners").read_text().strip()
    arch = yaml.safe_load((Runs(Path(common["runs"])).found_arch / f"{name}.yaml").read_text())
    recipe = dataclasses.replace(RECIPE, kd_weight=0.5)
    train(TrainSettings(**common, recipe=recipe, arch=arch, name=name))
    for each, what in ((None, {}), (name, arch)):
        export(_export_settings(common, each or "small", what))
    return name, arch


def _export_settings(common, name, arch, **changes) -> ExportSettings:
    values = {**common, "device": DEVICE, "gate": GATE, "arch": arch, "name": name}
    return ExportSettings(**{**values, "perplexity_tokens": 32, "new_tokens": 8, **changes})


def test_a_study_is_not_continued_with_what_would_change_its_figures(common, searched):
    settings = _search_settings(common)
    changed = {
        "data.document_masks": {"data": dataclasses.replace(settings.data, document_masks=True)},
        "data.validation_sequences": {
            "data": dataclasses.replace(settings.data, validation_sequences=7)
        },
        "trainer.max_steps": {"trainer": dataclasses.replace(TRAINER, max_steps=1)},
        "lowering.embedding_bits": {"device": _device(embedding_bits=8)},
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
    again = run_search(_search_settings(common))
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
    assert run_search(_search_settings(common))["device"] == searched["device"]
    assert len(calls) == 1


def test_an_export_adds_its_rows_and_the_search_measures_nothing_again(
    common, searched, winner, monkeypatch
):
    store = MeasurementStore(Runs(Path(common["runs"])).measurements)
    points = len(DEVICE.workload.points)
    backbone = SMALL.as_program().to_dict()
    keys = {row.key for row in store if row.subject == backbone}
    assert len(keys) == points
    for key in keys:
        *in_search, exported = store.attempts(key)  # more than one where the machine was busy
        rows = [*in_search, exported]
        assert [row.attempt for row in rows] == list(range(1, len(rows) + 1))
        [reference] = {row.result["reference"] for row in in_search}
        assert exported.result["reference"] != reference
    monkeypatch.setattr("flash.device.host.HostDevice.measure", pytest.fail)
    assert run_search(_search_settings(common))["trials"] == searched["trials"]


def test_the_export_proves_and_measures_the_program(common, winner):
    name, arch = winner
    folder = Runs(Path(common["runs"])).export(name)
    result = json.loads((folder / "export.json").read_text())
    assert (folder / "model.pte").stat().st_size == result["pte_bytes"]
    assert result["gate"]["passed"]
    assert [s["stage"] for s in result["gate"]["stages"]] == ["cached", "exported", "runtime"]
    assert result["gate"]["rounding"]["passed"]
    assert result["measurement"]["latencies"]["prefill_32"]["ms"] > 0
    assert result["measurement"]["samples"]
    assert result["reference"] == "small"
    assert result["speedups"]["prefill_32"] > 0
    assert result["predicted"] is not None
    quality = result["program_quality"]
    assert abs(quality["change"]["loss"] - quality["change"]["float_loss"]) < 0.5


def test_an_export_with_former_keys_is_read(common, winner, tmp_path):
    folder = Runs(Path(common["runs"])).export(winner[0])
    text = (folder / "export.json").read_text().replace('"program_quality"', '"artefact"')
    (tmp_path / "export.json").write_text(text)
    assert ExportResult.read(tmp_path) == ExportResult.read(folder)


def test_a_finished_export_is_not_repeated(common, winner, monkeypatch):
    monkeypatch.setattr("flash.export.run._export", pytest.fail)
    name, arch = winner
    assert export(_export_settings(common, name, arch)).name == name


def test_a_program_is_judged_only_as_that_of_its_own_weights(common, winner):
    name, _ = winner
    runs = Runs(Path(common["runs"]))
    folder, trained = runs.export(name), runs.model(name) / "checkpoint"
    spec = ExportResult.read(folder).spec
    assert program_of(folder, spec, trained) == folder / "model.pte"
    other = Path(common["backbone"].weights)
    with pytest.raises(InputError, match=r"model\.pte was made of other weights than .*again"):
        program_of(folder, spec, other)


def test_a_program_is_evaluated_with_the_context_of_its_file(common, winner):
    name, arch = winner
    values = {**common, "arch": arch, "name": name, "format": ModelFormat.program}
    del values["data"]
    suite = SuiteSettings(name="x", tasks=[TaskSettings(name="x", title="X", metric="acc,none")])
    subjects = [
        EvaluatedModel.open(EvaluateSettings(**values, device=device, suite=suite))
        for device in (DEVICE, _device(max_context=48), _device(max_context=96, prefill_chunk=40))
    ]
    assert [subject.context for subject in subjects] == [64] * 3
    assert [subject.key() for subject in subjects] == [subjects[0].key()] * 3


def test_a_failing_gate_publishes_nothing_and_names_the_stage(common, winner, tmp_path):
    name, arch = winner
    trained = Runs(Path(common["runs"])).model(name) / "checkpoint"
    strict = dataclasses.replace(GATE, max_kl_quantized=1e-12)
    settings = _export_settings(common, "strict", arch, gate=strict, model=str(trained))
    where = r"strict: the parity gate failed before the lowering, (no part stands|.* alone costs)"
    with pytest.raises(CheckFailed, match=where) as failed:
        export(settings)
    told = str(failed.value)
    assert f"flash train recipe=qat start={trained} name=strict-qat recipe.qat_group_" in told
    assert told.endswith("\n  flash export model=strict-qat name=strict-qat")
    rows = ("float", "rotate + gptq", "nearest", "rotate + gptq, embedding in 8 bits")
    assert all(f"\n{row}  " in told for row in rows), told
    folder = Runs(Path(common["runs"])).export("strict")
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "gate_failed.json",
        "wandb.json",
    ]
    report = json.loads((folder / "gate_failed.json").read_text())
    assert not report["passed"]


def test_a_finished_export_is_replaced_only_when_told(common, winner):
    name, arch = winner
    folder = Runs(Path(common["runs"])).export(name)
    before = (folder / "export.json").read_text()
    for changes in (
        {"new_tokens": 4},
        {"data": dataclasses.replace(common["data"], seq_len=30)},
        {"data": dataclasses.replace(common["data"], document_masks=True)},
        {"trainer": TrainerSettings(precision=Precision.bf16)},
    ):
        other = _export_settings(common, name, arch, **changes)
        with pytest.raises(
            InputError, match=r"model\.pte: holds an export of other .*overwrite=true"
        ):
            export(other)
    assert (folder / "export.json").read_text() == before


def test_a_winner_is_written_for_stock_transformers_beside_its_program(common, winner, capsys):
    name, arch = winner
    folder = Runs(Path(common["runs"])).export(name)
    before = sorted(path.name for path in folder.iterdir())
    assert export(_export_settings(common, name, arch, format=[ExportFormat.hf])) is None
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "hf", "hf.json"])
    assert f"{name}: {folder / 'hf'}" in capsys.readouterr().out


def test_what_could_only_fail_later_is_refused_first(common, winner, monkeypatch):
    monkeypatch.setattr("flash.export.run.load_checkpoint", pytest.fail)
    name, arch = winner
    new = {"model": str(Runs(Path(common["runs"])).model(name) / "checkpoint")}
    device, many = _device(group_size=96), _device(calibration_tokens=10**12)
    cases = [
        ({"format": []}, r"format=\[\]: expected some of executorch, hf, gguf"),
        ({"new_tokens": 64}, r"new_tokens=64: expected at most \d+, which device\.lowering\.max"),
        ({"perplexity_tokens": 4}, r"perplexity_tokens=4: expected at least"),
        ({"device": device}, r"lowering\.group_size=96: expected a divisor of model_dim"),
        ({"device": many}, r"device\.lowering\.calibration_tokens=10{12}: expected at most \d+: "),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            export(_export_settings(common, "new", arch, **new, **changes))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(
            InputError, match=r"runs=.* with 0\.0 MiB free: expected at least [\d.]+ MiB"
        ):
            export(_export_settings(common, "new", arch, **new))


def test_an_untrained_arch_is_refused(common, searched):
    with pytest.raises(InputError, match=r"expected trained weights in .*run flash train"):
        export(_export_settings(common, "never_trained", {"ffn_dim": 64}))


def test_what_rounding_costs_is_reported_before_and_after_training_for_it(common, winner, caplog):
    name, arch = winner
    runs = Runs(Path(common["runs"]))
    recipe = dataclasses.replace(RECIPE, qat=True)
    start = str(runs.model(name) / "checkpoint")
    train(TrainSettings(**common, recipe=recipe, arch=arch, name="aware", start=start))
    metadata = read_metadata(runs.model("aware") / "checkpoint")
    assert TrainedRounding.of_metadata(metadata) == recipe.trained_rounding
    aware = export(_export_settings(common, "aware", arch))
    assert "was trained with" not in caplog.text
    bytes_of_8 = _device(embedding_bits=8)
    other = _export_settings(common, "aware", arch, device=bytes_of_8, overwrite=True)
    ExportJob.open(other, runs).check()
    assert "recipe.qat_embedding_bits=4, not with device.lowering.embedding_bits=8" in caplog.text
    backbone, line = quantization_rows(read(runs).models)  # "aware" is a part of the second
    assert backbone[-2:] == ["-", "-"]
    assert line[0] == name
    assert line[-2] == f"{aware.program_quality.change.loss:.3f}"
    assert "Loss of quantization" in render(read(runs))


def test_a_damaged_frontier_costs_only_its_own_predictions(common, searched, tmp_path, caplog):
    runs = Runs(Path(shutil.copytree(Path(common["runs"], "studies"), tmp_path / "studies").parent))
    device, spec = HostDevice(DEVICE), SMALL.as_program()
    found = predicted_latencies(runs, device, DEVICE.lowering, spec)
    assert found is not None
    assert found.by_point == searched["backbone"]["predicted"]
    broken = runs.study("a") / "frontier.json"
    broken.parent.mkdir()
    broken.write_text('{"device": null', "utf-8")
    assert predicted_latencies(runs, device, DEVICE.lowering, spec) == found
    assert "a/frontier.json: damaged" in caplog.text
    other = dataclasses.replace(DEVICE.lowering, cache=CacheFormat.int8)
    assert predicted_latencies(runs, device, other, spec) is None
    shutil.rmtree(runs.study("t"))
    assert predicted_latencies(runs, device, DEVICE.lowering, spec) is None


def test_the_report_shows_backbone_and_winner(common, winner):
    runs = Runs(Path(common["runs"]))
    data = read(runs)
    tables = as_text(data.models).split("\n\n")
    for lines in map(str.splitlines, tables):
        assert max(map(len, lines)) <= 80
        assert [line.split()[0] for line in lines[1:3]] == ["small", winner[0]]
        assert " - " not in f"{lines[2]} "  # the winner's row is complete
    page = render(data)
    assert "https://" not in page.split("</head>")[1]  # nothing is fetched
    for title in ("Frontier", "Predicted against measured", "Recovery", "Layers"):
        assert title in page


def test_wandb_traces_the_program_on_the_phone_back_to_its_trial(common, searched, winner):
    name, _ = winner
    runs = Runs(Path(common["runs"]))
    for kinds in ([ExportFormat.hf], [ExportFormat.hf]):  # the second time it is finished
        export(_export_settings(common, name, winner[1], format=kinds))
    found = [run for run in read_runs(runs.logs) if name == run.run.display_name]
    [train_run, export_run, hf_run] = found
    [search_run] = [run for run in read_runs(runs.logs) if run.run.job_type == "search"]
    log_report(read(runs), runs, LOGGER)
    [report_run] = [run for run in read_runs(runs.logs) if run.run.job_type == "report"]
    group = [search_run, train_run, export_run, hf_run, report_run]
    assert [run.run.run_group for run in group] == ["t"] * 5
    assert hf_run.run.run_id == export_run.run.run_id

    def digests(artifacts):
        return {each.name: each.digest for each in artifacts if each.type != "run_table"}

    made = [digests(run.made) for run in (search_run, train_run, export_run)]
    used = [digests(run.used) for run in (search_run, train_run, export_run)]
    assert used[0].keys() == {"backbone-small"}
    assert used[0].items() <= used[1].items()
    assert {name for name in used[1] if name in made[0]} == {"importance-small", f"arch-{name}"}
    assert all(used[1][title] == made[0][title] for title in made[0].keys() & used[1].keys())
    assert used[2] == made[1] == {f"checkpoint-{name}": made[1][f"checkpoint-{name}"]}
    [pte] = export_run.made
    metadata = json.loads(pte.metadata)
    assert metadata["sha256"] == {"model.pte": file_digest(runs.export(name) / "model.pte")}
    names = {number: arch for number, arch in searched["names"].items() if arch == name}
    assert (metadata["study"], [str(metadata["trial"])]) == ("t", list(names))
    assert digests(hf_run.made).keys() == {f"hf-{name}"}


def test_wandb_has_the_predicted_latencies_beside_the_measured_ones(common, winner):
    runs = Runs(Path(common["runs"]))
    named = [run for run in read_runs(runs.logs) if run.run.display_name == winner[0]]
    [run] = [run for run in named if "export/pte_mib" in run.summary]
    result = ExportResult.read(runs.export(winner[0]))
    assert result is not None
    assert result.predicted is not None
    assert run.summary["export/prefill_32_ms"] == result.measurement.latencies["prefill_32"].ms
    predicted = result.predicted["prefill_32"]
    for name, key in (("predicted", "mean"), ("predicted_low", "low"), ("predicted_high", "high")):
        assert run.summary[f"export/prefill_32_{name}_ms"] == predicted[f"{key}_ms"]


def test_a_report_without_a_search_says_so(tmp_path):
    with pytest.raises(InputError, match="no finished search"):
        read(Runs(tmp_path))


def test_a_study_of_another_recipe_is_refused(common, searched):
    settings = _search_settings(common)
    settings.recipe = dataclasses.replace(RECIPE, lr=1e-4)
    with pytest.raises(InputError, match=r"search\.study=t: .*recipe\.lr"):
        run_search(settings)


def test_a_search_needs_backbone_weights(common, tmp_path):
    settings = _search_settings({**common, "runs": str(tmp_path)})
    settings.backbone = BackboneSettings(name="random", arch=SMALL.to_dict())
    with pytest.raises(InputError, match=r"backbone\.weights=null"):
        run_search(settings)


def test_stage_one_alone_needs_no_weights_and_reports_the_predictor(common, searched, capsys):
    settings = _search_settings(common)
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


def test_new_limits_and_objectives_need_no_training(common, searched, monkeypatch):
    monkeypatch.setattr("flash.search.evaluate.ShortTraining.__call__", pytest.fail)
    monkeypatch.setattr("flash.device.host.HostDevice.measure", pytest.fail)
    sizes = sorted(trial["costs"]["size_mib"] for trial in searched["trials"])
    settings = _search_settings(common)
    settings.search = dataclasses.replace(
        settings.search,
        study="small",
        from_study="t",
        objectives=[Objective.size, Objective.quality],
        limits=SearchLimits(size_mib=sizes[2]),
    )
    report = run_search(settings)
    assert report["objectives"] == ["loss", "size_mib"]
    trials = {trial["number"]: trial for trial in report["trials"]}
    assert report["frontier"]
    assert all(trials[n]["costs"]["size_mib"] <= sizes[2] for n in report["frontier"])
    assert [t["loss"] for t in report["trials"]] == [t["loss"] for t in searched["trials"]]
    settings.seed += 1
    with pytest.raises(InputError, match="search.study=t: .*seed"):
        run_search(settings)


def test_a_baseline_is_trained_once_and_sets_the_reference_point(common, searched, monkeypatch):
    settings = _search_settings(common)
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
    settings = _search_settings(common)
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
