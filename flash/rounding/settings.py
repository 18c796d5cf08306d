"""Rounding of weights: methods, and the formats of 8da4w that XNNPACK has kernels for."""

from dataclasses import dataclass
from enum import Enum

from flash.arch import GROUP

LINEAR_BITS = 4
"""Bits of a weight of a linear layer in 8da4w."""


class Rounding(Enum):
    """Choice of the integers and scales that stand for a weight matrix."""

    nearest = "nearest"
    """The smallest scale that clips no weight of a group, and the nearest integers."""
    mse = "mse"
    """The scale of each group with the least squared error of its weights."""
    gptq = "gptq"
    """Integers with the least squared error of a matrix's outputs on calibration text, in which
    each column makes up for the errors of those before it (GPTQ, arXiv:2210.17323)."""


@dataclass(frozen=True)
class WeightFormat:
    """Integers of a rounded decoder: 4 bits in groups, and those of the embedding.

    Attributes:
        group_size: Weights of a row that share a scale.
        embedding_bits: Bits of a weight of the embedding: 4 in groups, or 8 with a scale a row.
    """

    group_size: int = GROUP
    embedding_bits: int = 4

    def embedding_group(self, model_dim: int) -> int:
        """Weights of the embedding that share a scale."""
        return self.group_size if self.embedding_bits == 4 else model_dim
