"""Quality of a candidate after its training: its held-out loss, and its errors in tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TaskError:
    """Share of the questions of a task that a model answers wrong."""

    pct: float
    """Share [%]."""
    stderr_pct: float | None
    """Standard error of the share [%]; None if the harness knows none."""
    questions: int
    """Number of questions."""

    @property
    def noise_pct(self) -> float | None:
        """Standard error as a model of the trials takes it [%]: that of half a question or more.

        An error of 0 or 100 % has a standard error of 0, which other questions would not repeat.
        """
        if self.stderr_pct is None:
            return None
        return max(self.stderr_pct, 50 / self.questions)


@dataclass(frozen=True)
class Quality:
    """Result of the evaluation of one candidate."""

    loss: float
    """Held-out loss [nats a token]."""
    info: dict[str, Any] = field(default_factory=dict)
    """Further facts to store with the trial, as plain JSON values."""
    errors: Mapping[str, TaskError] = field(default_factory=dict)
    """Errors in the tasks that are objectives, by key of `Objective`."""
