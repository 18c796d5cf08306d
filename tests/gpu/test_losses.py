"""Our losses in chunks, on a GPU, against PyTorch's of all logits and Liger's fused kernels."""

import pytest
import torch
import torch.nn.functional as F

from flash.model import losses
from flash.model.losses import Operands, linear_losses, top_log_probs
from tests import plain_losses

WIDTH, TOKENS, VOCAB = 96, 200, 1000


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Chunks of 64 positions, so that there are several, the last of them shorter."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 64 * VOCAB)


@pytest.fixture
def operands(device):
    torch.manual_seed(0)

    def make():
        hidden = torch.randn(TOKENS, WIDTH, device=device)
        return Operands(hidden, 0.2 * torch.randn(VOCAB, WIDTH, device=device))

    student, teacher = make(), make()
    for part in student:
        part.requires_grad_()
    return student, teacher, torch.randint(VOCAB, (TOKENS,), device=device)


def gradients(loss, student):
    return loss, *torch.autograd.grad(loss, student)


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-4), (True, 2e-2)])
@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
def test_chunks_equal_all_logits_at_once(device, operands, kd_weight, half, tolerance):
    student, teacher, targets = operands
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        total = linear_losses(
            student, targets, teacher=teacher if kd_weight else None, kd_weight=kd_weight
        ).total
    logits = F.linear(*student)[None]
    plain = (1 - kd_weight) * plain_losses.cross_entropy(logits, targets[None])
    if kd_weight:
        plain = plain + kd_weight * plain_losses.distillation(logits, F.linear(*teacher)[None])
    assert_same(gradients(total / TOKENS, student), gradients(plain, student), tolerance)


def test_stored_top_tokens_give_the_same_loss_on_a_gpu_as_on_a_cpu(device, operands):
    student, teacher, targets = operands
    found = []
    for place in (device, torch.device("cpu")):
        own = Operands(*(part.detach().to(place).requires_grad_() for part in student))
        top = top_log_probs(Operands(*(part.to(place) for part in teacher)), 16)
        total = linear_losses(own, targets.to(place), teacher=top, kd_weight=0.5).total
        found.append([part.cpu() for part in gradients(total, own)])
    assert_same(*found, 1e-4)


def test_ligers_cross_entropy_is_ours(device, operands):
    if device.type != "cuda":
        pytest.skip("Liger's kernels need a GPU")
    liger = pytest.importorskip("liger_kernel.transformers")
    student, _, targets = operands
    fused = liger.LigerFusedLinearCrossEntropyLoss()(student.weight, student.hidden, targets)
    ours = linear_losses(student, targets).total / TOKENS
    assert_same(gradients(ours, student), gradients(fused, student), 2e-3)
