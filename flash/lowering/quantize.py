"""Weight quantisation of an exportable module, in formats that XNNPACK has kernels for."""

from typing import Any, TypeVar

from torch import Tensor, nn

from flash.arch import Quantization
from flash.compat.torchao import tensor_parts, with_parts
from flash.lowering.settings import LoweringSettings
from flash.model.quantization import embedding_recipe, linear_recipe

Module = TypeVar("Module", bound=nn.Module)

CHUNK_WEIGHTS = 2**18
"""Weights that are quantised at a time: 1 MB of float32, which stays in a core's cache."""


def quantize(root: Module, lowering: LoweringSettings) -> Module:
    """Quantise all linears and embeddings of `root` in place and return it.

    int8da4w is the recipe of flash.model.quantization; XNNPACK runs such a linear as one kernel.
    With fp32 nothing changes.
    """
    if lowering.quantization is Quantization.fp32:
        return root
    linear = linear_recipe(lowering.group_size)
    embedding = embedding_recipe(lowering.group_size, lowering.embedding_bits)
    for module in root.modules():
        if isinstance(module, nn.Linear):
            _quantize_rows(module, linear)
        elif isinstance(module, nn.Embedding):
            _quantize_rows(module, embedding)
    return root


def _quantize_rows(module: nn.Linear | nn.Embedding, recipe: Any) -> None:
    """Apply torchao's `quantize_` to the weight `[rows, columns]` of one module in chunks of rows.

    Groups lie within rows, so the result is the same. In one go, torchao would hold several float
    copies of a matrix: 3 GB for the embedding of flash_650m.
    """
    from torchao.quantization import quantize_

    weight: Tensor = module.weight.detach()
    data: dict[str, Tensor] = {}
    quantized: Any = None
    step = max(1, CHUNK_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        like = {"device": "meta", "dtype": rows.dtype}
        linear = isinstance(module, nn.Linear)
        part = nn.Linear(1, 1, bias=False, **like) if linear else nn.Embedding(1, 1, **like)
        part.weight = nn.Parameter(rows, requires_grad=False)
        quantize_(part, recipe, filter_fn=lambda module, name: True)
        quantized = part.weight.data  # torchao's, with tensors and attributes of its own
        for name, values in tensor_parts(quantized).items():
            if start == 0:
                data[name] = values.new_empty((len(weight), *values.shape[1:]))
            data[name][start : start + step] = values
    module.weight = nn.Parameter(with_parts(quantized, data), requires_grad=False)
