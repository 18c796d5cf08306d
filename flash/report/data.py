"""Data of the report: studies, their trials, and the models made from them."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from flash.arch import ArchSpec, count_parameters
from flash.device.workload import Point
from flash.evaluation.suites import SuiteResult
from flash.export.result import ExportResult
from flash.search.objectives import Objective
from flash.search.quality import TaskError
from flash.search.stored import StoredStudy
from flash.training.result import TrainResult


@dataclass(frozen=True)
class Model:
    """Row of the result table: a backbone, a winner or another model, with the results so far.

    Attributes:
        name: Name of the model.
        spec: Architecture.
        predicted: Predicted latencies with intervals by point, such as `prefill_512`; empty if no
            search predicted them.
        study: Name of the study that found or searched it; None for other models.
        device: Name of the device of the study; None for other models.
        title: Name in tables; it differs from `name` if several devices have a model of the name.
        trained: Result of `train.py`; None for a backbone or before it ran.
        exported: Result of `export.py`; None before it ran.
        qat_exported: Result of `export.py` for the same architecture trained with a recipe that has
            `qat`; None if there is none.
        backbone_quality: Held-out quality of the backbone; None for all others.
        elsewhere: Results of `export.py` on the further devices of the study, by device.
        artifacts: Files and folders of the model that exist.
    """

    name: str
    spec: ArchSpec
    predicted: dict[str, dict[str, float]] = field(default_factory=dict)
    study: str | None = None
    device: str | None = None
    title: str = ""
    trained: TrainResult | None = None
    exported: ExportResult | None = None
    qat_exported: ExportResult | None = None
    backbone_quality: dict[str, float] | None = None
    elsewhere: dict[str, ExportResult] = field(default_factory=dict)
    artifacts: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return count_parameters(self.spec).total

    @property
    def exports(self) -> list[ExportResult]:
        """Exports on all devices."""
        return [*([] if self.exported is None else [self.exported]), *self.elsewhere.values()]


def is_qat(trained: TrainResult | None) -> bool:
    """Return True for a training with quantization awareness."""
    return trained is not None and bool(trained.settings.get("recipe", {}).get("qat"))


@dataclass(frozen=True)
class TrialPoint:
    """Trial with a loss or, if it was stopped early, a predicted loss.

    Attributes:
        number: Trial number in the study.
        name: Name of the architecture.
        spec: Architecture.
        loss: Held-out loss after the short training [nats a token]; predicted for a stopped trial.
        costs: Known objectives by key of `Objective`.
        errors: Errors in the tasks that are objectives, by key of `Objective`.
        latency_ms: Predicted headline latency [ms].
        frontier: True if the trial is on the frontier.
        winner: True if the trial was chosen for final training.
        curve: Pairs (tokens seen, training loss) along the trial; empty if not recorded.
        reason: Reason for stopping the trial early, or None.
        seconds: Duration of the evaluation [s], or None.
        model: Model made from the trial, with its results; None if there is none.
    """

    number: int
    name: str
    spec: ArchSpec
    loss: float
    costs: dict[str, float]
    errors: dict[str, TaskError]
    latency_ms: float
    frontier: bool
    winner: bool
    curve: list[tuple[float, float]]
    reason: str | None = None
    seconds: float | None = None
    model: Model | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return count_parameters(self.spec).total

    @property
    def values(self) -> dict[str, float]:
        """Loss, errors in tasks and costs, by key of `Objective`."""
        errors = {key: error.pct for key, error in self.errors.items()}
        return {**self.costs, **errors, Objective.quality.key: self.loss}

    @property
    def state(self) -> str:
        """State for tables: the most special one of those that hold."""
        if self.reason is not None:
            return "stopped"
        return "winner" if self.winner else "frontier" if self.frontier else "complete"


@dataclass(frozen=True)
class UnratedTrial:
    """Trial without a loss.

    Attributes:
        number: Trial number in the study.
        name: Name of the architecture.
        spec: Architecture.
        costs: Known objectives by key of `Objective`.
        state: `failed`, `running` or `waiting`.
        reason: Reason of the failure, or None.
        seconds: Duration of the evaluation [s], or None.
    """

    number: int
    name: str
    spec: ArchSpec
    costs: dict[str, float]
    state: str
    reason: str | None
    seconds: float | None

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
class StudyData:
    """One study and the models made from it.

    Attributes:
        name: Name of the study.
        search: Content of `frontier.json`.
        trials: Complete trials.
        stopped: Trials that were stopped early.
        unrated: Trials without a loss, such as failed ones.
        models: Backbone, then the winners and other trials with results, fastest first.
        promotion: Comparison with longer training; None if `stage=promote` did not run.
    """

    name: str
    search: StoredStudy
    trials: list[TrialPoint]
    stopped: list[TrialPoint]
    unrated: list[UnratedTrial]
    models: list[Model]
    promotion: Promotion | None

    @property
    def backbone(self) -> Model:
        """Row of the backbone, the first of `models`."""
        return self.models[0]

    @property
    def frontier(self) -> list[TrialPoint]:
        """Trials on the frontier, fastest first."""
        front = [trial for trial in self.trials if trial.frontier]
        return sorted(front, key=lambda trial: trial.latency_ms)

    @property
    def winners(self) -> list[TrialPoint]:
        """Trials that were chosen for final training, fastest first."""
        return [trial for trial in self.frontier if trial.winner]

    @property
    def failed(self) -> int:
        """Number of failed trials."""
        return sum(trial.state == "failed" for trial in self.unrated)

    @property
    def quality_key(self) -> str:
        """Key of the first objective, which training decides: the loss or the error in a task."""
        return self.search.objectives[0]

    @property
    def cost_keys(self) -> list[str]:
        """Keys of the other objectives, or of the headline latency without any."""
        keys = self.search.objectives[1:]
        return keys or [f"{Point.parse(self.search.objective).phase.value}_ms"]

    @property
    def backbone_values(self) -> dict[str, float]:
        """Loss, errors in tasks and costs of the backbone, by key of `Objective`."""
        backbone = self.search.backbone
        errors = {key: error.pct for key, error in backbone.errors.items()}
        return {**backbone.costs, **errors, Objective.quality.key: backbone.quality["loss"]}

    @property
    def device(self) -> str:
        """Description of the device in one line."""
        several = [device.device for device in self.search.devices.values()]
        return "; ".join(
            ", ".join(f"{key} {value}" for key, value in device.items() if value)
            for device in several or [self.search.device]
        )

    @property
    def device_names(self) -> str:
        """Names of all devices, joined."""
        return " + ".join(self.search.devices or [self.search.device_name])

    @property
    def device_name(self) -> str:
        """Name of the first device, its kind if it has none."""
        return self.search.device_name

    def with_models(self, models: list[Model]) -> "StudyData":
        """Return a copy with other models, which the trials of the same names refer to."""
        by_name = {model.name: model for model in models[1:]}

        def joined(trials: list[TrialPoint]) -> list[TrialPoint]:
            return [replace(trial, model=by_name.get(trial.name)) for trial in trials]

        return replace(
            self, models=models, trials=joined(self.trials), stopped=joined(self.stopped)
        )


@dataclass(frozen=True)
class ReportData:
    """Content of the report.

    Attributes:
        root: Folder `runs`.
        studies: Studies in the order in which they were named; none if no search has finished.
        others: Models of no study shown, such as trained architectures of one's own.
        evaluations: Benchmark results of the models.
        faults: Sentences on files that are missing or damaged.
        links: URL of the W&B run of a result, by the folder of the result.
    """

    root: Path
    studies: list[StudyData]
    others: list[Model]
    evaluations: list[SuiteResult]
    faults: list[str]
    links: dict[Path, str] = field(default_factory=dict)

    @property
    def models(self) -> list[Model]:
        """All models, those of studies first; a backbone is repeated only for another device."""
        every = [model for study in self.studies for model in study.models] + self.others
        found: dict[tuple[str, ArchSpec, str | None], Model] = {}
        for model in every:
            found.setdefault((model.name, model.spec, model.device), model)
        names = Counter(model.name for model in found.values())
        return [
            replace(model, title=f"{model.name} on {model.device}")
            if names[model.name] > 1 and model.device
            else model
            for model in found.values()
        ]
