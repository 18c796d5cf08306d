"""Everything that a `runs` folder holds about one study, read for the report."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec, count_parameters
from flash.device.workload import Point
from flash.errors import InputError
from flash.evaluation.suites import SuiteResult
from flash.export.result import ExportResult
from flash.paths import Runs
from flash.records import find_json, read_json
from flash.training.result import TrainResult


@dataclass(frozen=True)
class TrialPoint:
    """One candidate of the search.

    Attributes:
        number: In the study.
        name: The arch's name if it is on the frontier.
        spec: Architecture.
        loss: Held-out loss after the short training [nats a token]; of a trial that was stopped,
            what it was predicted to become.
        costs: All that was known before it was trained, by key of `Objective`.
        latency_ms: Predicted headline latency.
        winner: Whether it was chosen for final training.
        curve: Tokens seen and training loss along the trial; empty where none was kept.
        reason: Why it was stopped, or None.
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
        return count_parameters(self.spec).total


@dataclass(frozen=True)
class Model:
    """A row of the result table: the backbone or a winner, as far as it has come.

    Attributes:
        name: The arch's name.
        spec: Architecture.
        predicted: Intervals of stage 1 by point, such as `prefill_512`.
        trained: Result of `train.py`; None for the backbone, or when it did not run yet.
        exported: Result of `export.py`, or None when it did not run yet.
        aware: Result of `export.py` for the same architecture trained by a recipe with `qat`, or
            None where there is none.
        backbone_quality: Held-out quality of the backbone; None for winners.
    """

    name: str
    spec: ArchSpec
    predicted: dict[str, dict[str, float]]
    trained: TrainResult | None = None
    exported: ExportResult | None = None
    aware: ExportResult | None = None
    backbone_quality: dict[str, float] | None = None

    @property
    def parameters(self) -> int:
        return count_parameters(self.spec).total


@dataclass(frozen=True)
class Promotion:
    """The best trials trained longer (`stage=promote`).

    Attributes:
        tokens: Of the longer training.
        losses: Trial, and its held-out loss after the longer training.
        kendall_tau: Rank correlation of the short losses and the long ones; None for one trial.
        swapped: Pairs whose order turned.
        pairs: Of trials.
    """

    tokens: int
    losses: list[tuple[TrialPoint, float]]
    kendall_tau: float | None
    swapped: int
    pairs: int


@dataclass(frozen=True)
class ReportData:
    """One study with its winners.

    Attributes:
        study: Name.
        search: `frontier.json` as it is.
        trials: Completed candidates.
        stopped: Those that were ended early as hopeless.
        failed: Number of failed ones.
        models: The backbone, then the winners, fastest first.
        promotion: What longer training did to the order, or None where that was not asked.
        evaluations: Benchmarks of the models, as far as they were run.
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
        return self.models[0]

    @property
    def frontier(self) -> list[TrialPoint]:
        """The trials that no other beats, fastest first."""
        front = [trial for trial in self.trials if trial.name is not None]
        return sorted(front, key=lambda trial: trial.latency_ms)

    @property
    def cost_keys(self) -> list[str]:
        """Keys of the objectives other than loss; of the latency where loss was the only one."""
        keys = [key for key in self.search["objectives"] if key != "loss"]
        return keys or [f"{Point.parse(self.search['objective']).phase.value}_ms"]


def read(runs: Runs, study: str | None = None) -> ReportData:
    """Read a study.

    Args:
        runs: Where.
        study: Which; None takes the one that was written last.

    Raises:
        InputError: There is no finished search of that name, or a file is damaged.
    """
    pattern = f"{study or '*'}/frontier.json"
    found = sorted((runs.root / "studies").glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"{runs.root / 'studies' / pattern}: no finished search; run search.py")
    path: Path = found[-1]
    search = read_json(path, _Search.of, "run search.py again")
    trials = [trial for trial in search.trials if trial.reason is None]
    models = _models(runs, search)
    promotion = find_json(
        path.with_name("promoted.json"),
        lambda values: _promotion(values, trials),
        "run search.py stage=promote again",
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
    """`frontier.json`, taken apart.

    Attributes:
        values: As it is.
        trials: Completed candidates, and those that were stopped.
        models: The backbone, then the winners, as far as the search knows them.
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
    return TrialPoint(
        number=trial["number"],
        name=name,
        spec=ArchSpec.from_dict(trial["spec"]),
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
        # A result of an earlier study of the same name is of another architecture.
        if row["number"] in by_number
        and by_number[row["number"]].spec == ArchSpec.from_dict(row["spec"])
        and row["long_loss"] is not None
    ]
    if not losses:
        return None
    return Promotion(
        report["tokens"], losses, report["kendall_tau"], report["swapped"], report["pairs"]
    )


def _aware(runs: Runs, spec: ArchSpec) -> ExportResult | None:
    """The export of a model of `spec` whose last training saw the device's rounding."""
    for path in sorted((runs.root / "exports").glob("*/export.json")):
        trained = TrainResult.read(runs.model(path.parent.name))
        if trained is None or trained.spec != spec or not trained.settings["recipe"]["qat"]:
            continue
        exported = ExportResult.read(path.parent)
        if exported is not None and exported.spec == spec:
            return exported
    return None


def _models(runs: Runs, search: _Search) -> list[Model]:
    """The models of a search with what training and export found about them since."""
    backbone, *winners = search.models
    models = [dataclasses.replace(backbone, exported=ExportResult.read(runs.export(backbone.name)))]
    for model in winners:
        trained = TrainResult.read(runs.model(model.name))
        exported = ExportResult.read(runs.export(model.name))
        found = dataclasses.replace(
            model,
            # A result of an earlier search under the same name is of another architecture.
            trained=trained if trained and trained.spec == model.spec else None,
            exported=exported if exported and exported.spec == model.spec else None,
            aware=_aware(runs, model.spec),
        )
        models.append(found)
    return models
