"""Request for candidates: the input that all samplers share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

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
    def _rated(self) -> list[Trial]:
        """Trials whose learned objectives are known or, if they were stopped early, predicted."""
        return [trial for trial in self.trials if trial.learned(self.problem.learned) is not None]

    @cached_property
    def specs(self) -> list[ArchSpec]:
        """Architectures whose learned objectives are known or predicted, in trial order."""
        return [trial.spec for trial in self._rated]

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """Learned objectives of `specs`, shape `(learned, specs)`."""
        rows = [trial.learned(self.problem.learned) for trial in self._rated]
        return np.array(rows, dtype=float).reshape(len(rows), -1).T

    def noise(self, index: int) -> NDArray[np.float64] | None:
        """Return the standard errors of a learned objective of `specs`; None if it has none."""
        key = self.problem.learned[index].key
        found = [t.errors[key].noise_pct if key in t.errors else None for t in self._rated]
        return None if None in found else np.array(found, dtype=float)

    @cached_property
    def pending(self) -> list[ArchSpec]:
        """Architectures that are waiting or being evaluated."""
        return [trial.spec for trial in self.trials if not trial.finished]
