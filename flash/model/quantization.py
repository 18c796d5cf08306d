"""The quantisation recipe (Sec. 4.1): one definition for lowering and for training aware of it.

Every linear, the head included, gets 4-bit weights in groups (of 32 in the paper) and dynamic 8-bit
activations a token; the embedding gets 4-bit rows in the same groups.
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
    """Torchao's config of a linear."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup

    int4 = torch.int4  # pyright: ignore[reportAttributeAccessIssue]  missing in torch's stubs
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=int4, weight_granularity=PerGroup(group_size)
    )


def embedding_recipe(group_size: int = GROUP, bits: int = 4) -> Any:
    """Torchao's config of an embedding; 8 bits share a scale a row, as in ExecuTorch's exporter."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    int4 = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
    return IntxWeightOnlyConfig(
        weight_dtype=int4 if bits == 4 else torch.int8,
        granularity=PerGroup(group_size) if bits == 4 else PerAxis(0),
    )


def fake_quantize(model: Decoder, group_size: int = GROUP, embedding_bits: int = 4) -> None:
    """Have `model` compute, in float, what it will compute once it is quantised.

    Weights and activations are rounded in the forward pass and gradients pass as if they were not.
    Names of parameters stay, and tied ones stay one.

    Args:
        model: Changed in place.
        group_size: As `LoweringSettings.group_size`.
        embedding_bits: As `LoweringSettings.embedding_bits`.
    """
    with quiet():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig, QATStep

        kinds = (
            (nn.Linear, linear_recipe(group_size)),
            (nn.Embedding, embedding_recipe(group_size, embedding_bits)),
        )
        for kind, recipe in kinds:
            # Not their subclasses: those are fake-quantised already.
            chosen = lambda module, name, kind=kind: type(module) is kind  # noqa: E731
            quantize_(model, QATConfig(recipe, step=QATStep.PREPARE), filter_fn=chosen)


def head_operands(
    model: Decoder, hidden: Float[Tensor, "n c"]
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "vocab c"]]:
    """The two factors of the logits: rounded where `model` is fake-quantised, else as they are."""
    return linear_operands(model.lm_head, hidden)
