"""GPTQ (arXiv:2210.17323): rounding of a matrix with the least error of its outputs."""

import torch
from jaxtyping import Float
from torch import Tensor

from flash.errors import CheckFailed
from flash.rounding.grid import Grid, keep_present, limits, mse_scale

DAMPING = 0.01
"""Share of the mean diagonal that is added to it, as in the paper, so that the inverse is well
conditioned."""
BLOCK_COLUMNS = 128
"""Columns whose errors are made up for at once in all later columns, as in the paper."""


def inverse_factor(hessian: Float[Tensor, "c c"]) -> Float[Tensor, "c c"]:
    """Upper Cholesky factor of the inverse of a damped Hessian.

    Args:
        hessian: `x.T @ x` of the inputs x of a matrix.

    Raises:
        CheckFailed: It is not finite, as weights before the matrix are not, or as they overflow.
    """
    if not hessian.isfinite().all():
        raise CheckFailed(
            "the activations are not finite, so that nothing can be calibrated; the weights hold "
            "NaN or inf, or are absurdly large"
        )
    damped = hessian.double()
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean()
    diagonal[diagonal == 0] = 1  # no input at all: every weight is as good
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


@torch.no_grad()
def gptq(
    weight: Float[Tensor, "rows c"], factor: Float[Tensor, "c c"], group_size: int, bits: int
) -> Grid:
    """Round column by column; the columns that follow make up for the error of each.

    The scale of a group is that of the least error of its weights, once those have made up for the
    errors before them. The error of a column counts as it does for the outputs, when the columns
    behind it make up for it.

    Args:
        weight: Matrix to round.
        factor: `inverse_factor` of its inputs.
        group_size: Columns that share a scale; a divisor of all columns.
        bits: Bits of an integer.

    Returns:
        The rounded matrix; its `targets` are the weights that made up for the errors before them.
    """
    # Columns are contiguous in the transpose: a step touches few cache lines.
    rest = weight.detach().float().T.contiguous()
    columns, rows = rest.shape
    integers = torch.empty(columns, rows, dtype=torch.int8)
    scales = torch.empty(columns // group_size, rows)
    block = max(group_size, BLOCK_COLUMNS // group_size * group_size)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty(stop - start, rows)
        for i in range(start, stop):
            if i % group_size == 0:
                group = rest[i : i + group_size].T.contiguous()
                counts = factor.diagonal()[i : i + group_size] ** -2
                scale = mse_scale(group, bits, counts)
                scales[i // group_size] = keep_present(group, scale, bits)[:, 0]
            scale = scales[i // group_size]
            rounded = (rest[i] / scale).round_().clamp_(*limits(bits))
            integers[i] = rounded
            error = errors[i - start] = (rest[i] - rounded * scale) / factor[i, i]
            rest[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    return Grid(integers.T.contiguous(), scales.T.contiguous(), bits, targets=rest.T)
