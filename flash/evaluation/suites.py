"""Results of benchmark suites, as files and as tables."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from flash import terminal
from flash.arch import ArchSpec
from flash.errors import InputError
from flash.evaluation.settings import TaskSettings
from flash.records import find_json, read_json, write_json

_AGAIN = "evaluate again"


@dataclass(frozen=True)
class TaskResult:
    """Result of one task.

    Attributes:
        name: Name of the task in the harness.
        shots: Number of few-shot examples.
        samples: Number of questions.
        metrics: All metrics by their keys in the harness.
        seconds: Duration [s].
        key: Hash of all that determines the result.
    """

    name: str
    shots: int
    samples: int
    metrics: dict[str, float]
    seconds: float
    key: str

    def write(self, folder: Path) -> None:
        """Write `NAME.json` atomically."""
        write_json(folder / f"{self.name}.json", self)

    @classmethod
    def read(cls, folder: Path, name: str) -> "TaskResult | None":
        """Read the result in `folder`, or return None if there is none.

        Raises:
            InputError: The file is damaged.
        """
        return find_json(folder / f"{name}.json", cls, _AGAIN)


@dataclass(frozen=True)
class Figure:
    """Score of a task, a row of the table.

    Attributes:
        task: Name of the task in the harness.
        title: Name of the task in tables.
        metric: Key of the metric in the harness.
        shots: Number of few-shot examples.
        samples: Number of questions.
        value: Score, in percent if it is a share.
        stderr: Standard error of `value`; None if the harness computes none.
        paper: Scores in the paper, by model.
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
        """Select the score named by the settings from a result.

        Raises:
            InputError: The result has no such metric.
        """
        if task.metric not in result.metrics:
            known = ", ".join(key for key in result.metrics if "_stderr" not in key)
            raise InputError(
                f"suite.tasks: metric of {task.name}={task.metric}: expected one of {known}"
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
    """Scores of one model in one format on a suite.

    Attributes:
        name: Name of the model.
        spec: Architecture.
        suite: Name of the suite.
        form: Format of the model: `decoder` or `program`.
        limit: Greatest number of questions of each task, or None.
        figures: Score of each task.
        average: Mean of the scores; None unless there are several and all are shares.
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
        """Stem of the file name, and name of the folder with the task results."""
        return f"{self.suite}.{self.form}"

    def write(self, folder: Path) -> None:
        """Write `SUITE.FORM.json` atomically."""
        values = {**dataclasses.asdict(self), "spec": self.spec.to_dict()}
        write_json(folder / f"{self.stem}.json", values)

    @classmethod
    def read(cls, path: Path) -> "SuiteResult":
        """Read the result in a file.

        Raises:
            InputError: The file is damaged.
        """
        return read_json(path, cls, _AGAIN)


def table(result: SuiteResult) -> list[list[str]]:
    """Return the table as rows of text, header first; unknown cells are dashes."""
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


def one_line(result: SuiteResult) -> str:
    """Average of the scores, or all scores where there is none."""
    if result.average is not None:
        return f"average {_number(result.average)} of {len(result.figures)} tasks"
    return ", ".join(f"{row.title} {_number(row.value)}" for row in result.figures)


def as_text(result: SuiteResult) -> str:
    """Format the table for terminals."""
    return terminal.table(table(result))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
