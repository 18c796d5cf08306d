"""Block predictor: the sum of measured half-blocks, calibrated on a few whole models.

A block measured alone differs from a block inside a model: each program pays for a call, and a
small program stays in the caches. On a 100M model the sum was 4 % off for prefill and up to 36 %
for decode. The difference is nearly one factor and one overhead, which a handful of whole models
determines.
"""

import math
from enum import Enum
from typing import Self

import numpy as np

from flash.latency.composition import BlockTable, Composition
from flash.latency.cost_model import Specs, Values
from flash.latency.prediction import Prediction, from_logs, t_quantile


class Calibration(Enum):
    """Forms of the calibration from the sum of blocks to the latency of a model, simplest first."""

    scale = "scale"
    """Latency = scale x sum."""
    model_overhead = "model_overhead"
    """Latency = scale x sum + cost of a model, at least zero."""
    call_overhead = "call_overhead"
    """Latency = scale x sum + cost of each call. The cost may be negative, down to minus the
    latency of the cheapest part: every measured block contains the cost of a call, which a model
    pays only once."""


_MAX_ERROR_RATIO = 0.7
"""Greatest ratio of leave-one-out errors at which a richer calibration replaces a simpler one."""
_MIN_SCALE = 0.5
"""Lower bound of the scale beside an overhead. With few models, a calibration that explains the
latency by the number of parts alone would fit well but not generalize."""
_MIN_SHARE_OF_SUM = 0.05
"""Lower bound of predictions, as a share of the sum of blocks."""


class BlockPredictor:
    """Calibrated sum of blocks, with Student's t intervals from leave-one-out residuals of logs.

    The form of the calibration is selected anew for every model that is left out, so the residuals
    include the error of the selection.

    Args:
        table: Measured blocks at the predicted point of the workload.
    """

    def __init__(self, table: BlockTable) -> None:
        self._table = table
        self._bounds = {
            Calibration.model_overhead: (0.0, math.inf),
            Calibration.call_overhead: (-table.smallest_ms, math.inf),
        }

    def fit(self, specs: Specs, values_ms: Values, errors_ms: Values | None = None) -> Self:
        """Calibrate on measured whole models; `errors_ms` is ignored in favor of residuals."""
        sums, values = self._table.compose(specs), np.asarray(values_ms, dtype=float)
        n = len(values)
        residuals = np.empty(n)
        for i, kept in enumerate(~np.eye(n, dtype=bool)):
            form, coefficients = self._calibrate(sums[kept], values[kept])
            residuals[i] = _log_error(form, coefficients, sums[i : i + 1], values[i])
        self.calibration, self.coefficients = self._calibrate(sums, values)
        dof = n - (1 if self.calibration is Calibration.scale else 2)
        self.half_width = t_quantile(dof) * float(np.sqrt((residuals**2).mean()))
        return self

    def predict(self, specs: Specs) -> Prediction:
        """Predict latencies with intervals."""
        mean = _apply(self.calibration, self.coefficients, self._table.compose(specs))
        return from_logs(np.log(mean), self.half_width)

    def __str__(self) -> str:
        scale, overhead = self.coefficients
        text = f"{self._table.point}: {scale:.3f} x sum of blocks"
        if self.calibration is not Calibration.scale:
            text += f" {overhead:+.3g} ms ({self.calibration.value})"
        return f"{text}, x/ {np.exp(self.half_width):.3f} for 90 %"

    def _calibrate(self, sums: Composition, values: Values) -> tuple[Calibration, Values]:
        """Select a form by leave-one-out error; a richer one must win by `_MAX_ERROR_RATIO`."""
        best, best_error = Calibration.scale, self._left_out(Calibration.scale, sums, values)
        best_error *= _MAX_ERROR_RATIO
        if len(values) >= 4:
            for form in self._bounds:
                error = self._left_out(form, sums, values)
                if error < best_error:
                    best, best_error = form, error
        return best, self._solve(best, sums, values)

    def _left_out(self, form: Calibration, sums: Composition, values: Values) -> float:
        n = len(values)
        if n < 2:
            return 0.0
        square = 0.0
        for i, kept in enumerate(~np.eye(n, dtype=bool)):
            coefficients = self._solve(form, sums[kept], values[kept])
            square += _log_error(form, coefficients, sums[i : i + 1], values[i]) ** 2
        return math.sqrt(square / n)

    def _solve(self, form: Calibration, sums: Composition, values: Values) -> Values:
        """Fit scale and overhead [ms] to relative errors, so models of all sizes weigh the same."""
        if form is Calibration.scale:
            return np.array([np.exp(np.log(values / sums.total_ms).mean()), 0.0])
        matrix = np.stack([sums.total_ms, _overhead_units(form, sums)], axis=1) / values[:, None]
        return _bounded_least_squares(matrix, (_MIN_SCALE, math.inf), self._bounds[form])


def _overhead_units(form: Calibration, sums: Composition) -> Values:
    """Return the count that multiplies the overhead for each model."""
    match form:
        case Calibration.scale:
            return np.zeros_like(sums.total_ms)
        case Calibration.model_overhead:
            return np.ones_like(sums.total_ms)
        case Calibration.call_overhead:
            return sums.num_calls


def _apply(form: Calibration, coefficients: Values, sums: Composition) -> Values:
    scale, overhead = coefficients
    predicted = scale * sums.total_ms + overhead * _overhead_units(form, sums)
    return np.maximum(predicted, _MIN_SHARE_OF_SUM * sums.total_ms)


def _log_error(form: Calibration, coefficients: Values, one: Composition, value: float) -> float:
    return math.log(value / _apply(form, coefficients, one)[0])


def _bounded_least_squares(
    matrix: Values, first: tuple[float, float], second: tuple[float, float]
) -> Values:
    """Return the two coefficients within bounds that bring `matrix @ coefficients` closest to 1.

    The optimum of a convex function in a box is the unconstrained one or lies on an edge.
    """
    free = np.linalg.lstsq(matrix, np.ones(len(matrix)), rcond=None)[0]
    bounds = (first, second)
    if all(low <= c <= high for c, (low, high) in zip(free, bounds, strict=True)):
        return free
    candidates = []
    for fixed, other in ((0, 1), (1, 0)):
        column = matrix[:, other]
        square = float(column @ column)
        for value in bounds[fixed]:
            if math.isfinite(value):
                rest = 1 - value * matrix[:, fixed]
                best = float(column @ rest) / square if square > 0 else 0.0
                candidate = np.empty(2)
                candidate[fixed], candidate[other] = value, np.clip(best, *bounds[other])
                candidates.append(candidate)
    return min(candidates, key=lambda c: float(((matrix @ c - 1) ** 2).sum()))
