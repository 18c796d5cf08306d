"""Loss of a .pte on held-out text, computed by its runtime and not by the eager model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flash.device.base import Device
from flash.export.result import ProgramQuality
from flash.lowering.loss_change import LossChange
from flash.model.decoder import Decoder
from flash.progress import progress


@torch.no_grad()
def program_quality(
    model: Decoder, program: Path, device: Device, sequences: Sequence[Tensor]
) -> ProgramQuality:
    """Compute both losses on `sequences` of token ids `(s,)`, each from an empty cache.

    The program decodes one token at a time, as when it generates text.

    Raises:
        DeviceError: A process on the device died or took too long.
    """
    losses: list[list[Tensor]] = [[], []]
    same = 0
    for sequence in progress(sequences, "perplexity of the program"):
        logits = model(sequence[None, :-1])[0].double()
        losses[0].append(-torch.log_softmax(logits, -1).gather(1, sequence[1:, None])[:, 0])
        answer = device.score(program, sequence.tolist(), prefill=1)
        losses[1].append(-torch.tensor(answer["log_likelihoods"], dtype=torch.float64))
        same += sum(map(int.__eq__, answer["choices"], logits.argmax(-1).tolist()))
        assert len(answer["choices"]) == len(sequence) - 1
    change = LossChange.of(*(torch.cat(found) for found in losses))
    return ProgramQuality(change=change, agreement=same / change.tokens)
