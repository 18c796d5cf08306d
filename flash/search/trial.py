"""Trial: one candidate of a search and its outcome."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from flash.arch import ArchSpec
from flash.errors import under
from flash.records import convert
from flash.search.objectives import Objective


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

    def point(self, objectives: Sequence[Objective]) -> tuple[float, ...]:
        """Return the objective values of a complete trial, loss first."""
        assert self.loss is not None
        return (self.loss, *(self.costs[objective.key] for objective in objectives[1:]))

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
    info: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    crashes: int | None = None


def read_trial(frozen: FrozenTrial) -> Trial:
    """Return a trial as it stands in the database.

    Raises:
        InputError: An attribute is missing or of another type, as in a damaged database.
    """
    with under(f"trial {frozen.number} of the study", ": "):
        attributes = convert(_Attributes, frozen.user_attrs)
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
        loss=frozen.values[0] if frozen.state is TrialState.COMPLETE else None,
        extra=extra,
        batch=attributes.batch,
    )
