"""Active learning of latency predictors: which models to measure next, and when to stop.

Measuring a whole model costs minutes of lowering, so each one should reduce the uncertainty about
all the others as much as possible. The posterior variance of `AnalyticalPredictor` and
`GaussianProcess` depends on which models are measured but not on the values, so the effect of a
measurement on it is known beforehand.
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

_RANGE_MARGIN = 0.1


class CovarianceModel(Protocol):
    """Predictor with a joint covariance of log latencies."""

    def covariance(self, first: Specs, second: Specs) -> Float[np.ndarray, "n m"]:
        """Compute the prior covariance of log latencies, before any model is measured."""
        ...

    @property
    def noise_variance(self) -> float:
        """Variance of the measurement noise of a log latency."""
        ...


def choose(
    predictor: CovarianceModel,
    measured: Sequence[ArchSpec],
    pool: Sequence[ArchSpec],
    num: int,
    costs: Values | None = None,
) -> list[ArchSpec]:
    """Select the specs whose measurement reduces the mean predictive variance over the pool most.

    The selection is greedy: each spec is chosen given the ones before it (active learning by Cohn,
    ALC), so a batch holds no redundant specs. An unfitted `AnalyticalPredictor` suffices for the
    first batch.

    Args:
        predictor: Predictor fitted to the measured specs, or an unfitted one.
        measured: Specs that were measured, or are about to be.
        pool: Candidates, which also represent the space to be predicted.
        num: Number of specs to select.
        costs: Cost of measuring each spec of the pool, in any unit; None means equal costs.

    Returns:
        The selected specs in order; fewer than `num` if the pool has no more.
    """
    noise = predictor.noise_variance
    prices = np.ones(len(pool)) if costs is None else np.asarray(costs, dtype=float)
    C = _posterior_covariance(predictor, SpecTable.of(measured), SpecTable.of(pool))
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


def extrapolates(
    predictor: CovarianceModel, measured: Specs, specs: Specs
) -> Bool[np.ndarray, " n"]:
    """Mark the specs for which a prediction is an extrapolation from the measured models.

    A spec is marked if its predictive variance exceeds that of every measured model when left out
    of the fit, which is how predictors are validated. It is also marked if its depth, a width or
    the share of a kind of layer lies outside the measured range by more than a tenth of that range:
    the predictor may be confident of its linear trend there, but no measurement has tested it.
    """
    seen, table = SpecTable.of(measured), SpecTable.of(specs)
    noise = predictor.noise_variance
    K = predictor.covariance(seen, seen) + noise * np.eye(len(seen))
    left_out = 1 / np.diag(np.linalg.inv(K)) - noise
    uncertain = np.diag(_posterior_covariance(predictor, seen, table)) > left_out.max()
    known, asked = shape_features(seen), shape_features(table)
    low, high = known.min(axis=0), known.max(axis=0)
    margin = _RANGE_MARGIN * (high - low)
    return uncertain | ((asked < low - margin) | (asked > high + margin)).any(axis=1)


def _posterior_covariance(
    predictor: CovarianceModel, seen: SpecTable, table: SpecTable
) -> Float[np.ndarray, "n n"]:
    """Compute the posterior covariance of log latencies, given measurements of `seen`."""
    C = predictor.covariance(table, table)
    if not len(seen):
        return C
    K = predictor.covariance(seen, seen) + predictor.noise_variance * np.eye(len(seen))
    factor = linalg.cholesky(K, lower=True)
    explained = linalg.solve_triangular(factor, predictor.covariance(seen, table), lower=True)
    return C - explained.T @ explained


class StopReason(Enum):
    """Reason to end the measurements."""

    target = "target"
    """The predictor has reached the target error."""
    budget = "budget"
    """The budget is spent."""


@dataclass(frozen=True, kw_only=True)
class ErrorEstimate:
    """Estimate of the mean absolute percentage error on models outside the fit.

    The estimate is conservative for measurements selected by `choose`: they lie at the ends of the
    space, where each is hardest to predict from the others.

    Attributes:
        mape_pct: Estimated mean absolute percentage error [%].
        upper_pct: Upper confidence limit, which the true mean exceeds with a probability of 5 %
            [%].
        n: Number of models in the estimate.
    """

    mape_pct: float
    upper_pct: float
    n: int

    @classmethod
    def of(cls, left_out: Prediction, values_ms: Values) -> "ErrorEstimate":
        """Estimate the error from predictions of each measured model by the others."""
        values = np.asarray(values_ms, dtype=float)
        errors = 100 * np.abs(left_out.mean / values - 1)
        n = len(errors)
        error = float(errors.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
        mean = float(errors.mean())
        return cls(mape_pct=mean, upper_pct=mean + t_quantile(n - 1) * error, n=n)


def stop(
    estimate: ErrorEstimate | None, target_pct: float, spent: float, budget: float
) -> StopReason | None:
    """Return the reason to stop measuring, or None to continue.

    Args:
        estimate: Error estimate so far; None if there are too few models for one.
        target_pct: Mean absolute percentage error to reach: `upper_pct` must not exceed it [%].
        spent: Cost of the measurements so far, in the unit of the budget.
        budget: Greatest total cost.
    """
    if estimate is not None and estimate.upper_pct <= target_pct:
        return StopReason.target
    return StopReason.budget if spent >= budget else None
