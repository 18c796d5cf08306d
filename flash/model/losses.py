"""Losses over next-token logits that are computed one chunk at a time.

With a vocabulary of 202,048, the logits of 4,096 positions take 3 GiB, more than the model. Here
the gradients of each chunk are computed together with its loss, so that neither logits nor their
gradients are kept. This takes the same three matrix products as an ordinary loss.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**26
"""Logits per chunk: 256 MiB in float32. Distillation holds two tensors of this size."""

SLICE_LOGITS = 2**20
"""Logits that a CPU makes probabilities of at a time, so that they stay in its cache."""


class Operands(NamedTuple):
    """The two factors of the logits `hidden @ weight.T`."""

    hidden: Float[Tensor, "n c"]
    weight: Float[Tensor, "vocab c"]


class TopLogProbs(NamedTuple):
    """The likeliest tokens of a teacher at each position, after softening by the temperature.

    Attributes:
        ids: Token ids.
        log_probs: Log-probability of each token, and last that of all other tokens together [nats].
            Positions with fewer than `k` tokens have -inf in the places that are left, whose id
            there is the first one's again.
    """

    ids: Int[Tensor, "n k"]
    log_probs: Float[Tensor, "n k+1"]


class LossSums(NamedTuple):
    """Sums of losses over positions [nats].

    Attributes:
        total: `(1 - kd_weight) * ce + kd_weight * kd`, the only sum with a gradient.
        ce: Negative log-likelihood of the targets.
        kd: Distillation loss; 0 without a teacher.
    """

    total: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    kd: Float[Tensor, ""]


def linear_losses(
    student: Operands,
    targets: Int[Tensor, " n"],
    *,
    teacher: Operands | TopLogProbs | None = None,
    kd_weight: float = 0.0,
    temperature: float = 1.0,
) -> LossSums:
    """Cross-entropy and distillation loss of the logits `hidden @ weight.T`, chunk by chunk.

    The distillation loss is the forward KL(teacher || student) times the temperature squared. The
    paper distills from the unpruned backbone but does not state the loss; this is the loss of its
    predecessor MobileLLM-Pro.

    With `TopLogProbs` it is the KL between distributions over the teacher's likeliest tokens and
    one more outcome, "any other token". This is at most the whole KL, and equal to it if the
    teacher keeps all tokens but one. It leaves the student free to divide the rest among the other
    tokens. If the kept probabilities were scaled to a sum of 1 instead, the student would learn to
    be more certain than its teacher.

    Matrix products are in the dtype of autocast if it is on, else in that of `hidden`. All else,
    including the sum of the weight's gradient over chunks, is in float32.

    Args:
        student: Factors of the student's logits; gradients flow to both.
        targets: Token that follows each position.
        teacher: Factors of the teacher's logits, of any width but over the same vocabulary, or its
            stored `top_log_probs`; gets no gradients. None for cross-entropy alone.
        kd_weight: Share of the distillation loss in the total, from 0 to 1.
        temperature: Divisor of both models' logits in the distillation loss.
    """
    hidden, weight = student
    grad = torch.is_grad_enabled()
    total, ce, kd = _LinearLosses.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, weight, targets, teacher, kd_weight, temperature, grad
    )
    return LossSums(total, ce, kd)


@torch.no_grad()
def top_log_probs(
    teacher: Operands, k: int, temperature: float = 1.0, top_p: float | None = None
) -> TopLogProbs:
    """The likeliest tokens at each position and their log-probabilities, chunk by chunk.

    Args:
        teacher: Factors of the teacher's logits.
        k: Most tokens, from 1 to one less than the vocabulary.
        temperature: Divisor of the logits, the same as in the distillation loss later.
        top_p: Probability at which a position has enough tokens. None: each has `k`.
    """
    hidden, weight = _as_product(*teacher)
    rows = max(1, CHUNK_LOGITS // len(weight))
    parts: list[TopLogProbs] = []
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in hidden.split(rows):
            logits = (chunk @ weight.T).float()
            if temperature != 1.0:
                logits /= temperature
            top, ids = logits.topk(k, dim=-1)
            # The tokens that remain also give the normalization: one pass over all logits less.
            rest = logits.scatter_(1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
            total = torch.logaddexp(rest, top.logsumexp(dim=-1, keepdim=True))
            top, rest = top - total, rest - total
            if top_p is not None:
                # The probability of the tokens before each; sums only grow, so none is kept later.
                enough = F.pad(top.exp().cumsum(-1)[:, :-1], (1, 0)) >= top_p
                dropped = top.masked_fill(~enough, -torch.inf).logsumexp(dim=-1, keepdim=True)
                rest = torch.logaddexp(rest, dropped)
                top = top.masked_fill(enough, -torch.inf)
                ids = torch.where(enough, ids[:, :1], ids)
            parts.append(TopLogProbs(ids, torch.cat([top, rest], dim=-1)))
    return TopLogProbs(*map(torch.cat, zip(*parts, strict=True)))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _as_product(hidden: Tensor, weight: Tensor) -> Operands:
    dtype = _product_dtype(hidden)
    return Operands(hidden.to(dtype), weight.to(dtype))


class _LinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: Operands | TopLogProbs | None,
        kd_weight: float,
        temperature: float,
        grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = _as_product(hidden, weight)
        if isinstance(teacher, Operands):
            teacher = _as_product(*teacher)
        with torch.autocast(hidden.device.type, enabled=False):
            sums = hidden.new_zeros(2, dtype=torch.float32)
            rows = max(1, CHUNK_LOGITS // len(weight))
            if grad:
                ctx.grads = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                logits = hidden[chunk] @ weight.T
                taught = _teacher_chunk(teacher, chunk)
                sums += _chunk(logits, targets[chunk], taught, kd_weight, temperature, grad)
                if grad:  # `logits` now holds their gradient
                    torch.mm(logits, weight, out=ctx.grads[0][chunk])
                    _add_product(ctx.grads[1], logits.T, hidden[chunk])
        ce, kd = sums
        ctx.mark_non_differentiable(ce, kd)
        return (1 - kd_weight) * ce + kd_weight * kd, ce, kd

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, total: Tensor, *_: Tensor
    ) -> tuple[Any, ...]:
        # Scaled in place, as the gradient of the weight is the largest tensor of all. The gradients
        # are not saved tensors of autograd, so the backward pass can run only once.
        of_hidden, of_weight = ctx.grads
        del ctx.grads
        of_hidden = of_hidden.mul_(total).to(ctx.dtypes[0])
        return of_hidden, of_weight.mul_(total).to(ctx.dtypes[1]), *[None] * 5


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype is to.dtype:
        to.addmm_(a, b)
    else:
        to += a @ b


def _teacher_chunk(
    teacher: Operands | TopLogProbs | None, chunk: slice
) -> Float[Tensor, "n vocab"] | TopLogProbs | None:
    """The teacher's logits of a chunk, or its stored likeliest tokens there."""
    match teacher:
        case Operands():
            return teacher.hidden[chunk] @ teacher.weight.T
        case TopLogProbs():
            return TopLogProbs(teacher.ids[chunk], teacher.log_probs[chunk])
    return None


