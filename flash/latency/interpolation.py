"""Latency at any prompt length or context between the measured ones."""

from collections.abc import Mapping

import numpy as np

from flash.device.workload import Phase, Point
from flash.errors import InputError
from flash.latency.cost_model import Specs, SpecTable, Values
from flash.latency.prediction import Prediction, Predictor


class Interpolated:
    """Joins predictors of one phase at several points.

    Attention makes the time a prompt token takes grow in proportion to the prompt's length, and
    the time of a decoded token in proportion to its context: these two are interpolated linearly
    between the nearest measured points, and so are the ends of their intervals. Beyond the measured
    points nothing is predicted: caches that are outgrown there would not show.

    Args:
        predictors: Fitted, for at least two points of one phase.

    Raises:
        InputError: There are fewer points, or they are of both phases.
    """

    def __init__(self, predictors: Mapping[Point, Predictor]) -> None:
        self._points = sorted(predictors, key=lambda point: point.tokens)
        names = ", ".join(map(str, predictors))
        if len(predictors) < 2 or len({point.phase for point in predictors}) != 1:
            raise InputError(
                f"points={names or 'none'}: expected at least two points of one phase to "
                "interpolate between; measure another"
            )
        self._predictors = predictors

    def predict(self, specs: Specs, point: Point) -> Prediction:
        """Latencies with intervals at this point.

        Raises:
            InputError: The point is of the other phase or outside the measured ones.
        """
        first, last = self._points[0], self._points[-1]
        inside = first.tokens <= point.tokens <= last.tokens
        if point.phase is not first.phase or not inside:
            raise InputError(
                f"point={point}: expected one from {first} to {last}, between which latencies "
                f"were measured; measure {point}"
            )
        tokens = np.array([each.tokens for each in self._points])
        above = min(max(int(np.searchsorted(tokens, point.tokens)), 1), len(tokens) - 1)
        ends = self._points[above - 1], self._points[above]
        share = (point.tokens - ends[0].tokens) / (ends[1].tokens - ends[0].tokens)
        weights = [1 - share, share]
        if point.phase is Phase.prefill:
            weights = [w * point.tokens / e.tokens for w, e in zip(weights, ends, strict=True)]
        table = SpecTable.of(specs)
        low, high = (self._predictors[end].predict(table) for end in ends)

        def between(at_low: Values, at_high: Values) -> Values:
            return weights[0] * at_low + weights[1] * at_high

        return Prediction(
            between(low.mean, high.mean), between(low.low, high.low), between(low.high, high.high)
        )
