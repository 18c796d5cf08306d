"""Finding the layer that makes a GGUF file's gate fail: the same gate on the first layers only."""

from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from flash.interop.gguf import check_gguf, write_gguf
from flash.interop.settings import GgufFormat
from flash.lowering.bisect_layers import first_failure, first_layers
from flash.lowering.parity_metrics import ParityLimits
from flash.model.decoder import Decoder


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
        return first_failure(model.spec.num_layers, passes)
    finally:
        path.unlink(missing_ok=True)
