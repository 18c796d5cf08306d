"""Loss of a .pte on held-out text, computed by its runtime and not by the eager model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash.device.base import Device
from flash.model.decoder import Decoder


@dataclass(frozen=True)
class ProgramQuality:
    """Losses of the float decoder and of its program on the same tokens.

    Attributes:
        float_loss: Mean loss of the float decoder [nats a token].
        pte_loss: Mean loss of the program on the device [nats a token].
        tokens: Number of predicted tokens.
        agreement: Share of positions with the same likeliest token in both.
    """

    float_loss: float
    pte_loss: float
    tokens: int
    agreement: float

    @property
    def change_pct(self) -> float:
        """Change of perplexity from the float decoder to the program [%]."""
        change = torch.tensor(self.pte_loss - self.float_loss, dtype=torch.float64).expm1()
        return 100 * float(change)


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
