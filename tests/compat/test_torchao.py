"""Contract test of torchao for flash.compat.torchao."""

import torch

from flash.rounding.fake import round_activations
from flash.rounding.grid import round_to_grid
from tests.compat.contract import contract


def test_integers_and_scales_become_a_tensor_that_computes():
    with contract(
        "torchao's IntxUnpackedToInt8Tensor or its kinds of activation quantization",
        "flash.compat.torchao.quantized_tensor",
        "hand rounded weights to ExecuTorch",
    ):
        from flash.compat.torchao import is_quantized, quantized_tensor

        weight, x = torch.randn(8, 64), torch.randn(3, 64)
        grid = round_to_grid(weight, 32, bits=4)
        assert not is_quantized(torch.nn.Parameter(weight))
        for round_inputs in (True, False):
            tensor = quantized_tensor(
                grid.integers, grid.scales, grid.bits, round_inputs=round_inputs
            )
            assert is_quantized(torch.nn.Parameter(tensor, requires_grad=False))
            inputs = round_activations(x) if round_inputs else x
            expected = inputs @ grid.weight().T
            torch.testing.assert_close(torch.nn.functional.linear(x, tensor), expected)
