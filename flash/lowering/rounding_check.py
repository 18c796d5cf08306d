"""Comparison of a rounded decoder with the float one: perplexity, KL and choices on held-out text.

It takes seconds and comes before the lowering, which takes minutes. A program is judged once more
by its own perplexity, when its file is written.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from flash.arch import count_parameters
from flash.lowering.loss_change import LossChange
from flash.lowering.settings import GateSettings
from flash.model.decoder import Decoder
from flash.progress import progress

HEAD_POSITIONS = 256
"""Positions whose logits are in memory at once: 200 MB for a vocabulary of 202,048."""


@dataclass(frozen=True, kw_only=True)
class RoundingCheck:
    """Comparison of the rounded decoder with the float one."""

    change: LossChange
    """Losses of both."""
    kl: float
    """Mean KL divergence from the float decoder [nats]."""
    agreement: float
    """Share of positions whose likeliest token stayed the same."""
    passed: bool
    """True if all differences are within the limits."""
    rule: str
    """The limits in words."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        pct = {"perplexity_increase_pct": self.change.perplexity_pct}
        return {**asdict(self), **pct, "perplexity_se_pct": self.change.perplexity_se_pct}

    def __str__(self) -> str:
        change = self.change
        return (
            f"rounding {'ok' if self.passed else 'FAIL'}: perplexity {change} on {change.tokens} "
            f"tokens, kl {self.kl:.2g}, agreement {self.agreement:.2f} ({self.rule})"
        )


@torch.no_grad()
def check_rounding(
    model: Decoder,
    rounded: Decoder,
    texts: Sequence[Int[Tensor, " s"]],
    gate: GateSettings,
) -> RoundingCheck:
    """Compare a rounded decoder with the float decoder that it was made of.

    Args:
        model: Decoder in float32.
        rounded: The same decoder with rounded weights.
        texts: Token ids of held-out sequences, each with 2 tokens or more.
        gate: Limits.
    """
    losses: list[list[Tensor]] = [[], []]
    kl, same = [], []
    for text in progress(texts, "perplexity of the rounded weights"):
        tokens, targets = text[None, :-1].long(), text[1:, None].long()
        hidden = [m.hidden(tokens)[0].split(HEAD_POSITIONS) for m in (model, rounded)]
        for one, other, target in zip(*hidden, targets.split(HEAD_POSITIONS), strict=True):
            before = torch.log_softmax(model.lm_head(one), -1)
            after = torch.log_softmax(rounded.lm_head(other), -1)
            for found, log_probs in zip(losses, (before, after), strict=True):
                found.append(-log_probs.gather(1, target)[:, 0])
            kl.append((before.exp() * (before - after)).sum(-1))
            same.append(before.argmax(-1) == after.argmax(-1))
    change = LossChange.of(*(torch.cat(found) for found in losses))
    mean_kl, agreement = float(torch.cat(kl).mean()), float(torch.cat(same).float().mean())
    most = gate.perplexity_limit(count_parameters(model.spec).total)
    passed = (
        change.perplexity_pct <= most
        and mean_kl <= gate.max_kl_quantized
        and agreement >= gate.min_agreement_quantized
    )
    return RoundingCheck(
        change=change,
        kl=mean_kl,
        agreement=agreement,
        passed=passed,
        rule=f"perplexity <= +{most:g} %, kl <= {gate.max_kl_quantized:g}, "
        f"agreement >= {gate.min_agreement_quantized:g}",
    )
