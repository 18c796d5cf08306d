"""Transfer of a predictor to a second device with few measurements of its own.

Two devices differ most in their rates: one has faster matrix products, the other faster memory. The
fitted costs and the smooth factor of the first device, which reflects shapes and blocking, serve as
a prior that the measurements on the second device correct.
"""

from typing import Self

import numpy as np
from scipy.special import softmax

from flash.latency.analytical import AnalyticalPredictor
from flash.latency.cost_model import WORK_COLUMNS, Specs, SpecTable, Values, shape_features
from flash.latency.prediction import Prediction
from flash.latency.regression import Matrix, NonNegativeRegression

_MIN_MULTIPLE = 0.1
"""Lower bound of the multiples taken over: work that cost the first device nothing may cost the
second one something."""


class TransferPredictor:
    """Average of two `NonNegativeRegression`s with different priors.

    The prior of one is the coefficients and smooth factor of the first device. The prior of the
    other is the nominal coefficients, as in `AnalyticalPredictor`. The predictions are averaged on
    the logarithmic scale, weighted by posterior probability, so a first device that is unlike the
    second does little harm.

    Args:
        source: Predictor fitted to the first device at the same point of the workload.
    """

    def __init__(self, source: AnalyticalPredictor) -> None:
        self._source = source

    def fit(self, specs: Specs, values_ms: Values, errors_ms: Values | None = None) -> Self:
        """Fit to whole models on the second device; `errors_ms` are standard errors."""
        table = SpecTable.of(specs)
        features = shape_features(table)
        self._regressions = [
            NonNegativeRegression(np.ones(len(WORK_COLUMNS))).fit(
                work, values_ms, errors_ms, features
            )
            for work in self._work_of_both(table)
        ]
        self._shares = softmax([fitted.log_evidence for fitted in self._regressions])
        return self

    def predict(self, specs: Specs) -> Prediction:
        """Predict latencies with intervals."""
        table = SpecTable.of(specs)
        features = shape_features(table)
        predictions = [
            fitted.predict(work, features)
            for fitted, work in zip(self._regressions, self._work_of_both(table), strict=True)
        ]

        def mixed(name: str) -> Values:
            logs = np.log([getattr(each, name) for each in predictions])
            return np.exp(self._shares @ logs)

        return Prediction(mixed("mean"), mixed("low"), mixed("high"))

    def _work_of_both(self, table: SpecTable) -> tuple[Matrix, Matrix]:
        """Return the counted work in ms of the first device, and of a nominal one."""
        work = self._source.work(table)
        regression = self._source.regression
        assert regression.multiples is not None, "the source must be fitted"
        factor = regression.smooth_factor(shape_features(table))
        return factor[:, None] * work * np.maximum(regression.multiples, _MIN_MULTIPLE), work
