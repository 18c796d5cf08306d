"""The paper's predictor: a Gaussian process on whole models.

Source: arXiv:2603.15954, stage 1 of the search: about 800 measurements gave a cross-validated R2
of 0.97. The paper states neither features nor kernel; here: depth, both widths (as logarithms) and
the shares of full, sliding and tail layers, on log latency. Logs and shares turn a sum over layers
into nearly a plane, which the linear trend takes; where else a layer stands does not change the
latency.
"""

from typing import Self

import numpy as np
from jaxtyping import Float

from flash.latency.cost_model import Specs, SpecTable, Values, shape_features
from flash.latency.prediction import Prediction
from flash.latency.regression import GaussianRegression


class GaussianProcess:
    """`GaussianRegression` on the shape of a spec."""

    def __init__(self) -> None:
        self._regression = GaussianRegression()

    def fit(self, specs: Specs, values_ms: Values, errors_ms: Values | None = None) -> Self:
        """Learn from whole models; `errors_ms` are standard errors of the measured values."""
        self._regression.fit(_features(specs), values_ms, errors_ms)
        return self

    def predict(self, specs: Specs) -> Prediction:
        """Latencies with intervals."""
        return self._regression.predict(_features(specs))

    def covariance(self, first: Specs, second: Specs) -> Float[np.ndarray, "n m"]:
        """Covariance of log latencies before the fitted models are taken into account."""
        X, Y = _features(first), _features(second)
        return self._regression.covariance(X, Y)

    @property
    def noise_variance(self) -> float:
        """Variance of the log of a measured latency about the truth."""
        return self._regression.noise_variance


def _features(specs: Specs) -> Float[np.ndarray, "n 6"]:
    table = SpecTable.of(specs)
    tail = table.column("num_tail") / table.column("num_layers")
    return np.column_stack([shape_features(table), tail])
