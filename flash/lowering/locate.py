"""Which layer makes a gate fail: the same gate on the first layers of the model only."""

import logging

import torch
from jaxtyping import Int
from torch import Tensor

from flash.lowering.gate import GateSettings, Stage, check_parity
from flash.lowering.settings import LoweringSettings
from flash.model import Decoder, build

log = logging.getLogger(__name__)


def locate(
    model: Decoder,
    settings: LoweringSettings,
    text: Int[Tensor, " n"],
    gate: GateSettings,
    stage: Stage,
) -> str:
    """The part of `model` with which `stage` begins to fail, found by halving the depth.

    Each step but those of the first stage lowers a model again.
    """
    passes, fails = 0, model.spec.num_layers + 1  # the sound model's depth, and the failing one's
    while fails - passes > 1:
        depth = (passes + fails) // 2
        log.info("parity gate: trying the first %d layers", depth)
        report = check_parity(first_layers(model, depth), settings, text, gate, last=stage)
        if report.passed:
            passes = depth
        else:
            fails = depth
    if fails > model.spec.num_layers:
        return "no layer: a program lowered anew passes, so the file is not of these weights"
    if fails == 1:
        return "layer 0, the embedding or the head"
    return f"layer {fails - 1}"


@torch.no_grad()
def first_layers(model: Decoder, depth: int) -> Decoder:
    """A decoder of the first `depth` layers, on the memory of `model`."""
    spec = model.spec.replace(layer_types=model.spec.layer_types[:depth])
    kept = {
        name: weight.detach()
        for name, weight in model.state_dict().items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < depth
    }
    return build(spec, kept).eval()
