"""Data of one study, read from a `runs` folder for the report."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec, count_parameters
from flash.commands import command
from flash.device.workload import Point
from flash.errors import InputError, under
from flash.evaluation.suites import SuiteResult
from flash.export.result import ExportResult
from flash.paths import Runs
from flash.records import find_json, read_json
from flash.training.result import TrainResult


@dataclass(frozen=True)
class TrialPoint:
    """Trial with a loss or, if it was stopped early, a predicted loss.

    Attributes:
        number: Trial number in the study.
        name: Name of the architecture if the trial is on the frontier, else None.
        spec: Architecture.
        loss: Held-out loss after the short training [nats a token]; predicted for a stopped trial.
        costs: Known objectives by key of `Objective`.
        latency_ms: Predicted headline latency [ms].
        winner: True if the trial was chosen for final training.
        curve: Pairs (tokens seen, training loss) along the trial; empty if not recorded.
        reason: Reason for stopping the trial early, or None.
    """

    number: int
    name: str | None
    spec: ArchSpec
    loss: float
    costs: dict[str, float]
    latency_ms: float
    winner: bool
    curve: list[tuple[float, float]]
    reason: str | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return count_parameters(self.spec).total


@dataclass(frozen=True)
class Model:
    """Row of the result table: the backbone or a winner, with the results so far.

    Attributes:
        name: Name of the architecture.
        spec: Architecture.
        predicted: Predicted latencies with intervals by point, such as `prefill_512`.
        trained: Result of `train.py`; None for the backbone or before it ran.
        exported: Result of `export.py`; None before it ran.
        qat_exported: Result of `export.py` for the same architecture trained with a recipe that has
            `qat`; None if there is none.
        backbone_quality: Held-out quality of the backbone; None for winners.
    """

    name: str
    spec: ArchSpec
    predicted: dict[str, dict[str, float]]
    trained: TrainResult | None = None
    exported: ExportResult | None = None
    qat_exported: ExportResult | None = None
    backbone_quality: dict[str, float] | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return count_parameters(self.spec).total


@dataclass(frozen=True)
class Promotion:
    """Longer training of the best trials (`stage=promote`).

    Attributes:
        tokens: Length of the longer training [tokens].
        losses: Pairs of a trial and its held-out loss after the longer training [nats a token].
        kendall_tau: Rank correlation of the short and the long losses; None for one trial.
        swapped: Number of discordant pairs, whose order changed.
        pairs: Number of pairs of trials.
    """

    tokens: int
    losses: list[tuple[TrialPoint, float]]
    kendall_tau: float | None
    swapped: int
    pairs: int


@dataclass(frozen=True)
class ReportData:
    """One study and the models made from it.

    Attributes:
        study: Name of the study.
        search: Content of `frontier.json`.
        trials: Complete trials.
        stopped: Trials that were stopped early.
        failed: Number of failed trials.
        models: Backbone, then the winners, fastest first.
        promotion: Comparison with longer training; None if `stage=promote` did not run.
        evaluations: Benchmark results of the models so far.
    """

    study: str
    search: dict[str, Any]
    trials: list[TrialPoint]
    stopped: list[TrialPoint]
    failed: int
    models: list[Model]
    promotion: Promotion | None
    evaluations: list[SuiteResult]

    @property
    def backbone(self) -> Model:
        """Row of the backbone, the first of `models`."""
        return self.models[0]

    @property
    def frontier(self) -> list[TrialPoint]:
        """Trials on the frontier, fastest first."""
        front = [trial for trial in self.trials if trial.name is not None]
        return sorted(front, key=lambda trial: trial.latency_ms)

    @property
    def cost_keys(self) -> list[str]:
        """Keys of the objectives other than loss, or of the headline latency without any."""
        keys = [key for key in self.search["objectives"] if key != "loss"]
        return keys or [f"{Point.parse(self.search['objective']).phase.value}_ms"]


def read(runs: Runs, study: str | None = None) -> ReportData:
    """Read a study.

    Args:
        runs: Folder with all results.
        study: Name of the study; None takes the latest.

    Raises:
        InputError: No search of that name is finished, or a file is damaged.
    """
    pattern = f"{study or '*'}/frontier.json"
    found = sorted((runs.root / "studies").glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(
            f"{runs.root / 'studies' / pattern}: no finished search; run {command('search')}"
        )
    path: Path = found[-1]
    search = read_json(path, _Search.of, f"run {command('search')} again")
    trials = [trial for trial in search.trials if trial.reason is None]
    models = _models(runs, search)
    promotion = find_json(
        path.with_name("promoted.json"),
        lambda values: _promotion(values, trials),
        f"run {command('search')} stage=promote again",
    )
    return ReportData(
        study=search.values["study"],
        search=search.values,
        trials=trials,
        stopped=[trial for trial in search.trials if trial.reason is not None],
        failed=sum(trial["state"] == "fail" for trial in search.values["trials"]),
        models=models,
        promotion=promotion,
        evaluations=_evaluations(runs, models),
    )


@dataclass(frozen=True)
class _Search:
    """Content of `frontier.json`.

    Attributes:
        values: Parsed JSON value.
        trials: Complete trials and those that were stopped early.
        models: Backbone, then the winners, fastest first, without results of training and export.
    """

    values: dict[str, Any]
    trials: list[TrialPoint]
    models: list[Model]

    @classmethod
    def of(cls, values: dict[str, Any]) -> "_Search":
        names = {int(number): name for number, name in values["names"].items()}
        winners = set(values["winners"])
        trials = [
            _trial(trial, names.get(trial["number"]), trial["number"] in winners)
            for trial in values["trials"]
            if trial["state"] in {"complete", "pruned"}
        ]
        about = values["backbone"]
        backbone = Model(
            name=about["name"],
            spec=ArchSpec.from_dict(about["spec"]),
            predicted=about["predicted"],
            backbone_quality=about["quality"],
        )
        found = [
            Model(trial.name, trial.spec, values["predicted"][str(trial.number)])
            for trial in sorted(trials, key=lambda trial: trial.latency_ms)
            if trial.winner and trial.name is not None and trial.reason is None
        ]
        return cls(values, trials, [backbone, *found])


def _evaluations(runs: Runs, models: list[Model]) -> list[SuiteResult]:
    found = [
        SuiteResult.read(path)
        for model in models
        for path in sorted(runs.evaluation(model.name).glob("*.json"))
    ]
    specs = {model.name: model.spec for model in models}
    return [result for result in found if result.spec == specs[result.name]]


def _trial(trial: dict[str, Any], name: str | None, winner: bool) -> TrialPoint:
    extra, stopped = trial["extra"], trial["state"] == "pruned"
    with under(f"trial {trial['number']}: spec"):
        spec = ArchSpec.from_dict(trial["spec"])
    return TrialPoint(
        number=trial["number"],
        name=name,
        spec=spec,
        loss=extra["estimate"] if stopped else trial["loss"],
        costs=trial["costs"],
        latency_ms=trial["latency_ms"],
        winner=winner,
        curve=[(tokens, loss) for tokens, loss in extra.get("curve", [])],
        reason=extra["reason"] if stopped else None,
    )


def _promotion(report: dict[str, Any], trials: list[TrialPoint]) -> Promotion | None:
    by_number = {trial.number: trial for trial in trials}
    losses = [
        (by_number[row["number"]], row["long_loss"])
        for row in report["trials"]
        # A stored result may belong to an earlier study of the same name.
        if row["number"] in by_number
        and by_number[row["number"]].spec == ArchSpec.from_dict(row["spec"])
        and row["long_loss"] is not None
    ]
    if not losses:
        return None
    return Promotion(
        report["tokens"], losses, report["kendall_tau"], report["swapped"], report["pairs"]
    )


def _find_qat_export(runs: Runs, spec: ArchSpec) -> ExportResult | None:
    """Find the export of a model of `spec` that was trained with quantization awareness."""
    for path in sorted((runs.root / "exports").glob("*/export.json")):
        trained = TrainResult.read(runs.model(path.parent.name))
        if trained is None or trained.spec != spec or not trained.settings["recipe"]["qat"]:
            continue
        exported = ExportResult.read(path.parent)
        if exported is not None and exported.spec == spec:
            return exported
    return None


def _models(runs: Runs, search: _Search) -> list[Model]:
    """Add the results of training and export to the models of a search."""
    backbone, *winners = search.models
    models = [dataclasses.replace(backbone, exported=ExportResult.read(runs.export(backbone.name)))]
    for model in winners:
        trained = TrainResult.read(runs.model(model.name))
        exported = ExportResult.read(runs.export(model.name))
        found = dataclasses.replace(
            model,
            # A stored result may belong to an earlier search under the same name.
            trained=trained if trained and trained.spec == model.spec else None,
            exported=exported if exported and exported.spec == model.spec else None,
            qat_exported=_find_qat_export(runs, model.spec),
        )
        models.append(found)
    return models
