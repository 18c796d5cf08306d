"""torchao: the quantized tensor that ExecuTorch lowers.

Names that torchao 0.18 does not document, and the reasons to use them: the constructor of
`IntxUnpackedToInt8Tensor` and its kinds of activation quantization. Integers and scales come from
`flash.rounding`, which torchao's own functions cannot take.
"""

import torch
from torch import Tensor


def quantized_tensor(integers: Tensor, scales: Tensor, bits: int, *, round_inputs: bool) -> Tensor:
    """Make a tensor that computes as a float one and is lowered as the integers.

    Args:
        integers: Signed integers `(rows, columns)` in int8.
        scales: Scale of each group of neighboring columns, `(rows, groups)`.
        bits: Bits of an integer.
        round_inputs: True for a linear layer whose inputs are rounded to 8 bits for each token.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor

    kinds = intx_unpacked_to_int8_tensor.IntxUnpackedToInt8TensorActivationQuantization
    return IntxUnpackedToInt8Tensor(
        integers,
        scales,
        torch.zeros_like(scales, dtype=torch.int8),
        getattr(torch, f"int{bits}"),
        (1, integers.shape[1] // scales.shape[1]),
        torch.float32,
        kinds.INT8_ASYM_PER_TOKEN if round_inputs else None,
    )


def is_quantized(tensor: Tensor) -> bool:
    """Return True for a tensor of `quantized_tensor`."""
    return type(tensor.data).__name__ == "IntxUnpackedToInt8Tensor"
