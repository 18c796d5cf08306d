"""Losses over next-token logits, the latter never all at once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**26
"""Most logits that exist at a time: 256 MiB in float32."""


def cross_entropy(
    logits: Float[Tensor, "b s vocab"], targets: Int[Tensor, "b s"]
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood [nats a token], in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def distillation(
    student: Float[Tensor, "b s vocab"],
    teacher: Float[Tensor, "b s vocab"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Forward KL(teacher || student) a token [nats], scaled by temperature squared.

    The paper distils from the unpruned backbone without stating the loss; forward KL on logits is
    what its predecessor MobileLLM-Pro used.
    """
    log_student = torch.log_softmax(student.float() / temperature, dim=-1).flatten(0, 1)
    log_teacher = torch.log_softmax(teacher.float() / temperature, dim=-1).flatten(0, 1)
    kl = F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
    return kl * temperature**2


def over_chunks(
    loss: Callable[..., Tensor], vocab_size: int, *parts: Float[Tensor, "n ..."]
) -> Tensor:
    """Sum of `loss` over chunks of positions small enough for their logits.

    With a vocabulary of 202k the logits of a batch outweigh the model. Where there is more than one
    chunk, its logits are computed again in the backward pass instead of being kept.

    Args:
        loss: Takes one chunk of each of `parts` and returns a sum over its positions.
        vocab_size: Logits a position.
        parts: Tensors with one row a position: hidden states, targets.
    """
    rows = max(1, CHUNK_LOGITS // vocab_size)
    chunks = list(zip(*(part.split(rows) for part in parts), strict=True))
    if len(chunks) == 1:
        return loss(*parts)
    sums = [checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum(dim=0)  # pyright: ignore[reportArgumentType]
