"""Benchmark suites: their settings, and what was found, as files and as a table."""

import dataclasses
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from flash.arch import ArchSpec
from flash.device.settings import DeviceKind, DeviceSettings
from flash.errors import InputError, require
from flash.files import write_text
from flash.model.backbone import BackboneSettings
from flash.training.loggers import LoggerSettings
from flash.training.settings import TrainerSettings


class ModelFormat(Enum):
    """What of a model is evaluated."""

    decoder = "decoder"
    """The float weights, in PyTorch."""
    program = "program"
    """`model.pte` of export.py, in its runtime on the device."""


@dataclass(kw_only=True)
class TaskSettings:
    """One task of a suite."""

    name: str
    """Its name in lm-evaluation-harness."""
    title: str
    """Its name in tables."""
    metric: str
    """The harness's key of the figure to show: `metric,filter`, as in `acc_norm,none`."""
    fewshot: int | None = None
    """Solved examples in front of each question; null takes the task's own number."""
    files: dict[str, str] = field(default_factory=dict)
    """Data files of its splits, patterns allowed, in place of those that the task names."""
    percent: bool = True
    """Whether the figure is a share, to be shown in percent."""
    paper: dict[str, float] = field(default_factory=dict)
    """What the paper has for its own models, by their name."""

    def __post_init__(self) -> None:
        require(
            self.fewshot is None or self.fewshot >= 0,
            f"suite.tasks: fewshot of {self.name}",
            self.fewshot,
            "0 or more, or null",
        )


@dataclass(kw_only=True)
class SuiteSettings:
    """Config group `suite`."""

    name: str
    tasks: list[TaskSettings] = field(default_factory=list)
    apply_chat_template: bool = False
    """Ask as a user asks an assistant, with the tokenizer's chat template."""
    leave_out: list[str] = field(default_factory=list)
    """Names of tasks not to run."""
    include: str | None = None
    """Folder with task files of your own, in the harness's YAML."""
    data: str = "datasets"
    """Folder for data that no hub has; tasks refer to it in their `files`."""
    seed: int = 1234
    """Decides which examples are shown; the default is the harness's."""
    allow_code_execution: bool = False
    """Run tasks that execute, on this machine, the code that the model writes."""

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        require(bool(names), "suite.tasks", names, "at least one task")
        require(len(set(names)) == len(names), "suite.tasks", names, "each task once")
        unknown = set(self.leave_out) - set(names)
        require(not unknown, "suite.leave_out", self.leave_out, f"some of {names}")
        require(bool(self.chosen), "suite.leave_out", self.leave_out, "at least one task left")
        if self.include is not None:
            require(Path(self.include).is_dir(), "suite.include", self.include, "a folder")

    @property
    def chosen(self) -> list[TaskSettings]:
        """The tasks to run."""
        return [task for task in self.tasks if task.name not in self.leave_out]


@dataclass(kw_only=True)
class EvaluateSettings:
    """Root of `python -m flash.evaluation`."""

    backbone: BackboneSettings = MISSING
    device: DeviceSettings = MISSING
    """Where `form: program` runs; `form: decoder` runs on `trainer.accelerator`."""
    suite: SuiteSettings = MISSING
    trainer: TrainerSettings = MISSING
    logger: LoggerSettings = MISSING
    form: ModelFormat = ModelFormat.decoder
    arch: dict[str, Any] = field(default_factory=dict)
    """What to evaluate, as for `export.py`; nothing is the backbone itself."""
    name: str | None = None
    """Name of the model in `runs`; null takes the arch's."""
    model: str | None = None
    """Folder of trained weights; null takes what `train.py` wrote under the same name."""
    limit: int | None = None
    """Questions of each task, for a first look; null takes all."""
    batch_size: int = 8
    """Texts at a time with `form: decoder`; changes the speed, not the result."""
    runs: str = "runs"
    """Folder for everything that runs produce."""

    def __post_init__(self) -> None:
        expected = "a positive integer"
        require(self.batch_size > 0, "batch_size", self.batch_size, expected)
        require(self.limit is None or self.limit > 0, "limit", self.limit, f"{expected} or null")
        if isinstance(self.device, DeviceSettings) and self.form is ModelFormat.program:
            require(
                self.device.kind is not DeviceKind.android,
                "device",
                self.device.name,
                "one whose runtime gives logits, for form=program: a phone's llama_main only "
                "prints text; the same file runs with device=host",
            )


