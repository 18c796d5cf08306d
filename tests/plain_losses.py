"""The losses of all logits at once, to compare with."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


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
    """Forward KL(teacher || student) a token [nats], scaled by temperature squared."""
    log_student = torch.log_softmax(student.float() / temperature, dim=-1).flatten(0, 1)
    log_teacher = torch.log_softmax(teacher.float() / temperature, dim=-1).flatten(0, 1)
    kl = F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
    return kl * temperature**2
