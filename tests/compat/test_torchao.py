"""Contract tests of torchao for flash.compat.torchao."""

import torch
from torch import nn

from flash.log_filters import quiet
from flash.model.quantization import linear_recipe
from tests.compat.contract import contract


def test_a_quantized_weight_is_put_together_from_parts():
    with (
        contract(
            "torchao's tensor_data_names or tensor_attribute_names",
            "flash.compat.torchao.tensor_parts and with_parts",
            "quantize a weight a few rows at a time",
        ),
        quiet(),
    ):
        from torchao.quantization import quantize_

        from flash.compat.torchao import tensor_parts, with_parts

        linear = nn.Linear(64, 8, bias=False)
        quantize_(linear, linear_recipe(32))
        parts = tensor_parts(linear.weight.data)
        assert parts
        assert all(len(part) == 8 for part in parts.values())
        turned = with_parts(linear.weight.data, {k: part.flip(0) for k, part in parts.items()})
        torch.testing.assert_close(turned.dequantize(), linear.weight.data.dequantize().flip(0))


def test_a_prepared_linear_rounds_both_operands():
    with (
        contract(
            "torchao's weight_fake_quantizer or activation_fake_quantizer of a prepared linear",
            "flash.compat.torchao.linear_operands",
            "compute the loss of a head that is trained for quantization",
        ),
        quiet(),
    ):
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig, QATStep

        from flash.compat.torchao import linear_operands

        linear, x = nn.Linear(64, 8, bias=False), torch.randn(3, 64)
        model = nn.Sequential(linear)
        same, weight = linear_operands(model[0], x)
        assert same is x
        assert weight is linear.weight
        quantize_(model, QATConfig(linear_recipe(32), step=QATStep.PREPARE))
        rounded, weight = linear_operands(model[0], x)
        assert not torch.equal(rounded, x)
        torch.testing.assert_close(rounded @ weight.T, model(x))
