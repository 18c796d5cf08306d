"""W&B run of a report: the result table as numbers, and every figure of the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flash.paths import Runs
from flash.report.data import Model, ReportData
from flash.report.figures import all_figures, comparison_figures
from flash.tracking.backend import JobType, RunInfo
from flash.tracking.settings import LoggerSettings
from flash.tracking.tracker import open_tracker

_QUALITIES = ("loss", "bits_per_byte")
"""Qualities before and after training, attributes of `ValidationMetrics`."""


def log_report(data: ReportData, runs: Runs, logger: LoggerSettings) -> None:
    """Log a report as a run of the group of its study, or of all of them."""
    names = [study.name for study in data.studies]
    info = RunInfo(
        job=JobType.report,
        name=" ".join(["report", *names]),
        key="",  # a report that is made again is the same run
        group=",".join(names) or "report",
        tags={"backbone": data.models[0].name} if data.models else {},
        folder=runs.report.parent,
    )
    with open_tracker(logger, runs.logs, info) as tracker:
        columns, rows = result_table(data.models, runs, data.links)
        tracker.log_table("result", columns, rows)
        tracker.log_figures(lambda: _figures(data))


def _figures(data: ReportData) -> dict[str, Any]:
    """Draw all figures of the page; those of several studies have the study in their names."""
    figures: dict[str, Any] = comparison_figures(data.studies)
    for study in data.studies:
        prefix = f"{study.name}/" if len(data.studies) > 1 else ""
        figures |= {f"{prefix}{name}": figure for name, figure in all_figures(study).items()}
    return figures


def result_table(
    models: Sequence[Model], runs: Runs, links: Mapping[Path, str]
) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of the result table in numbers; unknown values are None.

    Args:
        models: Rows of the table.
        runs: Folder of results.
        links: URL of the W&B run of a result, by the folder of the result.
    """
    rows = [_values(model, runs, links) for model in models]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [[row.get(name) for name in columns] for row in rows]


def _values(model: Model, runs: Runs, links: Mapping[Path, str]) -> dict[str, Any]:
    exported, trained = model.exported, model.trained
    values: dict[str, Any] = {"model": model.name, "parameters": model.parameters}
    if model.backbone_quality is not None:
        values |= {f"{name}_before": model.backbone_quality[name] for name in _QUALITIES}
    if trained is not None:
        values |= {f"{name}_before": getattr(trained.before, name) for name in _QUALITIES}
        values |= {f"{name}_after": getattr(trained.after, name) for name in _QUALITIES}
        values["train_run"] = links.get(runs.model(model.name))
    for point, predicted in model.predicted.items():
        values |= _predicted(point, predicted)
    if exported is not None:
        for point, latency in exported.measurement.latencies.items():
            values |= {f"{point}_ms": latency.ms, f"{point}_se_ms": latency.se_ms}
        values |= {f"{point}_speedup": value for point, value in exported.speedups.items()}
        values["pte_mib"] = exported.pte_bytes / 2**20
        values["perplexity_change_pct"] = exported.program_quality.change.perplexity_pct
        values["export_run"] = links.get(runs.export(model.name))
    return values


def _predicted(point: str, values: Mapping[str, float]) -> dict[str, float]:
    names = {"mean": "predicted", "low": "predicted_low", "high": "predicted_high"}
    return {f"{point}_{name}_ms": values[f"{key}_ms"] for key, name in names.items()}
