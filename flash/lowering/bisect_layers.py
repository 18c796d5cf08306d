"""Which layer makes a gate fail: the same gate on the first layers of the model only."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from flash.interop.gguf import check_gguf, write_gguf
from flash.interop.settings import GgufFormat
from flash.lowering.gate import ParityStage, check_parity
from flash.lowering.parity_metrics import ParityLimits
from flash.lowering.settings import GateSettings, LoweringSettings
from flash.model.checkpoint import build
from flash.model.decoder import Decoder

log = logging.getLogger(__name__)


def locate(
    model: Decoder,
    settings: LoweringSettings,
    text: Int[Tensor, " n"],
    gate: GateSettings,
    stage: ParityStage,
) -> str:
    """The part of `model` with which `stage` begins to fail.

    Each step but those of the first stage lowers a model again.
    """

    def passes(depth: int) -> bool:
        part = first_layers(model, depth)
        return check_parity(part, settings, text, gate, last=stage).passed

    where = _first_failure(model.spec.num_layers, passes)
    return where or "no layer: a program lowered anew passes, so the file is not of these weights"


def locate_gguf(
    model: Decoder,
    text: Int[Tensor, " n"],
    limits: ParityLimits,
    weight_format: GgufFormat,
    folder: Path,
) -> str | None:
    """The part of `model` with which its GGUF file begins to fail; None: a new file passes.

    Each step writes the first layers as a file in `folder` and removes it; llama.cpp itself shows
    nothing between tokens and logits.
    """
    path = folder / ".part.gguf"

    def passes(depth: int) -> bool:
        part = first_layers(model, depth)
        write_gguf(path, part, tokenizer=None, token_ids={}, weight_format=weight_format)
        return check_gguf(path, part, text, limits).passed

    try:
        return _first_failure(model.spec.num_layers, passes)
    finally:
        path.unlink(missing_ok=True)


def _first_failure(num_layers: int, passes: Callable[[int], bool]) -> str | None:
    """Halves the depth; `passes` tells of the first layers of a model whether they are sound."""
    sound, failing = 0, num_layers + 1
    while failing - sound > 1:
        depth = (sound + failing) // 2
        log.info("looking for the layer: the first %d", depth)
        if passes(depth):
            sound = depth
        else:
            failing = depth
    if failing > num_layers:
        return None
    return f"layer {failing - 1}" if failing > 1 else "layer 0, the embedding or the head"


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
