"""Settings of the search (config group `search`)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from omegaconf import MISSING

from flash.arch import SpaceSettings
from flash.data.settings import DataSettings
from flash.device.settings import DeviceSettings
from flash.errors import (
    InputError,
    check_name,
    check_seed,
    require,
    shown,
    under,
    without_secrets,
)
from flash.evaluation.settings import SuiteSettings
from flash.latency.settings import LatencySettings
from flash.model.settings import BackboneSettings
from flash.search.objectives import Objective
from flash.tracking.settings import LoggerSettings
from flash.training.settings import RecipeSettings, TrainerSettings


class Sampler(Enum):
    """Ways to propose the next candidates."""

    flash = "flash"
    """Model-based: stage 2 of the paper (Sec. 3.5)."""
    random = "random"
    """Stratified random draws, the baseline that a model must beat."""
    nsga2 = "nsga2"
    """Optuna's NSGA-II; the start-up design is its first generation."""
    tpe = "tpe"
    """Optuna's multivariate TPE."""
    additive = "additive"
    """A score for each slot's kind, each depth and width, added up; the best sums are found
    exactly by dynamic programming (as in Puzzletron, arXiv:2411.19146)."""


class Across(Enum):
    """Ways to put the latencies on several devices together, as shares of the backbone's."""

    max = "max"
    """The largest share: a model is as slow as on the device that it suits least."""
    mean = "mean"
    """The mean share, weighted by `search.weights`."""


def check_storage(url: str) -> None:
    """Check the address of a database before it reaches a log or a result.

    Raises:
        InputError: It is not of PostgreSQL, or contains a password.
    """
    plain, query, _ = without_secrets(url).partition("?")
    shown_url = f"storage={plain}{query and '?...'}"
    try:
        parts = urlsplit(url, allow_fragments=False)
        known = parts.scheme.startswith("postgresql") and parts.port != 0
    except ValueError:  # a port that is no number
        parts, known = None, False
    if parts is None or not known:
        raise InputError(
            f"{shown_url}: expected postgresql://USER@HOST/DATABASE, or null for a SQLite file"
        )
    given = {key.lower() for key, _ in parse_qsl(parts.query, keep_blank_values=True)}
    if parts.password is not None or given & {"password", "sslpassword"}:
        raise InputError(
            f"{shown_url}: expected no password, since settings are logged; put it into "
            "~/.pgpass or PGPASSWORD"
        )


