"""Measures of the difference between two sets of logits, and the check of an exported file by them.

`compare` has two sides only: the float decoder, and a finished file in the program that reads it
(a Hugging Face folder, a GGUF file). The `.pte` has a gate of its own (`flash.lowering.gate`). That
uses the same measures and also names the step of the lowering that went wrong.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flash.errors import require


@dataclass(frozen=True, kw_only=True)
class ParityLimits:
    """Largest accepted differences between the logits of a file and those of its model.

    A limit that is left at its default accepts everything.

    Raises:
        InputError: A limit is not positive, or `min_agreement` is not from 0 to 1.
    """

    max_error: float = math.inf
    """Largest difference of a logit, divided by the largest logit."""
    max_kl: float = math.inf
    """Mean KL divergence from the float decoder [nats]."""
    min_agreement: float = 0.0
    """Share of positions with the same likeliest token, from 0 to 1."""

    def __post_init__(self) -> None:
        for name in ("max_error", "max_kl"):
            value = getattr(self, name)
            require(value > 0, f"limits.{name}", value, "a positive number")
        share = self.min_agreement
        require(0 <= share <= 1, "limits.min_agreement", share, "a share from 0 to 1")

    def accept(self, error: float, kl: float, agreement: float) -> bool:
        """Return True if all differences are within the limits, which NaN never is."""
        within = (error <= self.max_error, kl <= self.max_kl, agreement >= self.min_agreement)
        return all(within)

    @property
    def rule(self) -> str:
        """The limits in words."""
        rules = []
        if self.max_error < math.inf:
            rules.append(f"error <= {self.max_error:g}")
        if self.max_kl < math.inf:
            rules.append(f"kl <= {self.max_kl:g}")
        if self.min_agreement > 0:
            rules.append(f"agreement >= {self.min_agreement:.2g}")
        return " and ".join(rules) or "no limit"


@dataclass(frozen=True, kw_only=True)
class FormatCheck:
    """Comparison of a file of one format with the float decoder, on the same text."""

    format: str
    """Name of the format."""
    error: float
    """Largest difference of a logit, divided by the largest logit."""
    kl: float
    """Mean KL divergence from the float decoder [nats]."""
    agreement: float
    """Share of positions whose likeliest token stayed the same."""
    float_loss: float
    """Mean loss of the float decoder [nats a token]."""
    file_loss: float
    """Mean loss of the file [nats a token]."""
    tokens: int
    """Number of predicted tokens."""
    passed: bool
    """True if the file is within its limits."""
    rule: str
    """The limits in words."""
    worst_layer: str | None = None
    """First part of the model whose output differs; None if the check passed or cannot tell."""

    @property
    def change_pct(self) -> float:
        """Change of perplexity from the float decoder to the file [%]."""
        return 100 * math.expm1(self.file_loss - self.float_loss)

    def __str__(self) -> str:
        where = f", first in {self.worst_layer}" if self.worst_layer else ""
        return (
            f"{self.format} {'ok' if self.passed else 'FAIL'}: error {self.error:.1e}, kl "
            f"{self.kl:.1e}, agreement {self.agreement:.2f}, perplexity {self.change_pct:+.2f} % "
            f"on {self.tokens} tokens ({self.rule}){where}"
        )


def max_relative_error(reference: Tensor, other: Tensor) -> float:
    """Largest difference, divided by the largest value of `reference`; NaN if either holds NaN."""
    return float((other - reference).abs().max() / reference.abs().max())


def mean_kl(reference: Float[Tensor, "n vocab"], other: Float[Tensor, "n vocab"]) -> float:
    """Mean of KL(reference || other) over positions, accumulated in float64 [nats]."""
    p, q = torch.log_softmax(reference.double(), -1), torch.log_softmax(other.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def next_token_loss(logits: Float[Tensor, "n vocab"], text: Int[Tensor, " n"]) -> float:
    """Mean loss of predicting each token of `text` but the first, in float64 [nats a token].

    Args:
        logits: Logits at every position of `text`.
        text: Token ids.
    """
    likelihoods = torch.log_softmax(logits[:-1].double(), -1)
    return -float(likelihoods.gather(1, text[1:, None].long()).mean())


def compare(
    name: str,
    reference: Float[Tensor, "n vocab"],
    logits: Float[Tensor, "n vocab"],
    text: Int[Tensor, " n"],
    limits: ParityLimits,
) -> FormatCheck:
    """Compare the logits of a file with those of its model; NaN passes no limit.

    Args:
        name: Name of the format.
        reference: Logits of the float decoder at every position of `text`.
        logits: Logits of the file at the same positions.
        text: Token ids.
        limits: Largest accepted differences.
    """
    error, kl = max_relative_error(reference, logits), mean_kl(reference, logits)
    agreement = float((reference.argmax(-1) == logits.argmax(-1)).float().mean())
    return FormatCheck(
        format=name,
        error=error,
        kl=kl,
        agreement=agreement,
        float_loss=next_token_loss(reference, text),
        file_loss=next_token_loss(logits, text),
        tokens=len(text) - 1,
        passed=limits.accept(error, kl, agreement),
        rule=limits.rule,
    )


def require_text(text: Int[Tensor, " n"], max_context: int) -> None:
    """Check that a text is long enough and fits the model's context.

    Raises:
        InputError: It has fewer than 2 tokens, or more than `max_context`.
    """
    fits = 2 <= len(text) <= max_context
    require(fits, "check.text", len(text), f"2 to {max_context} tokens")
