"""Folder `runs` with the search of a toy space, made in a second for tests of the report."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from optuna.trial import TrialState

from flash.arch import ArchSpec
from flash.device.measurement import Latency, Measurement
from flash.export.result import ExportResult, ProgramQuality
from flash.lowering.loss_change import LossChange
from flash.paths import Runs
from flash.records import plain, write_text
from flash.search.frontier import write_report
from flash.search.loop import frontier
from flash.search.objectives import Objective
from flash.search.promote import compare
from flash.search.trial import Trial
from flash.training.result import FitResult, TrainResult, ValidationMetrics
from tests.search import toy_search as toy

TWO = (Objective.quality, Objective.prefill)


def with_curves(trials: Sequence[Trial], stopped: set[int]) -> list[Trial]:
    """Add learning curves to the trials, and stop some of them halfway."""
    changed = []
    for trial in trials:
        assert trial.loss is not None
        curve = [[256.0 * i, trial.loss + 2 / i] for i in range(1, 9)]
        extra = {**trial.extra, "curve": curve}
        if trial.number in stopped:
            extra |= {"curve": curve[:4], "estimate": trial.loss, "reason": "it is hopeless"}
            trial = replace(trial, state=TrialState.PRUNED, loss=None)
        changed.append(replace(trial, extra=extra))
    return changed


def write_study(
    runs: Runs, trials: Sequence[Trial], objectives: Sequence[Objective] = TWO
) -> dict[str, Any]:
    """Write `frontier.json` as `search.py` does; return its content."""
    settings = toy.make_settings(objectives=[each.name for each in objectives])
    problem = toy.make_problem(settings)
    front = frontier(trials, problem)
    backbone = {key: float(values[0]) for key, values in toy.costs([toy.BACKBONE]).items()}
    return write_report(
        runs.study("toy") / "frontier.json",
        "toy",
        trials,
        problem,
        2,
        about={
            "backbone": {
                "name": "toy",
                "spec": toy.BACKBONE.to_dict(),
                "quality": {"loss": toy.loss(toy.BACKBONE), "bits_per_byte": 1.0},
                "predicted": _predicted(backbone),
                "errors": plain(toy.errors(toy.BACKBONE)) if settings.tasks else {},
                "costs": backbone,
            },
            "names": {str(trial.number): f"toy_{rank}" for rank, trial in enumerate(front)},
            "predicted": {str(trial.number): _predicted(trial.costs) for trial in front},
            "objective": "prefill_64",
            "latency_scores": {},
            "latency_points": {"prefill_64": [10.0, 20.0]},
            "latency_fitted": {"prefill_64": [11.0, 19.0]},
            "space": {"name": "toy", "count": 1, "count_slots": 1},
            "device": {"kind": "toy"},
            "workload": {"prompts": [64], "contexts": [64]},
            "settings": {
                "search": {"startup_trials": settings.startup_trials},
                "recipe": {"tokens": 2048},
            },
        },
    )


def _predicted(costs: Any) -> dict[str, dict[str, float]]:
    return {
        f"{phase}_64": {
            "mean_ms": costs[f"{phase}_ms"],
            "low_ms": 0.9 * costs[f"{phase}_ms"],
            "high_ms": 1.1 * costs[f"{phase}_ms"],
        }
        for phase in ("prefill", "decode")
    }


def write_promotion(runs: Runs, report: dict[str, Any], k: int) -> None:
    """Write `promoted.json` as `stage=promote` does, for the first members of the frontier."""
    trials = {trial["number"]: trial for trial in report["trials"]}
    rng = np.random.default_rng(0)
    rows = []
    for number in report["frontier"][:k]:
        row = {key: trials[number][key] for key in ("number", "spec", "costs", "loss")}
        rows.append({**row, "long_loss": row["loss"] - float(rng.uniform(0.2, 0.8))})
    promoted = {"tokens": 8192, "trials": rows, **compare(rows)}
    write_text(runs.study("toy") / "promoted.json", json.dumps(promoted))


def rename_study(runs: Runs, name: str, device: str) -> None:
    """Write a copy of the toy study under another name and for another, slower device."""
    report = json.loads((runs.study("toy") / "frontier.json").read_text())
    for trial in report["trials"]:
        trial["costs"] = {
            key: 1.7 * value if key.endswith("_ms") else value
            for key, value in trial["costs"].items()
        }
        trial["latency_ms"] *= 1.7
    names = {number: f"{name}_{number}" for number in report["names"]}
    values = {**report, "study": name, "names": names, "device": {"device": device}}
    write_text(runs.study(name) / "frontier.json", json.dumps(values))


QUALITY = ValidationMetrics(2.5, 1.2, 4096)


def write_model(runs: Runs, name: str, spec: ArchSpec, device: str | None = None) -> None:
    """Write the results of training and export of a model, as `train` and `export` do."""
    after = replace(QUALITY, loss=2.25)
    fit = FitResult(steps=4, tokens=4096, tokens_per_s=1e4, mfu=0.1, peak_rss_mib=100.0)
    settings = {"recipe": {"qat": False}}
    TrainResult(name, spec, 1, QUALITY, after, fit, "0", settings).write(runs.model(name))
    latencies = {"prefill_64": Latency(ms=11.5, se_ms=0.1), "decode_64": Latency(ms=1.1, se_ms=0.0)}
    measurement = Measurement(
        name=name, latencies=latencies, load_ms=1.0, peak_rss_mib=10.0, model_rss_mib=5.0
    )
    ExportResult(
        name=name,
        spec=spec,
        parameters=1,
        quality=after,
        program_quality=ProgramQuality(
            change=LossChange(float_loss=2.25, loss=2.3, se=0.01, tokens=511), agreement=0.9
        ),
        pte_bytes=2**20,
        gate={},
        measurement=measurement,
        reference=None,
        speedups={},
        predicted=None,
        prompt="def ",
        completion="main(): <b>",
        device={"device": device},
        lower_s=1.0,
        key="0",
    ).write(runs.export(name))
    (runs.export(name) / "model.pte").write_bytes(b"")
