"""Config group `suite` and the root of `flash evaluate`."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from flash.device.settings import DeviceKind, DeviceSettings
from flash.errors import check_name, require, shown
from flash.model.settings import BackboneSettings
from flash.tracking.settings import LoggerSettings
from flash.training.settings import TrainerSettings


class ModelFormat(Enum):
    """Representation of a model that is evaluated."""

    decoder = "decoder"
    """The float weights, in PyTorch."""
    program = "program"
    """`model.pte` of `flash export`, in its runtime on the device."""


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
    """Data files of its splits, patterns allowed, in place of the task's files or data set."""
    percent: bool = True
    """True for a figure that is a share, to be shown in percent."""
    paper: dict[str, float] = field(default_factory=dict)
    """Figures of the paper's own models, by their name."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        require(
            self.fewshot is None or self.fewshot >= 0,
            "fewshot",
            self.fewshot,
            "0 or more, or null",
        )


@dataclass(kw_only=True)
class SuiteSettings:
    """Config group `suite`."""

    name: str
    """Name that results are filed under."""
    tasks: list[TaskSettings] = field(default_factory=list)
    """Tasks in the order of the table."""
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
        check_name("name", self.name)
        names = [task.name for task in self.tasks]
        require(bool(names), "tasks", names, "at least one task")
        require(len(set(names)) == len(names), "tasks", names, "each task once")
        unknown = set(self.leave_out) - set(names)
        require(not unknown, "leave_out", self.leave_out, f"some of {shown(names)}")
        require(bool(self.chosen), "leave_out", self.leave_out, "at least one task left")

    @property
    def chosen(self) -> list[TaskSettings]:
        """The tasks to run."""
        return [task for task in self.tasks if task.name not in self.leave_out]


@dataclass(kw_only=True)
class EvaluateSettings:
    """Settings of `flash evaluate`."""

    backbone: BackboneSettings = MISSING
    """Backbone that the model was cut out of."""
    device: DeviceSettings = MISSING
    """Device that runs `format: program`; `format: decoder` runs on `trainer.accelerator`."""
    suite: SuiteSettings = MISSING
    """Benchmarks to run."""
    trainer: TrainerSettings = MISSING
    """Accelerator and precision of `format: decoder`."""
    logger: LoggerSettings = MISSING
    """Destination of the figures."""
    format: ModelFormat = ModelFormat.decoder
    """Format of the model that answers."""
    arch: dict[str, Any] = field(default_factory=dict)
    """Architecture to evaluate, as for `flash train`; empty is the backbone itself."""
    name: str | None = None
    """Name of the result; null makes one of the arch, model or backbone, and of what is not the
    default. With `format: program` also the name of the export, if several have the weights."""
    model: str | None = None
    """Trained weights: the name of a training, or a folder. Null takes the backbone itself where
    the architecture is the backbone's, else the training of the same name or of this
    architecture."""
    limit: int | None = None
    """Questions of each task, for a first look; null takes all."""
    batch_size: int = 8
    """Texts at a time with `format: decoder`; changes the speed, not the result."""
    runs: str = "runs"
    """Folder for everything that runs produce."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        expected = "a positive integer"
        require(self.batch_size > 0, "batch_size", self.batch_size, expected)
        require(self.limit is None or self.limit > 0, "limit", self.limit, f"{expected} or null")
        if isinstance(self.device, DeviceSettings) and self.format is ModelFormat.program:
            require(
                self.device.kind is not DeviceKind.android,
                "device",
                self.device.name,
                "one whose runtime gives logits, for format=program: a phone's llama_main only "
                "prints text; the same file runs with device=host",
            )
