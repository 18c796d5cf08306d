"""Loss of a .pte on real text, run through its runtime and not through an eager twin."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash.device.base import Device
from flash.model.decoder import Decoder


@dataclass(frozen=True)
class ProgramQuality:
    """Losses on the same tokens [nats a token].

    Attributes:
        float_loss: Of the float decoder.
        pte_loss: Of the program on the device.
        tokens: How many tokens were predicted.
        agreement: Share of them where both find the same token likeliest.
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
    """Both losses on `sequences` of token ids `(s,)`, each read from an empty cache.

    The program decodes token by token, as it does when it writes text.
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