@dataclass(kw_only=True)
class SearchLimits:
    """The most that known figures of a candidate may be; null sets no limit."""

    prefill_ms: float | None = None
    """Predicted time to first token at the device's first prompt length [ms]."""
    decode_ms: float | None = None
    """Predicted time of a generated token at the device's first context [ms]."""
    size_mib: float | None = None
    """Packed weights [MiB]."""
    memory_mib: float | None = None
    """Packed weights, and all KV caches that the program allocates [MiB]."""

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            require(
                math.isfinite(value) and value > 0,
                name,
                value,
                "a positive number or null",
            )

    def given(self) -> dict[str, float]:
        """The limits that are set, by key of `Objective`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(kw_only=True)
class SearchSettings:
    """Config group `search`: stage 2, multi-objective search of held-out loss against costs."""

    study: str
    """Name of the study; the same name again resumes it, or joins it as a further worker."""
    sampler: Sampler = Sampler.flash
    """Way to propose candidates."""
    trials: int = 200
    """Candidates to evaluate, failed ones included."""
    batch: int = 8
    """Candidates that are proposed together."""
    startup_trials: int = 32
    """Stratified random candidates before the model takes over."""
    pool_size: int = 2048
    """Architectures that compete for the places in a batch."""
    objectives: list[str] | None = None
    """Objectives to minimize: quality or `task:NAME`, or both, and any of prefill, decode, memory,
    size. `task:NAME` is the share of wrong answers to a task of `suite`, `prefill@NAME` the time on
    one of several devices. null is quality and the latency that `latency.objective` names."""
    questions: int | None = None
    """Questions of each task that is an objective; null asks all."""
    limits: SearchLimits = field(default_factory=SearchLimits)
    """Only candidates that obey these are proposed. Latencies count by the upper ends of their 90 %
    intervals, so that a measured one is rarely above its limit."""
    device_limits: dict[str, float] = field(default_factory=dict)
    """Limits on one of several devices, such as `{prefill@board: 900}` [ms or MiB]; they take the
    place of those of `limits`, which hold on every device."""
    across: Across = Across.max
    """With several devices: how their latencies make one objective, `prefill` or `decode`."""
    weights: dict[str, float] = field(default_factory=dict)
    """With several devices and `across: mean`: weights by name of the device; others have 1."""
    baseline: dict[str, Any] = field(default_factory=dict)
    """Architecture that the reference point is measured from, as changes of the backbone's. It must
    be in the space, and is trained once, as a trial is. Empty is the backbone, as it is."""
    max_loss_increase: float = 0.6
    """Reference point: the worst acceptable loss, above the baseline's [nats a token]."""
    max_error_increase: float = 15.0
    """Reference point: the worst acceptable error in a task, above the baseline's [percentage
    points]."""
    max_cost_ratio: float = 1.0
    """Reference point: the worst acceptable other objective, as a multiple of the baseline's; a
    limit below that takes its place."""
    reference: dict[str, float] = field(default_factory=dict)
    """Reference point: worst acceptable values given outright, by objective; `{quality: 2.5,
    prefill: 4000}` is nats a token and ms. Others follow from the baseline."""
    winners: int = 3
    """Candidates of the frontier that go on to final training, at most."""
    storage: str | None = None
    """URL of the database that many machines share, postgresql://...; null is a SQLite file in the
    study's folder, for any number of workers on one machine (SQLite needs a local disk)."""
    heartbeat_s: int = 20
    """Seconds between signs of life of a worker; after six without one, or at once when its
    process is gone from the same machine, its trial goes back to the queue."""
    retries: int = 1
    """Further starts of a trial that crashed, before it counts as failed. Signals, a full disk and
    errors for lack of memory are no crashes; a process that the kernel kills is one."""
    stop_error: float = 0.05
    """Early stopping: the greatest chance at which a trial that would have reached the frontier
    may be ended before its training is over; 0 ends none (flash/search/pruner.py)."""
    from_study: str | None = None
    """Name of a study whose trials are judged anew by the present objectives, limits and device.
    No trial is trained; backbone, data, recipe and seed must be those of that study."""
    promote: int = 4
    """`stage=promote`: how many trials of the frontier are trained longer."""
    promote_tokens: int = 262144
    """`stage=promote`: training tokens of each."""

    def __post_init__(self) -> None:
        for key in ("study", "from_study"):
            check_name(key, getattr(self, key))
        require(
            self.from_study is None or self.from_study != self.study,
            "from_study",
            self.from_study,
            "another name than study, which the new frontier gets",
        )
        for name in (
            "trials",
            "batch",
            "startup_trials",
            "pool_size",
            "winners",
            "heartbeat_s",
            "promote",
            "promote_tokens",
        ):
            value = getattr(self, name)
            require(value > 0, name, value, "a positive integer")
        if self.storage is not None:
            check_storage(self.storage)
        require(self.retries >= 0, "retries", self.retries, "0 or more")
        require(0 <= self.stop_error < 1, "stop_error", self.stop_error, "from 0 to below 1")
        require(
            self.pool_size >= self.batch,
            "pool_size",
            self.pool_size,
            f"at least batch={self.batch}",
        )
        for name in ("max_loss_increase", "max_error_increase", "max_cost_ratio"):
            value = getattr(self, name)
            require(value > 0, name, value, "a positive number")
        for group in ("weights", "device_limits", "reference"):
            for name, value in getattr(self, group).items():
                if group != "weights":
                    with under(f"{group}.{name}={value}", ": "):
                        Objective.parse(name)
                good = math.isfinite(value) and value > 0
                require(good, f"{group}.{name}", value, "a positive number")
        self._check_objectives()
        require(
            self.questions is None or self.questions > 0,
            "questions",
            self.questions,
            "a positive integer or null",
        )

    def _check_objectives(self) -> None:
        """Check that there is an objective to learn, each is there once, and the sampler fits."""
        if self.objectives is not None:
            names = self.objectives
            with under(f"objectives={shown(names)}", ": "):
                learned = [Objective.parse(name).learned for name in names]
            if not any(learned) or len(set(names)) < len(names):
                raise InputError(
                    f"objectives={shown(names)}: expected quality or task:NAME and any others, "
                    "each once; what depends on no training needs no search"
                )
        require(
            self.sampler is not Sampler.additive or not self.tasks,
            "sampler",
            self.sampler.value,
            "another one for objectives that are tasks, since it models the loss",
        )

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that are objectives."""
        found = [Objective.parse(name).task for name in self.objectives or []]
        return [task for task in found if task is not None]

    def order(self, latency: Objective) -> tuple[Objective, ...]:
        """The objectives: quality, tasks, then what needs no training.

        Args:
            latency: The one that stage 1 was asked for.
        """
        named = [Objective.parse(name) for name in self.objectives or []]
        named = named or [Objective.quality, latency]
        return tuple(sorted(named, key=lambda each: (each != Objective.quality, not each.learned)))

    def worst(
        self,
        objectives: tuple[Objective, ...],
        baseline: Mapping[str, float],
        limits: Mapping[str, float],
    ) -> tuple[float, ...]:
        """The reference point.

        Args:
            objectives: Objectives in its order.
            baseline: Loss, errors in tasks and costs of the baseline, by key of `Objective`.
            limits: Limits of costs, which are the worst acceptable if they are lower.
        """
        return tuple(
            self.reference.get(each.name) or self._derived(each, baseline, limits)
            for each in objectives
        )

    def _derived(
        self, each: Objective, baseline: Mapping[str, float], limits: Mapping[str, float]
    ) -> float:
        """The worst acceptable value of an objective for which none is given."""
        value = baseline[each.key]
        if each == Objective.quality:
            return value + self.max_loss_increase
        if each.learned:
            return min(value + self.max_error_increase, 100.0)
        return min(value * self.max_cost_ratio, limits.get(each.key, math.inf))


class SearchStage(Enum):
    """Part of the method that `flash search` does."""

    latency = "latency"
    """Stage 1 only: measure, fit, report how good the predictor is. Needs no weights, no data."""
    search = "search"
    """Both stages."""
    promote = "promote"
    """After a search: train the best trials longer, and see whether their order holds."""


@dataclass(kw_only=True)
class SearchJobSettings:
    """Settings of `flash search`."""

    stage: SearchStage = SearchStage.search
    """Part of the method to do."""

    backbone: BackboneSettings = MISSING
    """Model that candidates are cut out of."""
    space: SpaceSettings = MISSING
    """Architectures that are candidates."""
    latency: LatencySettings = MISSING
    """Prediction of latencies (stage 1)."""
    device: DeviceSettings = MISSING
    """Device that candidates are designed for."""
    devices: dict[str, DeviceSettings] = field(default_factory=dict)
    """Further devices that the same candidates are designed for, by their option:
    `device=[A,B,C]` is short for `device=A +device@devices.B=B +device@devices.C=C`."""
    data: DataSettings = MISSING
    """Text that trials are trained and judged on."""
    recipe: RecipeSettings = MISSING
    """Short training of a trial."""
    trainer: TrainerSettings = MISSING
    """Hardware and intervals of the training."""
    logger: LoggerSettings = MISSING
    """Destination of the figures."""
    search: SearchSettings = MISSING
    """Multi-objective search (stage 2)."""
    suite: SuiteSettings | None = None
    """Suite that has the tasks among `search.objectives`; null if there are none."""
    worker: int = 0
    """Number of this worker among those on one study: with `hydra/launcher=submitit_slurm`,
    `-m worker='range(0,16)'` starts sixteen at once.
    Workers are equal; only the run's name in the logs differs."""
    seed: int = 0
    """Seed of proposals, data order and training."""
    runs: str = "runs"
    """Folder for everything that runs produce."""

    def __post_init__(self) -> None:
        require(self.worker >= 0, "worker", self.worker, "0 or more")
        check_seed(self.seed)
        if isinstance(self.device, DeviceSettings) and isinstance(self.search, SearchSettings):
            self._check_devices()
        if isinstance(self.search, SearchSettings):
            self._check_tasks()
        if isinstance(self.recipe, RecipeSettings) and not self.recipe.inherit:
            raise InputError(
                f"recipe={self.recipe.name}: recipe.inherit=false: expected true for the trials of "
                "a search, which inherit the backbone's weights; choose recipe=trial"
            )

    @property
    def all_devices(self) -> list[DeviceSettings]:
        """Settings of all devices."""
        return [self.device, *self.devices.values()]

    def _check_tasks(self) -> None:
        """Check that the tasks among the objectives are in the suite.

        Raises:
            InputError: One is not, or its figure is no share.
        """
        known = {task.name: task for task in self.suite.chosen} if self.suite is not None else {}
        shown_names = shown(self.search.objectives or [])
        for name in self.search.tasks:
            where = f"search.objectives={shown_names}: task {name}"
            if self.suite is None:
                raise InputError(f"{where}: expected suite=NAME, a suite that has it")
            if name not in known:
                raise InputError(
                    f"{where}: expected one of suite={self.suite.name}: {', '.join(known)}"
                )
            if not known[name].percent:
                raise InputError(
                    f"{where}: expected one whose metric is a share of right answers (percent: "
                    f"true), not {known[name].metric}"
                )

    def _check_devices(self) -> None:
        """Check that devices have names of their own, and that settings name no other.

        Raises:
            InputError: They do not, or devices have different workloads.
        """
        names = [device.name for device in self.all_devices]
        for key, device in self.devices.items():
            require(
                names.count(device.name) == 1,
                f"devices.{key}.name",
                device.name,
                "another name than that of each other device",
            )
            for part in ("prompts", "contexts"):
                own, first = (getattr(d.workload, part) for d in (device, self.device))
                require(
                    own == first,
                    f"devices.{key}.workload.{part}",
                    own,
                    f"{first}, as device.workload.{part}, since latencies are compared",
                )
        for name in self.search.weights:
            known = len(names) > 1 and name in names
            require(known, "search.weights", name, f"one of several devices: {', '.join(names)}")
        for setting in ("objectives", "reference", "device_limits"):
            for name in getattr(self.search, setting) or []:
                device = Objective.parse(name).device
                known = len(names) > 1 and device in names
                require(
                    known or (device is None and setting != "device_limits"),
                    f"search.{setting}",
                    name,
                    f"{name.partition('@')[0]}@ and one of several devices: {', '.join(names)}",
                )
