"""Cost of rounding, part by part: each rounded part alone takes its place in the float decoder."""

import math
from collections.abc import Mapping
from statistics import median

import torch
from jaxtyping import Int
from torch import Tensor

from flash.arch import linear_parts
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

    Parts are those of `flash.arch.linear_parts`, and the embedding before them.

    Args:
        model: Decoder in float32.
        rounded: The same decoder with rounded weights.
        text: Token ids.
        rotated: True if `rounded` was turned before it was rounded.
    """
    base = turn_decoder(model) if rotated else untie(model)
    reference = base(text[None])[0].float()
    parts = {"embedding": "model.embed_tokens"}
    parts |= {
        name: name if name == "lm_head" else f"model.{name}" for name in linear_parts(model.spec)
    }
    costs = {}
    for name, path in progress(parts.items(), "cost of each part"):
        parent, _, attribute = path.rpartition(".")
        holder, kept = base.get_submodule(parent), base.get_submodule(path)
        setattr(holder, attribute, rounded.get_submodule(path))
        costs[name] = mean_kl(reference, base(text[None])[0].float())
        setattr(holder, attribute, kept)
    return costs


def describe_costs(costs: Mapping[str, float]) -> str:
    """Name the part that stands out, or else say how the costs spread over the depth.

    Args:
        costs: Cost of each part, as of `part_costs`.
    """
    by_place: dict[str, float] = {}
    for name, cost in costs.items():
        place = f"layer {name.split('.')[1]}" if "." in name else name
        by_place[place] = by_place.get(place, 0.0) + cost
    total = sum(by_place.values())
    if not 0 < total < math.inf:
        return "no part alone shows it"
    worst = max(by_place, key=lambda place: by_place[place])
    if by_place[worst] > max(STANDS_OUT * median(by_place.values()), total / 2):
        return f"{worst} alone costs {by_place[worst]:.2g} of {total:.2g} nats"
    layers = [place for place in by_place if place.startswith("layer")]
    third = -(-len(layers) // 3)
    shares = {"embedding": by_place["embedding"]}
    for start in range(0, len(layers), third):
        part = layers[start : start + third]
        name = part[0] if len(part) == 1 else f"{part[0].replace(' ', 's ')} to {part[-1][6:]}"
        shares[name] = sum(by_place[layer] for layer in part)
    shares["head"] = by_place["lm_head"]
    listed = ", ".join(f"{name} {100 * cost / total:.0f} %" for name, cost in shares.items())
    return f"no part stands out: {listed}"
