"""Whether a finished file of another format gives the answers of the model that it was made from.

The `.pte` has a gate of its own (`flash.lowering.gate`), which also names the stage of the lowering
that went wrong. Here there are two sides only: the float decoder, and the file in the program that
it is meant for.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flash.errors import require


@dataclass(frozen=True, kw_only=True)
class ParityLimits:
    """How far the answers of a file may be from the model's; what is left out is not looked at."""

    max_error: float = math.inf
    """Largest difference of a logit over the largest logit."""
    max_kl: float = math.inf
    """Mean KL divergence from the float decoder [nats]."""
    min_agreement: float = 0.0
    """Share of positions with the same likeliest token."""

    def __post_init__(self) -> None:
        for name in ("max_error", "max_kl"):
            value = getattr(self, name)
            require(value > 0, f"limits.{name}", value, "a positive number")
        share = self.min_agreement
        require(0 <= share <= 1, "limits.min_agreement", share, "a share from 0 to 1")

    @property
    def rule(self) -> str:
        """The limits in words."""
        rules = []
        if self.max_error < math.inf:
            rules.append(f"error <= {self.max_error:g}")
        if self.max_kl < math.inf:
            rules.append(f"kl <= {self.max_kl:g}")
        if self.min_agreement > 0:
            rules.append(f"agreement >= {self.min_agreement:g}")
        return " and ".join(rules) or "no limit"


@dataclass(frozen=True, kw_only=True)
class FormatCheck:
    """A file of one format against the float decoder, on the same text."""

    format: str
    """Name of the format."""
    error: float
    """Largest difference of a logit over the largest logit."""
    kl: float
    """Mean KL divergence from the float decoder [nats]."""
    agreement: float
    """Share of positions whose likeliest token stayed the same."""
    float_loss: float
    """Of the float decoder [nats a token]."""
    artefact_loss: float
    """Of the file [nats a token]."""
    tokens: int
    """How many tokens were predicted."""
    passed: bool
    rule: str
    """The limits that decided."""
    worst_layer: str | None = None
    """The first part whose output differs, where a check that failed could look inside."""

    @property
    def change_pct(self) -> float:
        """Change of perplexity from the float decoder to the file [%]."""
        return 100 * math.expm1(self.artefact_loss - self.float_loss)

    def __str__(self) -> str:
        where = f", first in {self.worst_layer}" if self.worst_layer else ""
        return (
            f"{self.format} {'ok' if self.passed else 'FAIL'}: error {self.error:.1e} kl "
            f"{self.kl:.1e} agreement {self.agreement:.2f} perplexity {self.change_pct:+.2f} % on "
            f"{self.tokens} tokens ({self.rule}){where}"
        )


def error_of(reference: Tensor, other: Tensor) -> float:
    """Largest difference over the largest value of `reference`; NaN where either has one."""
    return float((other - reference).abs().max() / reference.abs().max())


def kl_of(reference: Float[Tensor, "n vocab"], logits: Float[Tensor, "n vocab"]) -> float:
    """Mean KL divergence from the one to the other, accumulated in float64 [nats]."""
    p, q = torch.log_softmax(reference.double(), -1), torch.log_softmax(logits.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def loss_of(logits: Float[Tensor, "n vocab"], text: Int[Tensor, " n"]) -> float:
    """Mean loss of predicting each token of `text` but the first, in float64 [nats a token]."""
    likelihoods = torch.log_softmax(logits[:-1].double(), -1)
    return -float(likelihoods.gather(1, text[1:, None].long()).mean())


def compare(
    name: str,
    reference: Float[Tensor, "n vocab"],
    logits: Float[Tensor, "n vocab"],
    text: Int[Tensor, " n"],
    limits: ParityLimits,
) -> FormatCheck:
    """One side against the other; what is no number passes no limit.

    Args:
        name: Name of the format.
        reference: Logits of the float decoder at every position of `text`.
        logits: Those of the file.
        text: Token ids.
        limits: How far they may be apart.
    """
    error, kl = error_of(reference, logits), kl_of(reference, logits)
    agreement = float((reference.argmax(-1) == logits.argmax(-1)).float().mean())
    passed = error <= limits.max_error and kl <= limits.max_kl and agreement >= limits.min_agreement
    return FormatCheck(
        format=name,
        error=error,
        kl=kl,
        agreement=agreement,
        float_loss=loss_of(reference, text),
        artefact_loss=loss_of(logits, text),
        tokens=len(text) - 1,
        passed=passed,
        rule=limits.rule,
    )


def require_text(text: Int[Tensor, " n"], max_context: int) -> None:
    """See that a text can be checked on.

    Raises:
        InputError: It is too short to predict anything, or longer than the model's context.
    """
    fits = 2 <= len(text) <= max_context
    require(fits, "check.text", len(text), f"2 to {max_context} tokens")
