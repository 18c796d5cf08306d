"""Analytical latency predictor: non-negative costs of counted work, times a smooth correction.

`flash.latency.cost_model` counts the work of a spec at one point of the workload in a few columns
of physically different work. About ten models are measured, so a finer division (up from down
projections, bytes from operations) would only lead to overfitting.
"""

from typing import Self

import numpy as np
from jaxtyping import Float

from flash.device.workload import Point
from flash.latency.cost_model import (
    WORK_COLUMNS,
    Specs,
    SpecTable,
    Values,
    nominal_work_ms,
    shape_features,
)
from flash.latency.prediction import Prediction
from flash.latency.regression import NonNegativeRegression
from flash.lowering.settings import LoweringSettings


class AnalyticalPredictor:
    """`NonNegativeRegression` on the counted work of a spec, with a smooth factor of its shape.

    Before any fit, `covariance` is that of a nominal device, which suffices to select the first
    models to measure.

    Args:
        point: Point of the workload whose latency is predicted.
        lowering: Settings with which models become programs.
        chunk: Greatest number of prompt tokens in one call; None takes the chunk of the program.

    Attributes:
        regression: Fitted regression. Its `multiples` are the costs of `WORK_COLUMNS` relative to a
            nominal device, without the common factor.
    """

    def __init__(self, point: Point, lowering: LoweringSettings, chunk: int | None = None) -> None:
        self.point = point
        self._lowering = lowering
        self._chunk = lowering.chunk if chunk is None else chunk
        self.regression = NonNegativeRegression(np.ones(len(WORK_COLUMNS)))

    def fit(self, specs: Specs, values_ms: Values, errors_ms: Values | None = None) -> Self:
        """Fit to measured whole models; `errors_ms` are standard errors of the latencies."""
        table = SpecTable.of(specs)
        self.regression.fit(self.work(table), values_ms, errors_ms, shape_features(table))
        return self

    def predict(self, specs: Specs) -> Prediction:
        """Predict latencies with intervals."""
        table = SpecTable.of(specs)
        return self.regression.predict(self.work(table), shape_features(table))

    def work(self, specs: Specs) -> Float[np.ndarray, "n 10"]:
        """Count the work of every spec in ms of a nominal device, by `WORK_COLUMNS`."""
        return nominal_work_ms(SpecTable.of(specs), self.point, self._lowering, self._chunk)

    def covariance(self, first: Specs, second: Specs) -> Float[np.ndarray, "n m"]:
        """Compute the prior covariance of log latencies, without the fitted models."""
        tables = SpecTable.of(first), SpecTable.of(second)
        return self.regression.covariance(
            *(self.work(table) for table in tables), *(shape_features(table) for table in tables)
        )

    @property
    def noise_variance(self) -> float:
        """Variance of the measurement noise of a log latency."""
        return self.regression.noise_variance
