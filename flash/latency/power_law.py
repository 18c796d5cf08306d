"""Baseline predictors: latency as a power law in the parameter count or in FLOPs.

The paper shows that such proxies are inaccurate (Table 2): over 100 architectures on a phone,
Kendall's tau of latency was 0.40 against parameters and 0.46 (prefill) or 0.55 (decode) against
FLOPs.
"""

import math
from collections.abc import Callable
from typing import Self

import numpy as np

from flash.latency.cost_model import Specs, SpecTable, Values
from flash.latency.prediction import Prediction, from_logs, t_quantile


class PowerLaw:
    """Least-squares fit of log(latency) = a + b log(count), with t prediction intervals.

    Args:
        count: Function from a table to the base of the power law, such as
            `flash.latency.cost_model.parameters`, or `flops` at a point.
    """

    def __init__(self, count: Callable[[SpecTable], np.ndarray]) -> None:
        self._count = count

    def fit(self, specs: Specs, values_ms: Values, errors_ms: Values | None = None) -> Self:
        """Fit both coefficients; `errors_ms` is ignored, all models weigh the same."""
        x, y = self._log_counts(specs), np.log(values_ms)
        self._center = float(x.mean())
        self._square = float(((x - self._center) ** 2).sum())
        self._slope = float(((x - self._center) @ y) / self._square) if self._square > 0 else 0.0
        self._level = float(y.mean())
        residuals = y - self._level - self._slope * (x - self._center)
        self._n = len(y)
        dof = self._n - 2
        sigma = float(np.sqrt((residuals**2).sum() / max(dof, 1)))
        self._half = t_quantile(dof) * sigma if dof > 0 else math.inf
        return self

    def predict(self, specs: Specs) -> Prediction:
        """Predict latencies with the prediction interval of simple linear regression."""
        away = self._log_counts(specs) - self._center
        leverage = away**2 / self._square if self._square > 0 else 0.0
        half = self._half * np.sqrt(1 + 1 / self._n + leverage)
        return from_logs(self._level + self._slope * away, half)

    def _log_counts(self, specs: Specs) -> Values:
        return np.log(self._count(SpecTable.of(specs)))
