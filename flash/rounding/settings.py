"""Rounding of weights: methods, and the formats of 8da4w that XNNPACK has kernels for."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from fnmatch import fnmatchcase

from flash.arch import GROUP
from flash.records import parse_json

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
    """Integers of a rounded decoder: 4 bits in groups, but for the parts named here.

    Attributes:
        group_size: Weights of a row that share a scale in 4 bits; in 8 bits the whole row does.
        embedding_bits: Bits of a weight of the embedding, 4 or 8.
        eight_bit: Parts whose weights have 8 bits, as patterns of names such as `layers.0.mlp`.
    """

    group_size: int = GROUP
    embedding_bits: int = 4
    eight_bit: tuple[str, ...] = ()

    def linear_bits(self, module: str) -> int:
        """Bits of a weight of the linear with this name, such as `model.layers.0.mlp.up_proj`."""
        part = part_of(module)
        wide = any(fnmatchcase(part, pattern) for pattern in self.eight_bit)
        return 8 if wide else LINEAR_BITS

    def group(self, bits: int, columns: int) -> int:
        """Weights of a row of `columns` weights that share a scale."""
        return self.group_size if bits == 4 else columns


@dataclass(frozen=True, kw_only=True)
class TrainedRounding:
    """Rounding that weights were trained for; a checkpoint has it in its file of weights.

    Attributes:
        group_size: Weights that share a scale.
        embedding_bits: Bits of a weight of the embedding.
        rotate: True if the weights are turned before they are rounded.
    """

    group_size: int
    embedding_bits: int
    rotate: bool

    def to_metadata(self) -> dict[str, str]:
        """Metadata of a safetensors file."""
        return {"rounding": json.dumps(asdict(self))}

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str]) -> "TrainedRounding | None":
        """Read it from the metadata of a safetensors file; None if they have none.

        Raises:
            InputError: The metadata are damaged.
        """
        text = metadata.get("rounding")
        return None if text is None else parse_json(cls, text)


def part_of(module: str) -> str:
    """Name of the part of a decoder that a linear belongs to, as in `flash.arch.linear_parts`."""
    name = module.removeprefix("model.")
    return name if name == "lm_head" else name.rpartition(".")[0]
