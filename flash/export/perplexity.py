"""Loss of a .pte on held-out text, computed by its runtime and not by the eager model."""

from pathlib import Path

import torch
from torch import Tensor

from flash.device.base import Device
from flash.export.result import ProgramQuality
from flash.model.decoder import Decoder


@torch.no_grad()
def program_quality(
    model: Decoder, program: Path, device: Device, sequences: list[Tensor]
) -> ProgramQuality:
    """Compute both losses on `sequences` of token ids `(s,)`, each from an empty cache.

    The program decodes one token at a time, as when it generates text.

    Raises:
        DeviceError: A process on the device died or took too long.
    """
    float_sum, pte_sum, tokens, same = 0.0, 0.0, 0, 0
    for sequence in sequences:
        logits = model(sequence[None, :-1])[0].double()
        likelihoods = torch.log_softmax(logits, -1).gather(1, sequence[1:, None])
        float_sum -= float(likelihoods.sum())
        answer = device.score(program, sequence.tolist(), prefill=1)
        pte_sum -= sum(answer["log_likelihoods"])
        same += sum(map(int.__eq__, answer["choices"], logits.argmax(-1).tolist()))
        tokens += len(sequence) - 1
        assert len(answer["choices"]) == len(sequence) - 1
    return ProgramQuality(float_sum / tokens, pte_sum / tokens, tokens, same / tokens)