def _chunk(
    logits: Float[Tensor, "n vocab"],
    targets: Int[Tensor, " n"],
    teacher: Float[Tensor, "n vocab"] | TopLogProbs | None,
    kd_weight: float,
    temperature: float,
    grad: bool,
) -> Float[Tensor, " 2"]:
    """Sums `(ce, kd)` of a chunk; with `grad`, `logits` become the gradient of their total."""
    on_cpu = logits.device.type == "cpu"
    rows = max(1, SLICE_LOGITS // logits.shape[1]) if on_cpu else len(logits)
    sums = logits.new_zeros(2, dtype=torch.float32)
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        match teacher:
            case TopLogProbs():
                taught = TopLogProbs(teacher.ids[part], teacher.log_probs[part])
            case Tensor():
                taught = teacher[part].float()
            case _:
                taught = None
        losses, gradient = _slice(
            logits[part].float(), targets[part], taught, kd_weight, temperature, grad
        )
        sums += losses
        if gradient is not None:
            logits[part] = gradient
    return sums


def _slice(
    logits: Float[Tensor, "n vocab"],
    targets: Int[Tensor, " n"],
    teacher: Float[Tensor, "n vocab"] | TopLogProbs | None,
    kd_weight: float,
    temperature: float,
    grad: bool,
) -> tuple[Float[Tensor, " 2"], Float[Tensor, "n vocab"] | None]:
    """Sums `(ce, kd)` of some positions, and the gradient of their total by the logits."""
    log_p = torch.log_softmax(logits, dim=-1)
    ce = -log_p.gather(1, targets[:, None]).sum()
    kd = torch.zeros_like(ce)
    if teacher is None:
        gradient = log_p.exp_() if grad else None
        if gradient is not None and kd_weight > 0:
            gradient.mul_(1 - kd_weight)
    else:
        soft = log_p if temperature == 1 else torch.log_softmax(logits / temperature, dim=-1)
        if isinstance(teacher, TopLogProbs):
            kd, q = _top_divergence(teacher, soft)
        else:
            log_q = torch.log_softmax(teacher / temperature, dim=-1)
            q = log_q.exp()
            kd = _dot(q, log_q) - _dot(q, soft)
        kd = temperature**2 * kd
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


def _top_divergence(
    teacher: TopLogProbs, log_p: Float[Tensor, "n vocab"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "n vocab"]]:
    """KL(teacher || student) over the kept tokens and all others as one, and `q` for its gradient.

    The gradient by the student's logits is `p - q`, as for the whole KL, where `q` has the
    teacher's probabilities for the kept tokens and divides the rest among the others as the student
    does.
    """
    ids = teacher.ids.long()
    # Stored log-probabilities are rounded; this makes them sum to 1 again.
    log_q = torch.log_softmax(teacher.log_probs.float(), dim=-1)
    top_q, rest_q = log_q[:, :-1].exp(), log_q[:, -1:].exp()
    rest = log_p.exp().scatter_(1, ids, 0.0)
    rest_p = rest.sum(-1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)
    # Places without a token have a `top_q` of 0 and the id of another: they add 0 everywhere.
    kd = -torch.special.entr(top_q).sum() - (top_q * log_p.gather(1, ids)).sum()
    kd = kd + (rest_q * (log_q[:, -1:] - rest_p.log())).sum()
    return kd, rest.mul_(rest_q / rest_p).scatter_add_(1, ids, top_q)


def _dot(a: Float[Tensor, "n vocab"], b: Float[Tensor, "n vocab"]) -> Float[Tensor, ""]:
    """Sum of the elementwise products, without a tensor that holds them."""
    return torch.bmm(a[:, None], b[:, :, None]).sum()
