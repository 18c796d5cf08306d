"""torchao: parts of a quantized tensor, and fake quantizers of a prepared linear layer.

Names that torchao 0.18 does not document, and the reasons to use them:

- `tensor_data_names` and `tensor_attribute_names` of its tensor subclasses: a weight is quantized
  a few rows at a time, and the parts are then joined.
- `weight_fake_quantizer` and `activation_fake_quantizer` of the linears that `QATStep.PREPARE`
  creates: the loss needs the quantized operands of the logits, since the logits are too large.
"""

from typing import Any

from torch import Tensor, nn


def tensor_parts(quantized: Any) -> dict[str, Tensor]:
    """Return the plain tensors of a quantized tensor, by name; rows are their first axis."""
    return {name: getattr(quantized, name) for name in quantized.tensor_data_names}


def with_parts(quantized: Any, parts: dict[str, Tensor]) -> Any:
    """Return a quantized tensor with other `tensor_parts` and the same attributes."""
    attributes = {name: getattr(quantized, name) for name in quantized.tensor_attribute_names}
    return type(quantized)(**parts, **attributes)


def linear_operands(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return input and weight as `linear` multiplies them: rounded if it is fake-quantized.

    Args:
        linear: A `torch.nn.Linear`, prepared for quantization-aware training or not.
        x: Its input `[..., in_features]`.
    """
    module: Any = linear
    if not hasattr(module, "weight_fake_quantizer"):
        return x, module.weight
    return module.activation_fake_quantizer(x), module.weight_fake_quantizer(module.weight)
