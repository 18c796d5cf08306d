"""Trial: one candidate of a search and its outcome."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from flash.arch import ArchSpec
from flash.errors import require, under
from flash.records import convert
from flash.search.objectives import Objective
from flash.search.quality import TaskError


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate and its outcome."""

    number: int
    spec: ArchSpec
    costs: Mapping[str, float]
    """Known objectives by key of `Objective`, as computed when the trial was proposed."""
    state: TrialState
    loss: float | None = None
    """Held-out loss [nats a token] of a complete trial, else None."""
    errors: Mapping[str, TaskError] = field(default_factory=dict)
    """Errors in tasks of a complete trial, by key of `Objective`."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Facts reported by the evaluation, `reason` of a failure, `seconds` of the evaluation."""
    batch: tuple[int, int]
    """Number of the first trial of the same batch, and the size of the batch."""

    @property
    def complete(self) -> bool:
        """True if the trial has a loss."""
        return self.state is TrialState.COMPLETE

    @property
    def stopped(self) -> bool:
        """True if the trial was pruned, that is, stopped early."""
        return self.state is TrialState.PRUNED

    @property
    def expected_loss(self) -> float | None:
        """Loss of a complete trial, predicted final loss of a stopped one, else None."""
        return self.extra["estimate"] if self.stopped else self.loss

    @property
    def curve(self) -> list[float]:
        """Training losses in equal parts of the training [nats a token]; empty if not recorded."""
        return [loss for _, loss in self.extra.get("curve", [])]

    def learned(self, objectives: Sequence[Objective]) -> tuple[float, ...] | None:
        """Return objectives that training decides: known or, of a stopped trial, predicted.

        None if one of them is neither.
        """
        found = [
            self.expected_loss if each == Objective.quality else self._error(each.key)
            for each in objectives
        ]
        return None if None in found else tuple(value for value in found if value is not None)

    def _error(self, key: str) -> float | None:
        return self.errors[key].pct if key in self.errors else None

    def point(self, objectives: Sequence[Objective]) -> tuple[float, ...]:
        """Return the values of the objectives of a complete trial."""
        assert self.loss is not None
        known = {**self.costs, Objective.quality.key: self.loss}
        known |= {key: error.pct for key, error in self.errors.items()}
        return tuple(known[objective.key] for objective in objectives)

    @property
    def finished(self) -> bool:
        """True if the trial is complete, stopped early or failed."""
        return self.state.is_finished()


@dataclass(frozen=True)
class _Attributes:
    """Attributes of a trial that the study adds to those of Optuna."""

    spec: ArchSpec
    costs: dict[str, float]
    batch: tuple[int, int]
    loss: float | None = None
    errors: dict[str, TaskError] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    crashes: int | None = None


def read_trial(frozen: FrozenTrial, objectives: Sequence[Objective]) -> Trial:
    """Return a trial as it stands in the database.

    Args:
        frozen: Trial of Optuna.
        objectives: Objectives of the study.

    Raises:
        InputError: An attribute is missing or of another type, as in a damaged database.
    """
    complete = frozen.state is TrialState.COMPLETE
    with under(f"trial {frozen.number} of the study", ": "):
        attributes = convert(_Attributes, frozen.user_attrs)
        loss = attributes.loss
        if complete and loss is None and objectives[0] == Objective.quality:
            loss = frozen.values[0]  # studies without tasks have it nowhere else
        if complete:
            require(loss is not None, "loss", None, "a number")
            for key in (each.key for each in objectives if each.task is not None):
                require(key in attributes.errors, f"errors.{key}", None, "an error")
    extra = dict(attributes.info)
    if attributes.reason is not None:
        extra["reason"] = attributes.reason
    if attributes.crashes is not None:
        extra["crashes"] = attributes.crashes
    if frozen.duration is not None:
        extra["seconds"] = frozen.duration.total_seconds()
    return Trial(
        number=frozen.number,
        spec=attributes.spec,
        costs=attributes.costs,
        state=frozen.state,
        loss=loss if complete else None,  # a kill may have followed the attributes
        errors=attributes.errors if complete else {},
        extra=extra,
        batch=attributes.batch,
    )
