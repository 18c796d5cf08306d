"""Exports of a winner and of its backbone, from the gate to the measured program."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from flash.arch import CacheFormat
from flash.device.host import HostDevice
from flash.errors import CheckFailed, InputError
from flash.evaluation.run import EvaluatedModel
from flash.evaluation.settings import EvaluateSettings, ModelFormat, SuiteSettings, TaskSettings
from flash.export.found import export_folder, find_program, program_of
from flash.export.job import ExportJob
from flash.export.perplexity import program_quality
from flash.export.predicted import predicted_latencies
from flash.export.result import ExportResult
from flash.export.run import export
from flash.export.settings import ExportFormat, FormatSettings
from flash.interop.settings import GgufFormat
from flash.latency.store import MeasurementStore
from flash.model.weights import read_metadata
from flash.paths import Runs
from flash.records import file_digest
from flash.report.page import render
from flash.report.reading import read
from flash.report.table import quantization_rows
from flash.rounding.settings import TrainedRounding
from flash.search.run import run_search
from flash.tracking.settings import LoggerKind, LoggerSettings
from flash.training.run import train
from flash.training.settings import (
    Precision,
    TrainerSettings,
    TrainSettings,
)
from tests.conftest import SMALL
from tests.pipeline.conftest import (
    DEVICE,
    GATE,
    RECIPE,
    export_settings,
    search_settings,
    with_lowering,
)


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
    assert run_search(search_settings(common))["trials"] == searched["trials"]


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
    assert export(export_settings(common, name, arch)).name == name


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
        EvaluatedModel.open(EvaluateSettings(**values, device=device, suite=suite), find_program)
        for device in (
            DEVICE,
            with_lowering(max_context=48),
            with_lowering(max_context=96, prefill_chunk=40),
        )
    ]
    assert [subject.context for subject in subjects] == [64] * 3
    assert [subject.key() for subject in subjects] == [subjects[0].key()] * 3


def test_a_failing_gate_publishes_nothing_and_names_the_stage(common, winner, tmp_path):
    name, arch = winner
    trained = Runs(Path(common["runs"])).model(name) / "checkpoint"
    strict = dataclasses.replace(GATE, max_kl_quantized=1e-12)
    settings = export_settings(common, "strict", arch, gate=strict, model=str(trained))
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


def test_a_stopped_export_goes_on_with_its_proved_program(common, winner, monkeypatch):
    name, arch = winner
    runs = Runs(Path(common["runs"]))
    trained = runs.model(name) / "checkpoint"
    settings = export_settings(common, "resumed", arch, model=str(trained))
    folder = runs.export("resumed")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flash.export.run.program_quality", stop)
        with pytest.raises(KeyboardInterrupt):
            export(settings)
    assert not (folder / "model.pte").exists()
    kept = file_digest(folder / ".model.pte")
    with monkeypatch.context() as patch:
        patch.setattr("flash.export.run.lower", pytest.fail)
        result = export(settings)
    assert result is not None
    assert result.gate["passed"]
    assert file_digest(folder / "model.pte") == kept
    names = {path.name for path in folder.iterdir()}
    assert names == {".lock", "export.json", "gate.json", "model.pte", "wandb.json"}
    # Of two exports of the same weights, an evaluation means the one that it is named after.
    for each in (name, "resumed"):
        assert export_folder(runs, f"{each}-limit_2", trained) == runs.export(each)
    with pytest.raises(InputError, match=rf"expected one export .* found resumed, {name}"):
        export_folder(runs, "other", trained)
    shutil.rmtree(folder)


def test_a_program_that_loses_too_much_leaves_the_former_export(common, winner, monkeypatch):
    name, arch = winner
    folder = Runs(Path(common["runs"])).export(name)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def worse(*given):
        found = program_quality(*given)
        change = dataclasses.replace(found.change, loss=found.change.float_loss + 1)
        return dataclasses.replace(found, change=change)

    monkeypatch.setattr("flash.export.run.program_quality", worse)
    silent = LoggerSettings(name="none", kind=LoggerKind.none)
    changes = {"new_tokens": 4, "overwrite": True, "logger": silent}
    settings = export_settings(common, name, arch, **changes)
    with pytest.raises(CheckFailed, match=r"as \.pte, perplexity is .*nothing was published"):
        export(settings)
    failed = json.loads((folder / "gate_failed.json").read_text())
    assert not failed["passed"]
    assert "as .pte, perplexity" in failed["where"]
    (folder / "gate_failed.json").unlink()
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after.keys() == before.keys()
    assert {key for key in after if after[key] != before[key]} <= {".lock", "wandb.json"}


def test_a_format_is_keyed_by_its_own_settings(common, winner):
    name, arch = winner

    def keys(**formats):
        settings = export_settings(common, name, arch, formats=FormatSettings(**formats))
        return ExportJob.open(settings, Runs(Path(common["runs"]))).keys

    default, small, strict = keys(), keys(gguf=GgufFormat.q4_0), keys(max_error_hf=1e-5)
    same = lambda other: {kind.value for kind in default if default[kind] == other[kind]}  # noqa: E731
    assert same(small) == {"executorch", "hf"}
    assert same(strict) == {"executorch", "gguf"}


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
        other = export_settings(common, name, arch, **changes)
        with pytest.raises(
            InputError, match=r"model\.pte: holds an export of other .*overwrite=true"
        ):
            export(other)
    assert (folder / "export.json").read_text() == before


def test_a_winner_is_written_for_stock_transformers_beside_its_program(common, winner, capsys):
    name, arch = winner
    folder = Runs(Path(common["runs"])).export(name)
    before = sorted(path.name for path in folder.iterdir())
    assert export(export_settings(common, name, arch, format=[ExportFormat.hf])) is None
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "hf", "hf.json"])
    assert f"{name}: {folder / 'hf'}" in capsys.readouterr().out


def test_what_could_only_fail_later_is_refused_first(common, winner, monkeypatch):
    monkeypatch.setattr("flash.export.run.load_checkpoint", pytest.fail)
    name, arch = winner
    new = {"model": str(Runs(Path(common["runs"])).model(name) / "checkpoint")}
    device, many = with_lowering(group_size=96), with_lowering(calibration_tokens=10**12)
    cases = [
        ({"format": []}, r"format=\[\]: expected some of executorch, hf, gguf"),
        ({"new_tokens": 64}, r"new_tokens=64: expected at most \d+, which device\.lowering\.max"),
        ({"perplexity_tokens": 4}, r"perplexity_tokens=4: expected at least"),
        ({"device": device}, r"lowering\.group_size=96: expected a divisor of model_dim"),
        ({"device": many}, r"device\.lowering\.calibration_tokens=10{12}: expected at most \d+: "),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            export(export_settings(common, "new", arch, **new, **changes))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(
            InputError, match=r"runs=.* with 0\.0 MiB free: expected at least [\d.]+ MiB"
        ):
            export(export_settings(common, "new", arch, **new))


def test_an_untrained_arch_is_refused(common, searched):
    with pytest.raises(InputError, match=r"expected trained weights in .*run flash train"):
        export(export_settings(common, "never_trained", {"ffn_dim": 64}))


def test_what_rounding_costs_is_reported_before_and_after_training_for_it(common, winner, caplog):
    name, arch = winner
    runs = Runs(Path(common["runs"]))
    recipe = dataclasses.replace(RECIPE, qat=True)
    start = str(runs.model(name) / "checkpoint")
    train(TrainSettings(**common, recipe=recipe, arch=arch, name="aware", start=start))
    metadata = read_metadata(runs.model("aware") / "checkpoint")
    assert TrainedRounding.of_metadata(metadata) == recipe.trained_rounding
    aware = export(export_settings(common, "aware", arch))
    assert "was trained with" not in caplog.text
    bytes_of_8 = with_lowering(embedding_bits=8)
    other = export_settings(common, "aware", arch, device=bytes_of_8, overwrite=True)
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
    points = searched["latency_points"]
    assert found.backbone_ms == {point: every[-1] for point, every in points.items()}
    assert points.keys() == found.by_point.keys()
    broken = runs.study("a") / "frontier.json"
    broken.parent.mkdir()
    broken.write_text('{"device": null', "utf-8")
    assert predicted_latencies(runs, device, DEVICE.lowering, spec) == found
    assert "a/frontier.json: damaged" in caplog.text
    other = dataclasses.replace(DEVICE.lowering, cache=CacheFormat.int8)
    assert predicted_latencies(runs, device, other, spec) is None
    shutil.rmtree(runs.study("t"))
    assert predicted_latencies(runs, device, DEVICE.lowering, spec) is None
