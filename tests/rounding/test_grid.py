"""Scales and integers of groups."""

import pytest
import torch

from flash.errors import CheckFailed
from flash.rounding import grid
from flash.rounding.gptq import gptq, inverse_factor
from flash.rounding.grid import limits, mse_scale, round_to_grid, unclipped_scale


@pytest.mark.parametrize(("group_size", "bits"), [(32, 4), (64, 4), (64, 8)])
def test_nearest_is_what_torchao_computes_and_rounds_once(group_size, bits):
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quant_primitives import MappingType

    weight = torch.randn(20, 64)
    ours = round_to_grid(weight, group_size, bits)
    theirs = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, group_size),
        getattr(torch, f"int{bits}"),
        mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR,
    )
    torch.testing.assert_close(ours.scales, theirs.scale)
    assert torch.equal(ours.integers, theirs.qdata)
    torch.testing.assert_close(ours.weight(), theirs.dequantize())
    again = round_to_grid(ours.weight(), group_size, bits)
    assert torch.equal(again.integers, ours.integers)


@pytest.mark.parametrize("largest", [-8, -7, -4, 4, 5, 6, 7])
@pytest.mark.parametrize("method", ["nearest", "mse", "gptq"])
def test_weights_on_a_grid_stay_as_they_are(largest, method):
    generator = torch.Generator().manual_seed(largest + 8)
    most = abs(largest) - 1
    integers = torch.randint(-most, most + 1, (50, 64), generator=generator)
    integers[:, ::32] = largest
    integers[:, 1::32] = 1  # not all multiples of one number
    scales = torch.rand(50, 1, generator=generator) + 0.1
    weight = (integers * scales).bfloat16().float()  # as they are stored
    x = _correlated(200, 64)
    if method == "gptq":
        rounded = gptq(weight, inverse_factor(x.T @ x), 32, bits=4)
    else:
        rounded = round_to_grid(weight, 32, 4, mse=method == "mse")
    assert torch.equal(rounded.integers.long(), integers)


def test_inputs_that_are_not_finite_are_named():
    with pytest.raises(CheckFailed, match="the weights hold NaN or inf"):
        inverse_factor(torch.full((4, 4), torch.nan))


def test_no_scale_has_a_smaller_squared_error_than_that_of_mse():
    groups = torch.randn(50, 32)
    low, high = limits(4)

    def error(scale):
        return ((groups / scale).round().clamp(low, high) * scale - groups).square().sum(-1)

    best = error(mse_scale(groups, 4))
    for ratio in grid.MSE_RATIOS:
        assert (best <= error(unclipped_scale(groups, 4) * ratio) + 1e-6).all()
    assert best.sum() < 0.97 * error(unclipped_scale(groups, 4)).sum()


def test_rounding_by_rows_is_rounding_at_once(monkeypatch):
    weight = torch.randn(40, 64)
    at_once = round_to_grid(weight, 32, 4, mse=True)
    monkeypatch.setattr(grid, "CHUNK_WEIGHTS", 7 * 64)
    by_rows = round_to_grid(weight, 32, 4, mse=True)
    assert torch.equal(at_once.integers, by_rows.integers)
    assert torch.equal(at_once.scales, by_rows.scales)


def test_a_matrix_of_zeros_stays_one():
    rounded = round_to_grid(torch.zeros(4, 64), 32, 4)
    assert (rounded.scales > 0).all()
    assert not rounded.weight().any()


def _correlated(rows, columns):
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mixture


@pytest.mark.parametrize(("columns", "group_size"), [(64, 32), (352, 32), (384, 128)])
def test_gptq_loses_far_less_of_the_outputs(columns, group_size):
    x, weight = _correlated(500, columns), torch.randn(24, columns)
    factor = inverse_factor(x.T @ x)
    rounded = gptq(weight, factor, group_size, bits=4)
    nearest = round_to_grid(weight, group_size, 4, mse=True)
    losses = [(x @ (each.weight() - weight).T).square().mean() for each in (rounded, nearest)]
    assert losses[0] < 0.6 * losses[1]
    assert rounded.integers.min() >= -8
    assert rounded.integers.max() <= 7


def test_gptq_of_independent_inputs_rounds_to_the_nearest():
    weight = torch.randn(10, 64)
    rounded = gptq(weight, inverse_factor(torch.eye(64)), 32, bits=4)
    assert torch.equal(rounded.integers, round_to_grid(weight, 32, 4, mse=True).integers)


def test_inputs_that_are_always_zero_do_no_harm():
    x = torch.randn(100, 64)
    x[:, 5] = 0
    for inputs in (x, torch.zeros(100, 64), x[:3]):  # dead channels, no input, fewer than channels
        rounded = gptq(torch.randn(8, 64), inverse_factor(inputs.T @ inputs), 32, bits=4)
        assert rounded.weight().isfinite().all()
