"""The default predictor: the sum of measured half-blocks, calibrated on a few whole models.

A block alone is not a block inside a model: each program pays for a call, and a small one stays in
the caches. On a 100M model the sum was 4 % off for prefill and up to 36 % for decode. What remains
after that is nearly one factor, which a handful of whole models shows.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Self

import numpy as np
from scipy.optimize import nnls

from flash.arch import ArchSpec
from flash.latency.composition import BlockTable
from flash.latency.prediction import Prediction, Values, from_logs, t_quantile


class Calibration(Enum):
    """Ways to turn a sum of blocks into the latency of a model, simplest first."""

    scale = "scale"
    """scale x sum."""
    model_overhead = "model_overhead"
    """scale x sum + a cost for each model, not below zero."""
    part_overhead = "part_overhead"
    """scale x sum + a cost for each part, down to minus the cheapest part's latency: blocks
    measured alone each contain the cost of a call, which a model pays only once."""


_COEFFICIENTS = {
    Calibration.scale: 1,
    Calibration.model_overhead: 2,
    Calibration.part_overhead: 2,
}
_GAIN = 0.7
"""A richer calibration is taken only if it cuts the leave-one-out error to this share."""
_FLOOR = 0.05
"""Predictions never fall below this share of the sum, whatever the overheads say."""


class BlockPredictor:
    """Sum of blocks, calibrated. The interval is Student's t on leave-one-out residuals of logs.

    The form of the calibration is chosen anew for every model that is left out, so the residuals
    include the error of choosing.

    Args:
        table: Measured blocks of the phase.
    """

    def __init__(self, table: BlockTable) -> None:
        self._table = table

    def fit(
        self, specs: Sequence[ArchSpec], values_ms: Values, errors_ms: Values | None = None
    ) -> Self:
        """Calibrate on whole models; `errors_ms` is not used, the residuals show more."""
        total, parts = self._table.compose(specs)
        values = np.asarray(values_ms, dtype=float)
        n = len(values)
        residuals = np.empty(n)
        for i in range(n):
            kept = np.arange(n) != i
            form, coefficients = self._calibrate(total[kept], parts[kept], values[kept])
            predicted = self._apply(form, coefficients, total[i : i + 1], parts[i : i + 1])
            residuals[i] = np.log(values[i] / predicted[0])
        self.calibration, self.coefficients = self._calibrate(total, parts, values)
        freedom = n - _COEFFICIENTS[self.calibration]
        self.half_width = t_quantile(freedom) * float(np.sqrt((residuals**2).mean()))
        return self

    def predict(self, specs: Sequence[ArchSpec]) -> Prediction:
        """Latencies with intervals."""
        total, parts = self._table.compose(specs)
        mean = self._apply(self.calibration, self.coefficients, total, parts)
        return from_logs(np.log(mean), self.half_width)

    def __str__(self) -> str:
        scale, overhead = self.coefficients
        text = f"{scale:.3f} x sum of blocks"
        if self.calibration is not Calibration.scale:
            each = "model" if self.calibration is Calibration.model_overhead else "part"
            text += f" {overhead:+.3g} ms a {each}"
        return f"{text}, x/ {np.exp(self.half_width):.3f} for 90 %"

    def _calibrate(
        self, total: Values, parts: Values, values: Values
    ) -> tuple[Calibration, Values]:
        """Best form by leave-one-out error, a richer one only if it clearly wins."""
        best, best_error = (
            Calibration.scale,
            self._left_out(Calibration.scale, total, parts, values),
        )
        threshold = _GAIN * best_error
        for form in (Calibration.model_overhead, Calibration.part_overhead):
            if len(values) < _COEFFICIENTS[form] + 2:
                continue
            error = self._left_out(form, total, parts, values)
            if error < min(threshold, best_error):
                best, best_error = form, error
        return best, self._solve(best, total, parts, values)

    def _left_out(self, form: Calibration, total: Values, parts: Values, values: Values) -> float:
        n = len(values)
        if n < 2:
            return 0.0
        square = 0.0
        for i in range(n):
            kept = np.arange(n) != i
            coefficients = self._solve(form, total[kept], parts[kept], values[kept])
            predicted = self._apply(form, coefficients, total[i : i + 1], parts[i : i + 1])
            square += float(np.log(values[i] / predicted[0]) ** 2)
        return float(np.sqrt(square / n))

    def _solve(self, form: Calibration, total: Values, parts: Values, values: Values) -> Values:
        """Scale and overhead [ms]; relative errors count, so models of all sizes weigh the same."""
        if form is Calibration.scale:
            return np.array([np.exp(np.log(values / total).mean()), 0.0])
        per_model = form is Calibration.model_overhead
        units = np.ones_like(parts) if per_model else parts
        least = 0.0 if per_model else -self._table.smallest_ms
        # nnls wants coefficients from zero on: solve for the overhead above its lower bound.
        matrix = np.stack([total, units], axis=1) / values[:, None]
        scale, above = nnls(matrix, (values - least * units) / values)[0]
        return np.array([scale, above + least])

    @staticmethod
    def _apply(form: Calibration, coefficients: Values, total: Values, parts: Values) -> Values:
        units = parts if form is Calibration.part_overhead else np.ones_like(parts)
        scale, overhead = coefficients
        return np.maximum(scale * total + overhead * units, _FLOOR * total)
