"""Integers and scales of groups of weights: `weight = scale * integer`, symmetric around zero.

A signed integer of b bits goes from `-2**(b - 1)` to `2**(b - 1) - 1`. Scales are those of groups
of neighboring columns within one row.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flash.rounding.settings import LINEAR_BITS

SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""Scale of a group of zeros: XNNPACK refuses 0, and torchao has the same bound."""

MSE_RATIOS = torch.linspace(1.0, 0.6, 17).tolist()
"""Scales that `mse` tries, as shares of the scale that clips nothing."""

OFF_GRID = 0.1
"""Largest distance from a grid, in steps, of weights that lie on it: storage in bfloat16 moves them
by about 0.01."""

CHUNK_WEIGHTS = 2**18
"""Weights that are rounded at a time: 1 MB of float32, which stays in a core's cache."""


@dataclass(frozen=True)
class Grid:
    """A rounded matrix.

    Attributes:
        integers: Integers, `(rows, columns)` in int8.
        scales: Scale of each group, `(rows, groups)`.
        bits: Bits of an integer.
        targets: Weights that were rounded to these, if they are not those of the matrix.
    """

    integers: Int[Tensor, "rows columns"]
    scales: Float[Tensor, "rows groups"]
    bits: int
    targets: Float[Tensor, "rows columns"] | None = None

    def weight(self) -> Float[Tensor, "rows columns"]:
        """Compute the weights that the integers stand for."""
        group = self.integers.shape[1] // self.scales.shape[1]
        return self.integers * self.scales.repeat_interleave(group, dim=1)


def limits(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of `bits` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def unclipped_scale(groups: Float[Tensor, "*n g"], bits: int) -> Float[Tensor, "*n 1"]:
    """Smallest scale with which no weight of a group is beyond the integers.

    It is as torchao's `SYMMETRIC_NO_CLIPPING_ERR` has it. Rounding by it twice is rounding once,
    as the weight of the largest magnitude is on an end of the grid.
    """
    low, high = limits(bits)
    scale = torch.maximum(groups.amax(-1, keepdim=True) / high, groups.amin(-1, keepdim=True) / low)
    return scale.clamp_min(SMALLEST_SCALE)


def mse_scale(
    groups: Float[Tensor, "*n g"], bits: int, importance: Float[Tensor, " g"] | None = None
) -> Float[Tensor, "*n 1"]:
    """Scale among `MSE_RATIOS` with the least squared error of each group.

    Args:
        groups: Weights; a row is a group.
        bits: Bits of an integer.
        importance: Factor of the squared error of each column; None takes all as equal.
    """
    low, high = limits(bits)
    widest = best = unclipped_scale(groups, bits)
    least = torch.full_like(widest, torch.inf)
    for ratio in MSE_RATIOS:
        scale = widest * ratio
        error = ((groups / scale).round().clamp(low, high) * scale - groups).square()
        if importance is not None:
            error *= importance
        error = error.sum(-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def keep_present(
    groups: Float[Tensor, "*n g"], scale: Float[Tensor, "*n 1"], bits: int
) -> Float[Tensor, "*n 1"]:
    """Replace the scales of groups that lie on a grid already by those of their grids.

    So rounding changes no weights that come from a training for rounding, though the largest of a
    group need not be on an end of its grid. Training makes grids of `LINEAR_BITS` only; scales of
    other bits stay as they are.

    Args:
        groups: Weights; a row is a group.
        scale: Scales for weights that lie on no grid.
        bits: Bits of an integer.
    """
    if bits != LINEAR_BITS:
        return scale
    low, high = limits(bits)
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_SCALE)
    for steps in range(-low, -low // 2 - 1, -1):
        steps_of = groups * (steps / largest)
        off = (steps_of - steps_of.round().clamp(low, high)).abs().amax(-1, keepdim=True)
        scale = torch.where(off < OFF_GRID, largest / steps, scale)
    return scale


@torch.no_grad()
def round_to_grid(
    weight: Float[Tensor, "rows columns"], group_size: int, bits: int, *, mse: bool = False
) -> Grid:
    """Round each weight to the nearest integer.

    Args:
        weight: Matrix to round.
        group_size: Columns that share a scale; a divisor of all columns.
        bits: Bits of an integer.
        mse: Take the scales of `mse_scale`, else those of `unclipped_scale`.
    """
    rows, columns = weight.shape
    integers = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // group_size)
    step = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        groups = weight[part].float().unflatten(1, (-1, group_size))
        scale = mse_scale(groups, bits) if mse else unclipped_scale(groups, bits)
        scale = keep_present(groups, scale, bits)
        integers[part] = (groups / scale).round().clamp(*limits(bits)).flatten(1)
        scales[part] = scale[..., 0]
    return Grid(integers, scales, bits)
