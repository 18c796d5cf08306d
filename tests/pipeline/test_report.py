"""The report and the runs of W&B that a search and its exports leave."""

import json
from pathlib import Path

import pytest

from flash.errors import InputError
from flash.export.result import ExportResult
from flash.export.run import export
from flash.export.settings import ExportFormat
from flash.paths import Runs
from flash.records import file_digest
from flash.report.page import render
from flash.report.reading import read
from flash.report.table import as_text
from flash.report.wandb_run import log_report
from tests.pipeline.conftest import LOGGER, export_settings
from tests.tracking.offline import read_runs


def test_the_report_shows_backbone_and_winner(common, winner):
    runs = Runs(Path(common["runs"]))
    data = read(runs)
    tables = as_text(data.models).split("\n\n")
    for lines in map(str.splitlines, tables):
        assert max(map(len, lines)) <= 80
        assert [line.split()[0] for line in lines[1:3]] == ["small", winner[0]]
        assert " - " not in f"{lines[2]} "  # the winner's row is complete
    for model in data.models[:2]:
        assert model.exported is not None
        assert model.predicted == model.exported.predicted
    backbone = data.models[0]
    point = "prefill_32"
    slow = backbone.predicted[point]["slowdown"]
    in_search = data.studies[0].search.latency_points[point][-1]
    assert slow == pytest.approx(backbone.exported.measurement.latencies[point].ms / in_search)
    page = render(data)
    assert "https://" not in page.split("</head>")[1]  # nothing is fetched
    for title in ("Frontier", "Predicted against measured", "Recovery", "Layers"):
        assert title in page


def test_wandb_traces_the_program_on_the_phone_back_to_its_trial(common, searched, winner):
    name, _ = winner
    runs = Runs(Path(common["runs"]))
    for kinds in ([ExportFormat.hf], [ExportFormat.hf]):  # the second time it is finished
        export(export_settings(common, name, winner[1], format=kinds))
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
