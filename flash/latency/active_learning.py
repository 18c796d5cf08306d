"""What to measure next, when to stop, and what is beyond the measured models.

A whole model costs minutes of lowering, so it should be one that teaches most about all the others.
Both `Physical` and `GaussianProcess` are linear in what they learn from: how sure they would be
after a measurement depends on what is measured, not on the value, so it is known beforehand.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float
from scipy import linalg

from flash.arch import ArchSpec
from flash.latency.cost_model import Specs, SpecTable, Values, shape_features
from flash.latency.prediction import Prediction, t_quantile

_MARGIN = 0.1


class Uncertain(Protocol):
    """A predictor that knows how the logs of latencies vary together."""

    def covariance(self, first: Specs, second: Specs) -> Float[np.ndarray, "n m"]:
        """Covariance before any of the measured models is taken into account."""
        ...

    @property
    def noise_variance(self) -> float:
        """Variance of the log of a measured latency about the truth."""
        ...


def choose(
    predictor: Uncertain,
    measured: Sequence[ArchSpec],
    pool: Sequence[ArchSpec],
    num: int,
    costs: Values | None = None,
) -> list[ArchSpec]:
    """The next specs to measure: those that reduce the mean predictive variance over the pool most.

    Greedy, each after the ones before it (active learning by Cohn, ALC), so that a batch holds no
    two that teach the same. An unfitted `Physical` will do for the very first batch.

    Args:
        predictor: Fitted to what is measured, or as it is before.
        measured: Specs that were measured, or are about to be.
        pool: Candidates, which also stand for the space that is to be predicted.
        num: How many are wanted; fewer come back where the pool has no more.
        costs: What measuring each of the pool costs, in any unit; None: all cost the same.
    """
    noise = predictor.noise_variance
    prices = np.ones(len(pool)) if costs is None else np.asarray(costs, dtype=float)
    C = _given(predictor, SpecTable.of(measured), SpecTable.of(pool))
    known = set(measured)
    free = np.array([spec not in known for spec in pool], dtype=bool)
    chosen: list[ArchSpec] = []
    while free.any() and len(chosen) < num:
        gains = (C**2).sum(axis=0) / (np.diag(C) + noise) / prices
        best = int(np.argmax(np.where(free, gains, -math.inf)))
        chosen.append(pool[best])
        free &= np.array([spec != pool[best] for spec in pool])
        C = C - np.outer(C[:, best], C[:, best]) / (C[best, best] + noise)
    return chosen


def extrapolates(predictor: Uncertain, measured: Specs, specs: Specs) -> Bool[np.ndarray, " n"]:
    """Whether each spec lies beyond what the measured models can tell.

    That is one that they determine less than they determine any of themselves when it is left out,
    which is how predictors are tested; or one whose depth, a width or the share of a kind of layer
    is outside the measured range, by more than a tenth of that range: a predictor may be sure of
    its straight lines there, but nothing has tested them.
    """
    seen, table = SpecTable.of(measured), SpecTable.of(specs)
    noise = predictor.noise_variance
    K = predictor.covariance(seen, seen) + noise * np.eye(len(seen))
    left_out = 1 / np.diag(np.linalg.inv(K)) - noise
    uncertain = np.diag(_given(predictor, seen, table)) > left_out.max()
    known, asked = shape_features(seen), shape_features(table)
    low, high = known.min(axis=0), known.max(axis=0)
    margin = _MARGIN * (high - low)
    return uncertain | ((asked < low - margin) | (asked > high + margin)).any(axis=1)


def _given(predictor: Uncertain, seen: SpecTable, table: SpecTable) -> Float[np.ndarray, "n n"]:
    """Covariance of the log latencies of a table once the models seen are known."""
    C = predictor.covariance(table, table)
    if not len(seen):
        return C
    K = predictor.covariance(seen, seen) + predictor.noise_variance * np.eye(len(seen))
    factor = linalg.cholesky(K, lower=True)
    explained = linalg.solve_triangular(factor, predictor.covariance(seen, table), lower=True)
    return C - explained.T @ explained


class StopReason(Enum):
    """Why measuring ends."""

    target = "target"
    """The predictor is good enough."""
    budget = "budget"
    """The money is spent."""


@dataclass(frozen=True, kw_only=True)
class ErrorEstimate:
    """Mean absolute error of models that a predictor was not fitted to, as far as it is known.

    With measurements that `choose` picked it errs on the safe side: they lie at the ends of the
    space, where each is hardest to predict from the others.

    Attributes:
        mape_pct: The estimate [%].
        upper_pct: What the true mean exceeds with a probability of 5 % [%].
        n: Models that it rests on.
    """

    mape_pct: float
    upper_pct: float
    n: int

    @classmethod
    def of(cls, left_out: Prediction, values_ms: Values) -> "ErrorEstimate":
        """From predictions of measured models by the others (`cross_predict`)."""
        values = np.asarray(values_ms, dtype=float)
        errors = 100 * np.abs(left_out.mean / values - 1)
        n = len(errors)
        error = float(errors.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
        mean = float(errors.mean())
        return cls(mape_pct=mean, upper_pct=mean + t_quantile(n - 1) * error, n=n)


def stop(
    estimate: ErrorEstimate | None, target_pct: float, spent: float, budget: float
) -> StopReason | None:
    """Why to stop measuring now, or None to go on.

    Args:
        estimate: Error so far; None when it is too early to tell.
        target_pct: Mean absolute error that is wanted; reached once the upper limit is below it.
        spent: What the measurements have cost, in the unit of the budget.
        budget: What they may cost.
    """
    if estimate is not None and estimate.upper_pct <= target_pct:
        return StopReason.target
    return StopReason.budget if spent >= budget else None
