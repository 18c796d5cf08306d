"""What a sampler is asked: for how many candidates, of which space, given which trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from flash.arch import ArchSpec, SearchSpace
from flash.search.objectives import Problem
from flash.search.settings import SearchSettings
from flash.search.study import Trial


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to a sampler.

    Attributes:
        space: Where candidates come from.
        problem: Objectives, limits and reference point.
        settings: Sampler and its sizes.
        trials: All trials so far.
        n: Candidates wanted.
        seed: Fixes every random choice.
    """

    space: SearchSpace
    problem: Problem
    settings: SearchSettings
    trials: Sequence[Trial]
    n: int
    seed: int

    @cached_property
    def known(self) -> set[ArchSpec]:
        """What must not be proposed again."""
        return {trial.spec for trial in self.trials}

    @cached_property
    def specs(self) -> list[ArchSpec]:
        """Architectures whose loss is known or, of stopped trials, predicted, in their order."""
        return [trial.spec for trial in self.trials if trial.expected_loss is not None]

    @cached_property
    def losses(self) -> list[float]:
        """Their losses [nats a token]."""
        losses = (trial.expected_loss for trial in self.trials)
        return [loss for loss in losses if loss is not None]

    @cached_property
    def pending(self) -> list[ArchSpec]:
        """Architectures that wait or are being evaluated."""
        return [trial.spec for trial in self.trials if not trial.finished]
