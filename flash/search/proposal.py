"""Request for candidates: the input that all samplers share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from flash.arch import ArchSpec, SearchSpace
from flash.search.objectives import Problem
from flash.search.settings import SearchSettings
from flash.search.trial import Trial


@dataclass(frozen=True, kw_only=True)
class ProposalRequest:
    """Request for n candidates, given the trials so far.

    Attributes:
        space: Search space.
        problem: Objectives, limits and reference point.
        settings: Sampler and the sizes of its start-up design and pool.
        trials: All trials so far.
        n: Number of candidates to propose.
        seed: Seed of every random choice.
    """

    space: SearchSpace
    problem: Problem
    settings: SearchSettings
    trials: Sequence[Trial]
    n: int
    seed: int

    @cached_property
    def known(self) -> set[ArchSpec]:
        """Architectures of all trials, which must not be proposed again."""
        return {trial.spec for trial in self.trials}

    @cached_property
    def specs(self) -> list[ArchSpec]:
        """Architectures with a known loss or, if stopped early, a predicted one; in trial order."""
        return [trial.spec for trial in self.trials if trial.expected_loss is not None]

    @cached_property
    def losses(self) -> list[float]:
        """Losses of `specs` [nats a token]."""
        losses = (trial.expected_loss for trial in self.trials)
        return [loss for loss in losses if loss is not None]

    @cached_property
    def pending(self) -> list[ArchSpec]:
        """Architectures that are waiting or being evaluated."""
        return [trial.spec for trial in self.trials if not trial.finished]
