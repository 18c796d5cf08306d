"""Content of `frontier.json`, the result of a search, as reports and exports read it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec
from flash.commands import command
from flash.device.workload import Point
from flash.errors import require
from flash.records import read_json
from flash.search.objectives import Objective, Quantity
from flash.search.quality import TaskError


@dataclass(frozen=True)
class StoredPrediction:
    """Predicted latency at one point.

    Attributes:
        mean_ms: Mean.
        low_ms: Lower end of the 90 % interval.
        high_ms: Upper end of it.
    """

    mean_ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class StoredFacts:
    """Facts of a trial besides its loss and its costs.

    Attributes:
        estimate: Predicted final loss of a trial that was stopped early.
        reason: Reason of a failure, or of the early stop.
        seconds: Time of the evaluation [s].
        curve: Tokens and training loss of equal parts of the training.
    """

    estimate: float | None = None
    reason: str | None = None
    seconds: float | None = None
    curve: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class StoredTrial:
    """One trial.

    Attributes:
        number: Number in the study.
        state: `complete`, `pruned` (stopped early), or any other state of Optuna in lower case.
        loss: Held-out loss of a complete trial [nats a token].
        latency_ms: Headline latency.
        costs: Costs by key of `Objective`.
        spec: Architecture.
        extra: Further facts.
        errors: Errors in the tasks that are objectives, by key.
    """

    number: int
    state: str
    loss: float | None
    latency_ms: float
    costs: dict[str, float]
    spec: ArchSpec
    extra: StoredFacts
    errors: dict[str, TaskError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state == "complete":
            require(self.loss is not None, "loss", self.loss, "a number for a complete trial")
        if self.state == "pruned":
            estimate, reason = self.extra.estimate, self.extra.reason
            known = estimate is not None and reason is not None
            require(known, "extra", {}, "estimate and reason for a trial that was stopped early")

    @property
    def rated(self) -> bool:
        """True if the trial has a loss, or an estimate of it."""
        return self.state in {"complete", "pruned"}


@dataclass(frozen=True)
class StoredBackbone:
    """The backbone.

    Attributes:
        name: Its name.
        spec: Architecture.
        quality: Figures on held-out text, `loss` and `bits_per_byte`.
        costs: Costs by key of `Objective`.
        predicted: Predicted latencies by name of the point.
        errors: Errors in the tasks that are objectives, by key.
    """

    name: str
    spec: ArchSpec
    quality: dict[str, float]
    costs: dict[str, float]
    predicted: dict[str, StoredPrediction]
    errors: dict[str, TaskError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("loss", "bits_per_byte"):
            require(key in self.quality, f"quality.{key}", None, "a number")


@dataclass(frozen=True)
class StoredSpace:
    """The search space: its name, and its number of architectures."""

    name: str
    count: int


@dataclass(frozen=True)
class StoredWorkload:
    """The workload: lengths of prompts and contexts, the headline ones first [tokens]."""

    prompts: list[int]
    contexts: list[int]

    def __post_init__(self) -> None:
        for key in ("prompts", "contexts"):
            require(bool(getattr(self, key)), key, [], "one length or more")


@dataclass(frozen=True)
class _StoredRecipe:
    tokens: int


@dataclass(frozen=True)
class _StoredSampling:
    startup_trials: int


@dataclass(frozen=True)
class StoredSettings:
    """Settings of the search that figures show."""

    recipe: _StoredRecipe
    search: _StoredSampling


@dataclass(frozen=True)
class StoredDevice:
    """One of several devices.

    Attributes:
        device: Identity.
        lowering: Values of the lowering.
        predicted: Predicted latencies of each trial on the frontier, by number and point.
        backbone_predicted: Those of the backbone, by point.
        latency_scores: Cross-validation scores of the latency predictors.
        latency_points: Measured latencies of the calibration models by name of the point, the
            backbone last [ms].
    """

    device: dict[str, Any]
    lowering: dict[str, Any]
    predicted: dict[str, dict[str, StoredPrediction]]
    backbone_predicted: dict[str, StoredPrediction]
    latency_scores: dict[str, float]
    latency_points: dict[str, list[float]]

    def __post_init__(self) -> None:
        _check_scores(self.latency_scores)


@dataclass(frozen=True)
class StoredStudy:
    """All trials of a search and what it chose; see `flash.search.frontier.write_report`.

    Attributes:
        study: Name of the study.
        objective: Name of the headline point.
        objectives: Keys of the objectives.
        reference: Reference point by key.
        hypervolume: Hypervolume after each finished trial.
        frontier: Numbers of the trials on the frontier, fastest first.
        winners: Numbers of the winners.
        names: Architecture name of each trial on the frontier, by number.
        predicted: Predicted latencies of each trial on the frontier, by number and point.
        trials: All trials.
        backbone: The backbone.
        latency_scores: Cross-validation scores of the latency predictors.
        latency_points: Measured latencies of the calibration models by name of the point, the
            backbone last [ms].
        latency_fitted: Latencies that the predictor has for them [ms].
        space: The search space.
        device: Identity of the device.
        workload: Workload of the latencies.
        settings: Settings of the search.
        lowering: Values of the lowering; empty in files of older versions.
        limits: Limits by key of `Costs`.
        devices: All devices of a search for several, by name, the first one first.
        provenance: Command, date, commit, versions and machine; empty in files of older versions.
    """

    study: str
    objective: str
    objectives: list[str]
    reference: dict[str, float | None]
    hypervolume: list[float]
    frontier: list[int]
    winners: list[int]
    names: dict[str, str]
    predicted: dict[str, dict[str, StoredPrediction]]
    trials: list[StoredTrial]
    backbone: StoredBackbone
    latency_scores: dict[str, float]
    latency_points: dict[str, list[float]]
    latency_fitted: dict[str, list[float]]
    space: StoredSpace
    device: dict[str, Any]
    workload: StoredWorkload
    settings: StoredSettings
    lowering: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    devices: dict[str, StoredDevice] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Point.parse(self.objective)
        require(bool(self.objectives), "objectives", [], "one objective or more")
        for key in self.objectives:
            require(_is_objective(key), "objectives", key, f"one of {_KEYS}")
            require(key in self.reference, f"reference.{key}", None, "a number")
            require(self.reference[key] is not None, f"reference.{key}", None, "a number")
            if Objective.of_key(key).task is not None:
                require(key in self.backbone.errors, f"backbone.errors.{key}", None, "an error")
                for trial in self.trials:
                    known = key in trial.errors or not trial.rated
                    require(known, f"trials.errors.{key}", None, "an error")
        for place, errors in (
            ("backbone", self.backbone.errors),
            *(("trials", trial.errors) for trial in self.trials),
        ):
            for key in errors:
                task = _is_objective(key) and Objective.of_key(key).task is not None
                require(task, f"{place}.errors", key, f"{Quantity.task.value}:NAME")
        numbers = {str(trial.number) for trial in self.trials}
        for number in self.names:
            require(number in numbers, "names", number, "the number of a trial")
        for key in ("frontier", "winners"):
            for number in getattr(self, key):
                require(str(number) in numbers, key, number, "the number of a trial")
                require(str(number) in self.names, f"names.{number}", None, "a name")
                require(str(number) in self.predicted, f"predicted.{number}", None, "latencies")
        for key in ("latency_points", "latency_fitted"):
            every = getattr(self, key)
            require(self.objective in every, f"{key}.{self.objective}", None, "latencies")
        for point, every in self.latency_points.items():
            require(bool(every), f"latency_points.{point}", [], "one latency or more")
        _check_scores(self.latency_scores)
        key = f"{Point.parse(self.objective).phase.value}_ms"
        for device in self.devices:
            for trial in self.trials:
                there = f"{key}@{device}" in trial.costs
                require(there, f"trials.costs.{key}@{device}", None, "a latency")
            there = f"{key}@{device}" in self.backbone.costs
            require(there, f"backbone.costs.{key}@{device}", None, "a latency")

    @property
    def device_name(self) -> str:
        """Name of the device, its kind if it has none."""
        return str(self.device.get("device") or next(iter(self.device.values()), ""))


def _check_scores(scores: dict[str, float]) -> None:
    for key in scores:
        require(len(key.split("/")) == 4, "latency_scores", key, "PREFIX/POINT/PREDICTOR/SCORE")


_KEYS = ", ".join(
    f"{each.value}:NAME" if each is Quantity.task else each.value for each in Quantity
)


def _is_objective(key: str) -> bool:
    try:
        return bool(Objective.of_key(key))
    except ValueError:
        return False


def read_study(path: Path) -> StoredStudy:
    """Read a `frontier.json`.

    Raises:
        InputError: The file is damaged; names the place in it.
    """
    return read_json(path, StoredStudy, f"run {command('search')} again")
