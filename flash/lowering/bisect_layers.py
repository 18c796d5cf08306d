"""Search for the layer that makes a check fail, by running the check on the first layers only.

The check may be the parity gate of a program (`locate_failure`) or that of another file format
(`flash.interop.gguf.locate_gguf_failure`). Either way the number of layers is bisected, so a model
of n layers takes about log2(n) checks.
"""

import logging
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from flash.lowering.gate import ParityStage, check_parity
from flash.lowering.settings import GateSettings, LoweringSettings
from flash.model.decoder import Decoder

log = logging.getLogger(__name__)


def locate_failure(
    model: Decoder,
    lowering: LoweringSettings,
    text: Int[Tensor, " n"],
    gate: GateSettings,
    stage: ParityStage,
) -> str:
    """Name the part of `model` with which a stage of the parity gate begins to fail.

    For a stage after the first, each step of the search lowers a model again.

    Args:
        model: The decoder whose gate failed, rounded as it was lowered.
        lowering: Formats and lengths of the program.
        text: Token ids that the gate runs on.
        gate: Lengths and limits of the gate.
        stage: The stage that failed.
    """

    def passes(part: Decoder) -> bool:
        return check_parity(part, lowering, text, gate, last_stage=stage).passed

    failing = first_failing_layer(model, passes)
    return failing or "no layer: a program lowered anew passes, so the file is not of these weights"


def first_failing_layer(model: Decoder, passes: Callable[[Decoder], bool]) -> str | None:
    """Bisect the number of layers of `model` until `passes` fails with one layer more.

    Args:
        model: The decoder.
        passes: A check that gets a decoder of the first layers of `model`.

    Returns:
        The name of the failing layer or end of the model; None if the whole model passes.
    """
    num_layers = model.spec.num_layers
    passing, failing = 0, num_layers + 1
    while failing - passing > 1:
        depth = (passing + failing) // 2
        log.info("looking for the layer: the first %d", depth)
        if passes(first_layers(model, depth)):
            passing = depth
        else:
            failing = depth
    if failing > num_layers:
        return None
    return f"layer {failing - 1}" if failing > 1 else "layer 0, the embedding or the head"


@torch.no_grad()
def first_layers(model: Decoder, depth: int) -> Decoder:
    """Build a decoder of the first `depth` layers on the weights of `model`, rounded or not."""
    spec = model.spec.replace(layer_types=model.spec.layer_types[:depth])
    with torch.device("meta"):
        part = Decoder(spec.replace(tie_embeddings=False))
    kept = {
        name: weight.detach()
        for name, weight in model.state_dict().items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < depth
    }
    part.load_state_dict(kept, assign=True)
    part.spec = spec
    return part.requires_grad_(False).eval()
