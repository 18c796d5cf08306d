"""Cost of rounding, part by part: each rounded part alone takes its place in the float decoder."""

from collections.abc import Mapping
from statistics import median

import torch
from jaxtyping import Int
from torch import Tensor

from flash.lowering.parity_metrics import mean_kl
from flash.model.decoder import Decoder
from flash.progress import progress
from flash.rounding.decoder import turn_decoder, untie

STANDS_OUT = 4.0
"""A part stands out if it costs this many times the median of all parts, and half of the sum."""


@torch.no_grad()
def part_costs(
    model: Decoder, rounded: Decoder, text: Int[Tensor, " n"], *, rotated: bool
) -> dict[str, float]:
    """Mean KL divergence from the float decoder with only one part rounded, by part [nats].

    Args:
        model: Decoder in float32.
        rounded: The same decoder with rounded weights.
        text: Token ids.
        rotated: True if `rounded` was turned before it was rounded.
    """
    base = turn_decoder(model) if rotated else untie(model)
    reference = base(text[None])[0].float()

    def cost() -> float:
        return mean_kl(reference, base(text[None])[0].float())

    costs = {}
    embedding, base.model.embed_tokens = base.model.embed_tokens, rounded.model.embed_tokens
    costs["embedding"] = cost()
    base.model.embed_tokens = embedding
    for i in progress(range(model.spec.num_layers), "cost of each layer"):
        layer, base.model.layers[i] = base.model.layers[i], rounded.model.layers[i]
        costs[f"layer {i}"] = cost()
        base.model.layers[i] = layer
    base.lm_head = rounded.lm_head
    costs["head"] = cost()
    return costs


def describe_costs(costs: Mapping[str, float]) -> str:
    """Name the part that stands out, or else say how the costs spread over the depth.

    Args:
        costs: Cost of each part, as of `part_costs`.
    """
    total = sum(costs.values())
    worst = max(costs, key=lambda name: costs[name])
    if costs[worst] > max(STANDS_OUT * median(costs.values()), total / 2):
        return f"{worst} alone costs {costs[worst]:.2g} of {total:.2g} nats"
    layers = [name for name in costs if name.startswith("layer")]
    third = -(-len(layers) // 3)
    shares = {"embedding": costs["embedding"]}
    for start in range(0, len(layers), third):
        part = layers[start : start + third]
        name = part[0] if len(part) == 1 else f"{part[0].replace(' ', 's ')} to {part[-1][6:]}"
        shares[name] = sum(costs[layer] for layer in part)
    shares["head"] = costs["head"]
    listed = ", ".join(f"{name} {100 * cost / total:.0f} %" for name, cost in shares.items())
    return f"no part stands out: {listed}"
