"""The weight formats: which torchao recipe turns a form into one that lowers to XNNPACK kernels."""

from typing import TypeVar

import torch
from torch import nn

from flash.arch import GROUP, Quantization

Module = TypeVar("Module", bound=nn.Module)


def quantize(form: Module, quantization: Quantization) -> Module:
    """Quantise `form` in place and return it.

    int8da4w (Sec. 4.1): every linear, the head included, gets 4-bit weights in groups of 32 and
    dynamic 8-bit activations, which XNNPACK runs as one kernel; the embedding gets 4-bit rows.
    """
    if quantization is Quantization.fp32:
        return form
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerGroup

    group = PerGroup(GROUP)
    int4 = torch.int4  # pyright: ignore[reportAttributeAccessIssue]  missing in torch's stubs
    linear = Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_granularity=group)
    embedding = IntxWeightOnlyConfig(weight_dtype=int4, granularity=group)
    quantize_(form, linear)
    quantize_(form, embedding, filter_fn=lambda module, name: isinstance(module, nn.Embedding))
    return form
