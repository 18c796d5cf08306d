"""Baselines: latency as a power law in the parameter count or in the FLOPs of the phase.

The paper's reason for measuring: over 100 architectures on a phone, Kendall's tau of latency was
0.40 against parameters and 0.46 (prefill) or 0.55 (decode) against FLOPs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np

from flash.arch import ArchSpec, Attention
from flash.latency.prediction import Prediction, Values, from_logs, t_quantile


class PowerLaw:
    """log(latency) = a + b log(count), by least squares; the usual t interval for a new point.

    Args:
        count: A count that is a sum over layers plus a part that depends on the widths only, so
            that few calls serve many architectures.
    """

    def __init__(self, count: Callable[[ArchSpec], int]) -> None:
        self._count = count
        self._layer: dict[tuple[ArchSpec, Attention], int] = {}
        self._rest: dict[ArchSpec, int] = {}

    def fit(
        self, specs: Sequence[ArchSpec], values_ms: Values, errors_ms: Values | None = None
    ) -> Self:
        """Fit both coefficients; `errors_ms` is not used, all points weigh the same."""
        x, y = self._log_counts(specs), np.log(values_ms)
        self._center = float(x.mean())
        self._square = float(((x - self._center) ** 2).sum())
        self._slope = float(((x - self._center) @ y) / self._square) if self._square > 0 else 0.0
        self._level = float(y.mean())
        residuals = y - self._level - self._slope * (x - self._center)
        self._n = len(y)
        freedom = self._n - 2
        sigma = float(np.sqrt((residuals**2).sum() / max(freedom, 1)))
        self._half = t_quantile(freedom) * sigma if freedom > 0 else math.inf
        return self

    def predict(self, specs: Sequence[ArchSpec]) -> Prediction:
        """Latencies with the prediction interval of simple regression."""
        away = self._log_counts(specs) - self._center
        leverage = away**2 / self._square if self._square > 0 else 0.0
        half = self._half * np.sqrt(1 + 1 / self._n + leverage)
        return from_logs(self._level + self._slope * away, half)

    def _log_counts(self, specs: Sequence[ArchSpec]) -> Values:
        return np.log([self._total(spec) for spec in specs])

    def _total(self, spec: ArchSpec) -> int:
        kinds = spec.layer_types
        lone = self._lone(spec)
        total = self._rest[lone]
        for kind in Attention:
            num = kinds.count(kind)
            if num:
                total += num * self._layer[lone, kind]
        return total

    def _lone(self, spec: ArchSpec) -> ArchSpec:
        """The one-layer model with the widths of `spec`, its counts taken."""
        skip = Attention.skip_attention
        lone = spec.replace(layer_types=(skip,))
        if lone not in self._rest:
            one = self._count(lone)
            self._layer[lone, skip] = self._count(spec.replace(layer_types=(skip, skip))) - one
            self._rest[lone] = one - self._layer[lone, skip]
            for kind in (Attention.full_attention, Attention.sliding_attention):
                counted = self._count(spec.replace(layer_types=(kind,)))
                self._layer[lone, kind] = counted - self._rest[lone]
        return lone