@dataclass(frozen=True)
class TaskResult:
    """One finished task.

    Attributes:
        name: The harness's name of it.
        shots: Examples shown.
        samples: Questions asked.
        metrics: All that the harness computed, by its keys.
        seconds: How long it took.
        key: Hash of all that decides the result.
    """

    name: str
    shots: int
    samples: int
    metrics: dict[str, float]
    seconds: float
    key: str

    def write(self, folder: Path) -> None:
        """Store as `NAME.json`, atomically."""
        values = dataclasses.asdict(self)
        write_text(folder / f"{self.name}.json", json.dumps(values, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path, name: str) -> "TaskResult | None":
        """The result in `folder`, or None where there is none.

        Raises:
            InputError: The file is damaged.
        """
        path = folder / f"{name}.json"
        return cls(**_read(path)) if path.is_file() else None


@dataclass(frozen=True)
class Figure:
    """A task's line in the table.

    Attributes:
        task: The harness's name of it.
        title: Its name in tables.
        metric: The harness's key.
        shots: Examples shown.
        samples: Questions asked.
        value: The figure, in percent if it is a share.
        stderr: Its standard error, or None where the harness has none.
        paper: The paper's figures, by model.
    """

    task: str
    title: str
    metric: str
    shots: int
    samples: int
    value: float
    stderr: float | None
    paper: dict[str, float]

    @classmethod
    def of(cls, task: TaskSettings, result: TaskResult) -> "Figure":
        """What the settings choose of a result.

        Raises:
            InputError: The task has no such metric.
        """
        if task.metric not in result.metrics:
            known = ", ".join(key for key in result.metrics if "_stderr" not in key)
            raise InputError(
                f"suite.tasks: metric of {task.name}={task.metric}: expected one of {known}; the "
                "result is kept, so only the table is made again"
            )
        scale = 100 if task.percent else 1
        error = result.metrics.get(task.metric.replace(",", "_stderr,", 1))
        return cls(
            task=task.name,
            title=task.title,
            metric=task.metric,
            shots=result.shots,
            samples=result.samples,
            value=scale * result.metrics[task.metric],
            stderr=None if error is None else scale * error,
            paper=dict(task.paper),
        )


@dataclass(frozen=True)
class SuiteResult:
    """A suite's table for one model in one form.

    Attributes:
        name: Name of the model.
        spec: Its architecture.
        suite: Name of the suite.
        form: Which form of the model.
        limit: Questions of each task at most, or None.
        figures: A line a task.
        average: Mean of the figures, if all are shares and there are several.
    """

    name: str
    spec: ArchSpec
    suite: str
    form: str
    limit: int | None
    figures: list[Figure]
    average: float | None

    @property
    def stem(self) -> str:
        """Name of its file, and of the folder with its tasks."""
        return f"{self.suite}.{self.form}"

    def write(self, folder: Path) -> None:
        """Store as `SUITE.FORM.json`, atomically."""
        values = {**dataclasses.asdict(self), "spec": self.spec.to_dict()}
        write_text(folder / f"{self.stem}.json", json.dumps(values, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "SuiteResult":
        """The result in a file.

        Raises:
            InputError: It is damaged.
        """
        values = _read(path)
        try:
            nested = {
                "spec": ArchSpec.from_dict(values["spec"]),
                "figures": [Figure(**row) for row in values["figures"]],
            }
            return cls(**{**values, **nested})
        except (KeyError, TypeError, InputError) as error:
            raise InputError(f"{path}: damaged ({error}); evaluate again") from error


def table(result: SuiteResult) -> list[list[str]]:
    """The table as rows of text, the first one its head; unknown cells are dashes."""
    models = list(dict.fromkeys(model for row in result.figures for model in row.paper))
    lines = [["task", "shots", "n", "metric", "value", "+-", *models]]
    for row in result.figures:
        paper = [_number(row.paper.get(model)) for model in models]
        counts = [row.title, str(row.shots), str(row.samples), row.metric.removesuffix(",none")]
        lines.append([*counts, _number(row.value), _number(row.stderr), *paper])
    if result.average is not None:
        means = [
            _number(sum(row.paper[model] for row in result.figures) / len(result.figures))
            if all(model in row.paper for row in result.figures)
            else "-"
            for model in models
        ]
        lines.append(["average", "", "", "", _number(result.average), "", *means])
    return lines


def as_text(result: SuiteResult) -> str:
    """The table for terminals."""
    lines = table(result)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [cell.ljust(width) if i in {0, 3} else cell.rjust(width) for i, (cell, width) in cells]
        for cells in (enumerate(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join("  " + "  ".join(line).rstrip() for line in padded)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); delete it to evaluate again") from error
