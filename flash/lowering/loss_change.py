"""Change of the loss from the float decoder to another model; the report reads it without torch."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossChange:
    """Losses of two models on the same tokens."""

    float_loss: float
    """Mean loss of the float decoder [nats a token]."""
    loss: float
    """Mean loss of the other model [nats a token]."""
    se: float
    """Standard error of the difference, with tokens taken as independent [nats]."""
    tokens: int
    """Number of predicted tokens."""

    @classmethod
    def of(cls, float_losses: "Tensor", losses: "Tensor") -> "LossChange":
        """Compare the losses of each token `(n,)`."""
        change = (losses - float_losses).double()
        se = float(change.std() / math.sqrt(len(change))) if len(change) > 1 else math.nan
        means = float(float_losses.double().mean()), float(losses.double().mean())
        return cls(float_loss=means[0], loss=means[1], se=se, tokens=len(change))

    @property
    def perplexity_pct(self) -> float:
        """Increase of perplexity [%]."""
        return 100 * math.expm1(self.loss - self.float_loss)

    @property
    def perplexity_se_pct(self) -> float:
        """Standard error of the increase [%]."""
        return 100 * math.exp(self.loss - self.float_loss) * self.se

    def __str__(self) -> str:
        return f"{self.perplexity_pct:+.1f} +- {self.perplexity_se_pct:.1f} %"
