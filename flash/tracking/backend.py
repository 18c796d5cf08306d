"""Descriptions of runs, and the protocol of the backends that receive their records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from flash.records import digest
from flash.tracking.artifacts import Artifact
from flash.tracking.origin import Origin

Metrics = Mapping[str, Any]
"""Values by name: numbers, and text for states."""


class JobType(Enum):
    """Types of runs; the job type in W&B."""

    search = "search"
    train = "train"
    export = "export"
    evaluate = "evaluate"
    report = "report"


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Description of a run.

    Attributes:
        job: Type of the run.
        name: Name of the run.
        key: Hash of all that decides the result; a run of the same type, name and key is resumed.
        group: Group without an origin: the study of a search, the backbone of another result.
        tags: Values to filter runs by, such as the device, by their kind.
        config: Settings and further facts to record.
        origin: Trial that the architecture comes from; its study is the group. None for
            architectures that no search found.
        folder: Folder of the result, which gets the link to the run; None writes no link.
    """

    job: JobType
    name: str
    key: str
    group: str
    tags: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None
    folder: Path | None = None

    @property
    def id(self) -> str:
        """Stable id, which a resumed run has too."""
        return digest([self.job.value, self.name, self.key])


class Backend:
    """Receiver of the records of one run; any call may raise any exception.

    A backend overrides the methods for what it can show; the others do nothing.
    """

    def log(self, metrics: Metrics, step: int | None) -> None:
        """Receive metrics, at a step of the run if there is one."""

    def summarize(self, values: Metrics) -> None:
        """Receive values that describe the run as a whole."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Receive a table, in place of the one before."""

    def log_figures(self, draw: Callable[[], Mapping[str, Any]]) -> None:
        """Receive plotly figures by name; `draw` is called only if they are shown."""

    def use(self, artifact: Artifact) -> None:
        """Receive an artifact that the run reads."""

    def publish(self, artifact: Artifact) -> None:
        """Receive an artifact that the run has written."""

    def close(self, failed: bool) -> None:
        """End the run."""
