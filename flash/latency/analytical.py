"""Latency from counted work: contributions that cannot be negative, and what they leave.

`flash.latency.cost_model` counts what a spec makes the device do at one point, in few columns that
differ physically: with about ten models to learn from, splitting further (up from down projections,
bytes from operations) would only give the fit more ways to be wrong.
"""

from typing import Self

import numpy as np
from jaxtyping import Float

from flash.device.workload import Point
from flash.latency.cost_model import WORK, Specs, SpecTable, Values, counted, shape_features
from flash.latency.prediction import Prediction
from flash.latency.regression import NonNegativeRegression
from flash.lowering.settings import LoweringSettings


class AnalyticalPredictor:
    """`NonNegativeRegression` on the counted work of a spec; its smooth factor is over the shape.

    Before any fit it knows `covariance` from a nominal device, which is enough to choose the first
    models to measure.

    Args:
        point: What is predicted.
        lowering: How models become programs.
        chunk: Most prompt tokens of one call; None is the program's own chunk [tokens].

    Attributes:
        regression: What was learned; its `multiples` are the costs of `WORK` relative to a nominal
            device, once the common factor is taken out.
    """

    def __init__(self, point: Point, lowering: LoweringSettings, chunk: int | None = None) -> None:
        self.point = point
        self._lowering = lowering
        self._chunk = lowering.chunk if chunk is None else chunk
        self.regression = NonNegativeRegression(np.ones(len(WORK)))

    def fit(self, specs: Specs, values_ms: Values, errors_ms: Values | None = None) -> Self:
        """Learn from whole models; `errors_ms` are standard errors of the measured values."""
        table = SpecTable.of(specs)
        self.regression.fit(self.work(table), values_ms, errors_ms, shape_features(table))
        return self

    def predict(self, specs: Specs) -> Prediction:
        """Latencies with intervals."""
        table = SpecTable.of(specs)
        return self.regression.predict(self.work(table), shape_features(table))

    def work(self, specs: Specs) -> Float[np.ndarray, "n 10"]:
        """Counted work of every spec in ms of a nominal device, columns `WORK`."""
        return counted(SpecTable.of(specs), self.point, self._lowering, self._chunk)

    def covariance(self, first: Specs, second: Specs) -> Float[np.ndarray, "n m"]:
        """Covariance of log latencies before the fitted models are taken into account."""
        tables = SpecTable.of(first), SpecTable.of(second)
        return self.regression.covariance(
            *(self.work(table) for table in tables), *(shape_features(table) for table in tables)
        )

    @property
    def noise_variance(self) -> float:
        """Variance of the log of a measured latency about the truth."""
        return self.regression.noise_variance
