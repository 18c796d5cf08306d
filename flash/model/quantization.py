"""The quantization of Sec. 4.1, in one definition for lowering and quantization-aware training.

All linears, the head included, get 4-bit weights in groups (of 32 in the paper) and 8-bit
activations that are quantized dynamically per token. The embedding gets 4-bit weights in the same
groups.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flash.arch import GROUP
from flash.compat.torchao import linear_operands
from flash.log_filters import quiet
from flash.model.decoder import Decoder


def linear_recipe(group_size: int = GROUP) -> Any:
    """Configuration of torchao for linears; `group_size` weights share a scale."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup

    int4 = torch.int4  # pyright: ignore[reportAttributeAccessIssue]  missing in torch's stubs
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=int4, weight_granularity=PerGroup(group_size)
    )


def embedding_recipe(group_size: int = GROUP, bits: int = 4) -> Any:
    """Configuration of torchao for embeddings.

    With 8 bits each row has one scale, as in ExecuTorch's exporter.

    Args:
        group_size: Weights that share a scale with 4 bits.
        bits: Bits per weight, 4 or 8.
    """
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    int4 = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
    return IntxWeightOnlyConfig(
        weight_dtype=int4 if bits == 4 else torch.int8,
        granularity=PerGroup(group_size) if bits == 4 else PerAxis(0),
    )


def fake_quantize(model: Decoder, group_size: int = GROUP, embedding_bits: int = 4) -> None:
    """Make `model` compute in floating point what it will compute after quantization.

    Weights and activations are rounded in the forward pass; gradients pass the rounding unchanged.
    Names of parameters stay, and tied parameters stay tied.

    Args:
        model: The decoder, changed in place.
        group_size: Weights that share a scale, as `LoweringSettings.group_size`.
        embedding_bits: Bits per weight of the embedding, as `LoweringSettings.embedding_bits`.
    """
    with quiet():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig, QATStep

        kinds = (
            (nn.Linear, linear_recipe(group_size)),
            (nn.Embedding, embedding_recipe(group_size, embedding_bits)),
        )
        for kind, config in kinds:
            # Exact types only, as their fake-quantized subclasses are done already.
            chosen = lambda module, name, kind=kind: type(module) is kind  # noqa: E731
            quantize_(model, QATConfig(config, step=QATStep.PREPARE), filter_fn=chosen)


def head_operands(
    model: Decoder, hidden: Float[Tensor, "n c"]
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "vocab c"]]:
    """The two factors of the logits, rounded if `model` is fake-quantized."""
    return linear_operands(model.lm_head, hidden)
