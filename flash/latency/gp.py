"""Gaussian-process predictor of the paper, fitted to whole models.

Source: arXiv:2603.15954, stage 1 of the search (Sec. 3.4): about 800 measurements gave a
cross-validated R2 of 0.97. The paper states neither features nor kernel. The features used here are
the logarithms of depth and both widths and the shares of full, sliding and tail layers; the target
is the log latency. In these features a sum over layers is nearly linear, which suits the linear
trend. Other positions of layers do not affect latency.
"""

from typing import Self

import numpy as np
from jaxtyping import Float

from flash.latency.cost_model import Specs, SpecTable, Values, shape_features
from flash.latency.prediction import Prediction
from flash.latency.regression import GaussianRegression


class GaussianProcess:
    """Predictor that applies `GaussianRegression` to the shape of a spec."""

    def __init__(self) -> None:
        self._regression = GaussianRegression()

    def fit(self, specs: Specs, values_ms: Values, errors_ms: Values | None = None) -> Self:
        """Fit to measured whole models; `errors_ms` are standard errors of the latencies."""
        self._regression.fit(_features(specs), values_ms, errors_ms)
        return self

    def predict(self, specs: Specs) -> Prediction:
        """Predict latencies with intervals."""
        return self._regression.predict(_features(specs))

    def covariance(self, first: Specs, second: Specs) -> Float[np.ndarray, "n m"]:
        """Compute the prior covariance of log latencies, without the fitted models."""
        X, Y = _features(first), _features(second)
        return self._regression.covariance(X, Y)

    @property
    def noise_variance(self) -> float:
        """Variance of the measurement noise of a log latency."""
        return self._regression.noise_variance


def _features(specs: Specs) -> Float[np.ndarray, "n 6"]:
    table = SpecTable.of(specs)
    tail = table.column("num_tail") / table.column("num_layers")
    return np.column_stack([shape_features(table), tail])
