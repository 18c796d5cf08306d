"""Interface of latency predictors, and their validation on models outside the fit."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, cast

import numpy as np
from scipy import stats

from flash.arch import ArchSpec
from flash.latency.cost_model import Specs, Values

LEVEL = 0.9
"""Nominal coverage probability of the intervals of a `Prediction`."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """Predicted latencies of n architectures [ms].

    Attributes:
        mean: Point predictions: means of log latencies, hence medians of latencies.
        low: Lower ends of the central 90 % intervals.
        high: Upper ends of the intervals. An interval is that of a measured latency, so it includes
            the noise of a measurement.
    """

    mean: Values
    low: Values
    high: Values

    def __len__(self) -> int:
        return len(self.mean)


class Predictor(Protocol):
    """Predictor of latencies at one point of a workload on one device."""

    def fit(self, specs: Specs, values_ms: Values, errors_ms: Values | None = None) -> Self:
        """Fit to measured whole models; `errors_ms` are standard errors of the latencies."""
        ...

    def predict(self, specs: Specs) -> Prediction:
        """Predict latencies with intervals; 100,000 specs take about a second or less."""
        ...


def from_logs(center: Values, half_width: Values | float) -> Prediction:
    """Build a prediction whose intervals are symmetric on the logarithmic scale."""
    with np.errstate(over="ignore"):
        low, high = np.exp(center - half_width), np.exp(center + half_width)
    return Prediction(np.exp(center), low, high)


def t_quantile(dof: float) -> float:
    """Return the half-width of the central 90 % t interval in standard deviations.

    Args:
        dof: Degrees of freedom; the half-width is infinite without any.
    """
    return float(stats.t.ppf((1 + LEVEL) / 2, dof)) if dof > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Accuracy of predictions of held-out models; unreliable if there are few of them.

    Attributes:
        r2: Coefficient of determination.
        mape_pct: Mean absolute percentage error [%].
        kendall_tau: Rank correlation of predicted and measured latencies.
        coverage_90: Share of the measured latencies inside their 90 % intervals.
        n: Number of held-out models.
    """

    r2: float
    mape_pct: float
    kendall_tau: float
    coverage_90: float
    n: int


def score(prediction: Prediction, values_ms: Values) -> Scores:
    """Compare predictions with measured latencies that the predictor was not fitted to."""
    values = np.asarray(values_ms, dtype=float)
    errors = prediction.mean - values
    spread = float(((values - values.mean()) ** 2).sum())
    tau = cast(float, stats.kendalltau(prediction.mean, values)[0])
    inside = (prediction.low <= values) & (values <= prediction.high)
    return Scores(
        r2=1 - float((errors**2).sum()) / spread if spread > 0 else math.nan,
        mape_pct=100 * float(np.mean(np.abs(errors) / values)),
        kendall_tau=float(tau),
        coverage_90=float(inside.mean()),
        n=len(values),
    )


def cross_predict(
    make_predictor: Callable[[], Predictor],
    specs: Sequence[ArchSpec],
    values_ms: Values,
    errors_ms: Values | None = None,
    *,
    folds: int | None = None,
    seed: int = 0,
) -> Prediction:
    """Predict every model by a predictor fitted to the others (cross-validation).

    Args:
        make_predictor: Returns an unfitted predictor. Data given to its constructor are not held
            out: for `blocks`, the table of measured blocks, so only the calibration is refitted.
        specs: Measured whole models.
        values_ms: Latencies of `specs` [ms].
        errors_ms: Standard errors of the latencies [ms].
        folds: Number of folds; None means leave-one-out for up to 20 models and 10 folds for more.
        seed: Seed of the assignment of models to folds.
    """
    n = len(specs)
    values = np.asarray(values_ms, dtype=float)
    folds = min(n, folds or (n if n <= 20 else 10))
    parts = np.array_split(np.random.default_rng(seed).permutation(n), folds)
    mean, low, high = np.empty(n), np.empty(n), np.empty(n)
    for held_out in parts:
        kept = np.setdiff1d(np.arange(n), held_out)
        errors = None if errors_ms is None else np.asarray(errors_ms, dtype=float)[kept]
        predictor = make_predictor().fit([specs[i] for i in kept], values[kept], errors)
        prediction = predictor.predict([specs[i] for i in held_out])
        mean[held_out], low[held_out], high[held_out] = (
            prediction.mean,
            prediction.low,
            prediction.high,
        )
    return Prediction(mean, low, high)
