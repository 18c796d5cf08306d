"""The weight formats: which torchao recipe turns a form into one that lowers to XNNPACK kernels."""

from typing import Any, TypeVar

from torch import Tensor, nn

from flash.arch import Quantization
from flash.compat.torchao import tensor_parts, with_parts
from flash.lowering.settings import LoweringSettings
from flash.model.quantization import embedding_recipe, linear_recipe

Module = TypeVar("Module", bound=nn.Module)

PART = 2**18
"""Numbers that are quantised at a time: 1 MB stays in a core's cache."""


def quantize(form: Module, settings: LoweringSettings) -> Module:
    """Quantise `form` in place and return it.

    int8da4w is the recipe of flash.model.quantization; XNNPACK runs such a linear as one kernel.
    """
    if settings.quantization is Quantization.fp32:
        return form
    linear = linear_recipe(settings.group_size)
    embedding = embedding_recipe(settings.group_size, settings.embedding_bits)
    for module in form.modules():
        if isinstance(module, nn.Linear):
            _quantize_rows(module, linear)
        elif isinstance(module, nn.Embedding):
            _quantize_rows(module, embedding)
    return form


def _quantize_rows(module: nn.Linear | nn.Embedding, config: Any) -> None:
    """`quantize_` on the weight `[rows, columns]` of one module, a few rows at a time.

    Groups lie within rows, so the result is the same. At once, torchao would hold several float
    copies of a matrix: 3 GB for the embedding of flash_650m.
    """
    from torchao.quantization import quantize_

    weight: Tensor = module.weight.detach()
    data: dict[str, Tensor] = {}
    quantized: Any = None
    step = max(1, PART // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        like = {"device": "meta", "dtype": rows.dtype}
        linear = isinstance(module, nn.Linear)
        part = nn.Linear(1, 1, bias=False, **like) if linear else nn.Embedding(1, 1, **like)
        part.weight = nn.Parameter(rows, requires_grad=False)
        quantize_(part, config, filter_fn=lambda module, name: True)
        quantized = part.weight.data
        for name, values in tensor_parts(quantized).items():
            if start == 0:
                data[name] = values.new_empty((len(weight), *values.shape[1:]))
            data[name][start : start + step] = values
    module.weight = nn.Parameter(with_parts(quantized, data), requires_grad=False)
