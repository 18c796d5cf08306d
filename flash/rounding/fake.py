"""Fake quantization: training with the rounding of the device in the forward pass.

A fake-quantized decoder keeps its parameters, their names and ties. It turns and rounds them anew
in each forward pass, as `flash.rounding.decoder` does once with `nearest`; gradients pass the
rounding unchanged. `settle` at the end of a training leaves ordinary weights, which `nearest`
rounds as they were rounded in it.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flash.model.decoder import Decoder, RMSNorm
from flash.rounding.grid import SMALLEST_SCALE, limits, mse_scale, unclipped_scale
from flash.rounding.rotation import Turn, replace_small_gains, turns
from flash.rounding.settings import LINEAR_BITS, WeightFormat

NORMS_OF_HEADS = ("q_norm", "k_norm")
"""Names of the norms that keep their gains: they are no part of the residual stream."""


class FakeQuantizedLinear(nn.Linear):
    """Linear layer that computes what a rounded one will, with the parameters of another.

    Args:
        linear: Layer whose parameters it takes.
        turn: Change of its matrix before rounding.
        group_size: Weights that share a scale.
        scales: Scales of all groups `(rows, groups)`; None takes those that clip nothing.
        rounded: False rounds the inputs alone.
    """

    scales: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        turn: Turn,
        group_size: int,
        scales: Tensor | None = None,
        *,
        rounded: bool = True,
    ) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.turn, self.group_size, self.rounded = turn, group_size, rounded
        self.register_buffer("scales", scales, persistent=False)

    def rounded_weight(self) -> Float[Tensor, "o i"]:
        """Compute the weights that the device will have."""
        weight = self.turn(self.weight)
        if not self.rounded:
            return weight
        return _round_through(weight, self.group_size, LINEAR_BITS, self.scales)

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Multiply rounded inputs and weights."""
        bias = None if self.bias is None else self.turn.bias(self.bias)
        return F.linear(round_activations(input), self.rounded_weight(), bias)


class FakeQuantizedEmbedding(nn.Embedding):
    """Embedding that looks up what a rounded one will, with the parameters of another.

    Args:
        embedding: Embedding whose parameters it takes.
        turn: Change of its matrix before rounding.
        weight_format: Bits and groups.
        mse: Take the scales of least squared error, else those that clip nothing.
    """

    def __init__(
        self, embedding: nn.Embedding, turn: Turn, weight_format: WeightFormat, *, mse: bool
    ) -> None:
        super().__init__(1, 1, device="meta")
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.weight = embedding.weight
        self.turn, self.bits, self.mse = turn, weight_format.embedding_bits, mse
        self.group_size = weight_format.group(self.bits, self.embedding_dim)

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows, turn and round them."""
        rows = self.turn(F.embedding(input, self.weight).flatten(0, -2))
        with torch.no_grad():
            groups = rows.unflatten(1, (-1, self.group_size))
            scale = mse_scale(groups, self.bits) if self.mse else unclipped_scale(groups, self.bits)
        rounded = _round_through(rows, self.group_size, self.bits, scale[..., 0])
        return rounded.view(*input.shape, -1)


class _NormWithoutGain(RMSNorm):
    """Norm whose gain the matrices behind it apply."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__(1, norm.eps)
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def fake_quantize(
    model: Decoder,
    weight_format: WeightFormat | None = None,
    *,
    rotate: bool = True,
    scales: Mapping[str, Tensor] | None = None,
) -> None:
    """Make `model` compute in floating point what it will compute after `nearest` rounding.

    Args:
        model: The decoder, changed in place.
        weight_format: Bits and groups; the defaults if None.
        rotate: Turn the weights first, as `flash.rounding.rotation`.
        scales: Scales of linears by name, which then stay the same. A linear without one, a tied
            head, is not rounded: an export rounds it by `gptq`, which loses far less than a
            rounding here could. None rounds all to the nearest with scales that clip nothing.
    """
    weight_format = weight_format or WeightFormat()
    if rotate:
        for name, module in list(model.named_modules()):
            if type(module) is RMSNorm and not name.endswith(NORMS_OF_HEADS):
                _replace(model, name, _NormWithoutGain(module))
    changes = turns(model) if rotate else {}
    for name, module in list(model.named_modules()):  # exact types, not those that are done
        turn = changes.get(name, Turn())
        if type(module) is nn.Linear:
            fixed = scales.get(name) if scales is not None else None
            rounded = scales is None or fixed is not None
            size = weight_format.group_size
            linear = FakeQuantizedLinear(module, turn, size, fixed, rounded=rounded)
            _replace(model, name, linear)
        elif type(module) is nn.Embedding:
            mse = scales is not None
            _replace(model, name, FakeQuantizedEmbedding(module, turn, weight_format, mse=mse))


@torch.no_grad()
def settle(model: Decoder) -> None:
    """Replace the weights whose scales are fixed by the rounded ones, turned back."""
    settled = [
        module
        for module in model.modules()
        if isinstance(module, FakeQuantizedLinear) and module.scales is not None
    ]
    for module in settled:
        module.weight.copy_(module.turn.inverse(module.rounded_weight()))
    replace_small_gains(module.turn for module in settled)


def _replace(model: Decoder, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def head_operands(
    model: Decoder, hidden: Float[Tensor, "n c"]
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "vocab c"]]:
    """Return the two factors of the logits, rounded if `model` is fake-quantized."""
    head = model.lm_head
    if isinstance(head, FakeQuantizedLinear):
        return round_activations(hidden), head.rounded_weight()
    return hidden, head.weight


def round_activations(x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
    """Round to 8 bits with a scale and a zero point for each token, as XNNPACK does at run time."""
    low, high = limits(8)
    with torch.no_grad():
        smallest, largest = x.aminmax(dim=-1, keepdim=True)
        smallest, largest = smallest.clamp_max(0), largest.clamp_min(0)
        scale = ((largest - smallest) / (high - low)).clamp_min(SMALLEST_SCALE)
        zero = (low - (smallest / scale).round()).clamp(low, high)
        rounded = (((x / scale).round() + zero).clamp(low, high) - zero) * scale
    return x + (rounded - x).detach()


def _round_through(
    weight: Float[Tensor, "o i"], group_size: int, bits: int, scales: Tensor | None = None
) -> Float[Tensor, "o i"]:
    """Round to the nearest integers; gradients pass unchanged."""
    with torch.no_grad():
        groups = weight.unflatten(1, (-1, group_size))
        scale = unclipped_scale(groups, bits) if scales is None else scales[..., None]
        rounded = ((groups / scale).round().clamp(*limits(bits)) * scale).flatten(1)
    return weight + (rounded - weight).detach()
