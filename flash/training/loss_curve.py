"""The training loss along a run, as means over equal parts of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

MAX_PARTS = 32
"""Most points of a loss curve: enough to show its shape, and few enough that each is a mean over
many steps, so that runs on the same batches can be compared."""


@dataclass(frozen=True)
class Curve:
    """Training loss of a run so far, as means over equal parts of the run.

    Attributes:
        losses: Mean loss of each finished part [nats per token].
        parts: Number of parts of the whole run.
    """

    losses: tuple[float, ...]
    parts: int

    @classmethod
    def of(cls, losses: Sequence[float], steps: int) -> "Curve":
        """The curve of a run of `steps` steps, from the losses of the steps so far."""
        parts = min(steps, MAX_PARTS)
        edges = [round(i * steps / parts) for i in range(parts + 1)]
        over = [(a, b) for a, b in zip(edges, edges[1:], strict=False) if b <= len(losses)]
        return cls(tuple(_mean(losses[a:b]) for a, b in over), parts)

    def points(self, tokens: int) -> list[list[float]]:
        """Tokens seen by the end of each part, with its loss, in a run of `tokens` tokens."""
        return [[tokens * (i + 1) / self.parts, loss] for i, loss in enumerate(self.losses)]


def _mean(losses: Sequence[float]) -> float:
    """Mean of the finite losses; the steps of all others were left out."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return fmean(finite) if finite else math.nan


Watch = Callable[[Curve], None]
"""Function that is called with the curve after each of its parts; it may raise to end the run."""
