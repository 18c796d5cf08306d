"""Losses over next-token logits, of which only a part exists at a time.

With a vocabulary of 202,048 the logits of 4,096 positions take 3 GiB and outweigh the model. So
they are computed chunk by chunk, and each chunk's gradients at once, while its logits are there:
the three matrix products of the usual way, no more, and neither logits nor their gradients kept.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**26
"""Logits of a chunk: 256 MiB in float32, of which a distillation holds three."""


class Operands(NamedTuple):
    """The two factors of logits."""

    hidden: Float[Tensor, "n c"]
    weight: Float[Tensor, "vocab c"]


class LossSums(NamedTuple):
    """Sums over positions [nats].

    Attributes:
        total: `(1 - kd_weight) * ce + kd_weight * kd`, and what gradients are of.
        ce: Negative log-likelihood.
        kd: Distillation; 0 without a teacher.
    """

    total: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    kd: Float[Tensor, ""]


def linear_losses(
    student: Operands,
    targets: Int[Tensor, " n"],
    *,
    teacher: Operands | None = None,
    kd_weight: float = 0.0,
    temperature: float = 1.0,
) -> LossSums:
    """Cross-entropy and distillation of the logits `hidden @ weight.T`, never there as a whole.

    Distillation is forward KL(teacher || student), times temperature squared. The paper distils
    from the unpruned backbone without stating the loss; its predecessor MobileLLM-Pro used this.

    Products are in the dtype of autocast where that is on, else of `hidden`; everything after them,
    and the sum of the weight's gradient over chunks, in float32.

    Args:
        student: Gradients flow to both factors.
        targets: Token that follows each position.
        teacher: Of the same vocabulary, any width; no gradients.
        kd_weight: Share of distillation in the total.
        temperature: Softens both in distillation.
    """
    hidden, weight = student
    taught = tuple(part.detach() for part in teacher) if teacher is not None else (None, None)
    grad = torch.is_grad_enabled()
    total, ce, kd = _LinearLosses.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, weight, targets, *taught, kd_weight, temperature, grad
    )
    return LossSums(total, ce, kd)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


class _LinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        taught: Tensor | None,
        taught_weight: Tensor | None,
        kd_weight: float,
        temperature: float,
        grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _product_dtype(hidden)
        ctx.dtypes = hidden.dtype, weight.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            if taught is not None and taught_weight is not None:
                taught, taught_weight = taught.to(dtype), taught_weight.to(dtype)
            sums = hidden.new_zeros(2, dtype=torch.float32)
            rows = max(1, CHUNK_LOGITS // len(weight))
            if grad:
                ctx.grads = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                of_teacher = None
                if taught is not None and taught_weight is not None:
                    of_teacher = (taught[chunk] @ taught_weight.T).float()
                logits = (hidden[chunk] @ weight.T).float()
                parts, gradient = _chunk(
                    logits, targets[chunk], of_teacher, kd_weight, temperature, grad
                )
                sums += parts
                if gradient is not None:
                    gradient = gradient.to(dtype)
                    ctx.grads[0][chunk] = gradient @ weight
                    _add_product(ctx.grads[1], gradient.T, hidden[chunk])
        ce, kd = sums
        ctx.mark_non_differentiable(ce, kd)
        return (1 - kd_weight) * ce + kd_weight * kd, ce, kd

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, total: Tensor, *_: Tensor
    ) -> tuple[Any, ...]:
        # Kept on the side and used up: scaled in place, as the weight's gradient is the largest
        # tensor there is.
        of_hidden, of_weight = ctx.grads
        del ctx.grads
        of_hidden = of_hidden.mul_(total).to(ctx.dtypes[0])
        return of_hidden, of_weight.mul_(total).to(ctx.dtypes[1]), *[None] * 6


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype is to.dtype:
        to.addmm_(a, b)
    else:
        to += a @ b


def _chunk(
    logits: Float[Tensor, "n vocab"],
    targets: Int[Tensor, " n"],
    teacher: Float[Tensor, "n vocab"] | None,
    kd_weight: float,
    temperature: float,
    grad: bool,
) -> tuple[Float[Tensor, " 2"], Float[Tensor, "n vocab"] | None]:
    """Both sums of a chunk, and the gradient of their total by its logits."""
    log_p = torch.log_softmax(logits, dim=-1)
    ce = -log_p.gather(1, targets[:, None]).sum()
    kd = torch.zeros_like(ce)
    if teacher is None:
        gradient = log_p.exp_().mul_(1 - kd_weight) if grad else None
    else:
        soft = log_p if temperature == 1 else torch.log_softmax(logits / temperature, dim=-1)
        log_q = torch.log_softmax(teacher / temperature, dim=-1)
        q = log_q.exp()
        kd = temperature**2 * (_dot(q, log_q) - _dot(q, soft))
        gradient = None
        if grad and temperature == 1:
            gradient = log_p.exp_().sub_(q, alpha=kd_weight)
        elif grad:
            soft = soft.exp_().sub_(q)
            gradient = log_p.exp_().mul_(1 - kd_weight).add_(soft, alpha=kd_weight * temperature)
    if gradient is not None:
        ones = gradient.new_full((len(targets), 1), kd_weight - 1)
        gradient.scatter_add_(1, targets[:, None], ones)
    return torch.stack([ce, kd]), gradient


def _dot(a: Float[Tensor, "n vocab"], b: Float[Tensor, "n vocab"]) -> Float[Tensor, ""]:
    """Sum of the products, without a tensor for them."""
    return torch.bmm(a[:, None], b[:, :, None]).sum()
