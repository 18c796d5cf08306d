"""A predictor for a second device from few measurements of its own and what the first one taught.

Two devices differ most in their rates: one has faster matrix products, the other a faster memory.
So what carries over is how the work of a kind relates to that of another, as a starting point that
the new measurements correct, and the smooth factor, which is about shapes and blocking.
"""

from typing import Self

import numpy as np
from scipy.special import softmax

from flash.latency.analytical import AnalyticalPredictor
from flash.latency.cost_model import WORK, Specs, SpecTable, Values, shape_features
from flash.latency.prediction import Prediction
from flash.latency.regression import Matrix, NonNegativeRegression

_LEAST = 0.1
"""A kind of work that cost the first device nothing is believed to cost the second this share of
what it costs a nominal one."""


class Transferred:
    """Two of `NonNegativeRegression`, from the first device and from a nominal one.

    One starts from the other device's coefficients and smooth factor, the other, as
    `AnalyticalPredictor` does, from nominal coefficients; they are averaged on the logarithmic
    scale with their posterior probabilities. A first device that is quite unlike the second thus
    does no lasting harm.

    Args:
        source: Fitted to the first device, at the same point.
    """

    def __init__(self, source: AnalyticalPredictor) -> None:
        self._source = source

    def fit(self, specs: Specs, values_ms: Values, errors_ms: Values | None = None) -> Self:
        """Learn from whole models on the second device; errors are standard errors."""
        table = SpecTable.of(specs)
        features = shape_features(table)
        self._regressions = [
            NonNegativeRegression(np.ones(len(WORK))).fit(work, values_ms, errors_ms, features)
            for work in self._works(table)
        ]
        self._shares = softmax([fitted.log_evidence for fitted in self._regressions])
        return self

    def predict(self, specs: Specs) -> Prediction:
        """Latencies with intervals."""
        table = SpecTable.of(specs)
        features = shape_features(table)
        predictions = [
            fitted.predict(work, features)
            for fitted, work in zip(self._regressions, self._works(table), strict=True)
        ]

        def mixed(name: str) -> Values:
            logs = np.log([getattr(each, name) for each in predictions])
            return np.exp(self._shares @ logs)

        return Prediction(mixed("mean"), mixed("low"), mixed("high"))

    def _works(self, table: SpecTable) -> tuple[Matrix, Matrix]:
        """Work in ms of the first device, and of a nominal one."""
        work = self._source.work(table)
        regression = self._source.regression
        assert regression.multiples is not None, "the source must be fitted"
        factor = regression.smooth_factor(shape_features(table))
        return factor[:, None] * work * np.maximum(regression.multiples, _LEAST), work
