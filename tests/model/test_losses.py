"""Chunked losses and their gradients against plain ones."""

import pytest
import torch

from flash.model import losses
from flash.model.losses import Operands, TopLogProbs, linear_losses, top_log_probs
from tests.plain_losses import cross_entropy, distillation


def operands(width=24, vocab=50, n=23, dtype=torch.float32, scale=1.0):
    hidden = (scale * torch.randn(n, width)).to(dtype).requires_grad_()
    return Operands(hidden, torch.randn(vocab, width).to(dtype).requires_grad_())


def plain(student, targets, teacher, kd_weight, temperature):
    logits = (student.hidden @ student.weight.T)[None]
    ce = cross_entropy(logits, targets[None]) * len(targets)
    if teacher is None:
        return (1 - kd_weight) * ce, ce, torch.tensor(0.0)
    kd = distillation(logits, (teacher.hidden @ teacher.weight.T)[None], temperature) * len(targets)
    return (1 - kd_weight) * ce + kd_weight * kd, ce, kd


@pytest.mark.parametrize("chunk", [50, 7 * 50, 10**6])
@pytest.mark.parametrize(("kd_weight", "temperature"), [(0.0, 1.0), (0.5, 1.0), (0.7, 2.0), (1, 1)])
def test_values_and_gradients_are_those_of_all_logits_at_once(
    chunk, kd_weight, temperature, monkeypatch
):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    student, targets = operands(), torch.randint(0, 50, (23,))
    teacher = operands(width=32) if kd_weight else None
    expected = plain(student, targets, teacher, kd_weight, temperature)
    wanted = torch.autograd.grad(expected[0] / 23, student)
    found = linear_losses(
        student, targets, teacher=teacher, kd_weight=kd_weight, temperature=temperature
    )
    gradients = torch.autograd.grad(found.total / 23, student)
    torch.testing.assert_close(tuple(found), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_without_gradients_none_are_computed(monkeypatch):
    torch.manual_seed(0)
    student, targets = operands(), torch.randint(0, 50, (23,))
    with torch.no_grad():
        found = linear_losses(student, targets)
    assert not found.total.requires_grad
    torch.testing.assert_close(found.total, plain(student, targets, None, 0.0, 1.0)[0])


def test_a_tied_weight_gets_both_gradients():
    torch.manual_seed(0)
    table, tokens = torch.randn(50, 24, requires_grad=True), torch.randint(0, 50, (23,))

    def loss(value):
        return value(Operands(torch.tanh(table[tokens]), table))

    chunked = loss(lambda student: linear_losses(student, tokens).total)
    whole = loss(lambda student: plain(student, tokens, None, 0.0, 1.0)[0])
    a, b = torch.autograd.grad(chunked, table), torch.autograd.grad(whole, table)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_under_autocast_products_are_bf16_and_gradients_come_in_the_weights_dtype():
    torch.manual_seed(0)
    student, targets = operands(scale=0.2), torch.randint(0, 50, (23,))
    exact = torch.autograd.grad(linear_losses(student, targets).total, student)
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_losses(student, targets).total
    rounded = torch.autograd.grad(total, student)
    assert total.dtype is torch.float32
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype is torch.float32
        assert 0 < (a - b).abs().max() < 0.02 * b.abs().max()


def plain_top(student, teacher, k, temperature):
    """Sum of KL(teacher || student) over the `k` likeliest tokens and the rest as one."""
    p = torch.softmax(student.hidden @ student.weight.T / temperature, dim=-1)
    q = torch.softmax(teacher.hidden @ teacher.weight.T / temperature, dim=-1)
    ids = q.topk(k).indices
    top_p, top_q = p.gather(1, ids), q.gather(1, ids)
    p = torch.cat([top_p, 1 - top_p.sum(1, keepdim=True)], dim=1)
    q = torch.cat([top_q, 1 - top_q.sum(1, keepdim=True)], dim=1)
    return temperature**2 * (q * (q / p).log()).sum()


@pytest.mark.parametrize("chunk", [7 * 50, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_likeliest_tokens_give_the_loss_of_these_and_the_rest_as_one(
    chunk, temperature, monkeypatch
):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    student, targets = operands(scale=0.2), torch.randint(0, 50, (23,))
    teacher = operands(width=32, scale=0.2)
    kd = plain_top(student, teacher, 5, temperature)
    ce = plain(student, targets, None, 0.0, 1.0)[1]
    wanted = torch.autograd.grad(0.3 * ce + 0.7 * kd, student)
    kept = top_log_probs(teacher, 5, temperature)
    found = linear_losses(student, targets, teacher=kept, kd_weight=0.7, temperature=temperature)
    torch.testing.assert_close((found.ce, found.kd), (ce, kd), rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(found.total, student), wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_a_probability_keeps_the_fewest_tokens_that_reach_it_and_at_most_k():
    probabilities = [[0.5, 0.3, 0.15, 0.05], [0.9, 0.05, 0.03, 0.02], [0.28, 0.26, 0.24, 0.22]]
    teacher = Operands(torch.tensor(probabilities).log(), torch.eye(4))
    ids, log_probs = top_log_probs(teacher, 3, top_p=0.79)
    assert ids.tolist() == [[0, 1, 0], [0, 0, 0], [0, 1, 2]]
    wanted = [[0.5, 0.3, 0, 0.2], [0.9, 0, 0, 0.1], [0.28, 0.26, 0.24, 0.22]]
    torch.testing.assert_close(log_probs.exp(), torch.tensor(wanted))


@pytest.mark.parametrize("chunk", [7 * 50, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_positions_with_fewer_tokens_count_as_if_each_stood_alone(chunk, temperature, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    student, targets = operands(scale=0.2), torch.randint(0, 50, (23,))
    teacher = operands(width=32, scale=0.4)
    kept = top_log_probs(teacher, 12, temperature, top_p=0.6)
    counts = kept.log_probs[:, :-1].isfinite().sum(1).tolist()
    assert len(set(counts)) > 3
    kd = sum(
        plain_top(
            Operands(student.hidden[i : i + 1], student.weight),
            Operands(teacher.hidden[i : i + 1], teacher.weight),
            count,
            temperature,
        )
        for i, count in enumerate(counts)
    )
    ce = plain(student, targets, None, 0.0, 1.0)[1]
    wanted = torch.autograd.grad(0.3 * ce + 0.7 * kd, student)
    found = linear_losses(student, targets, teacher=kept, kd_weight=0.7, temperature=temperature)
    torch.testing.assert_close((found.ce, found.kd), (ce, kd), rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(found.total, student), wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_all_tokens_but_one_give_the_whole_divergence_and_fewer_never_more():
    torch.manual_seed(0)
    student, targets = operands(scale=0.3), torch.randint(0, 50, (23,))
    teacher = operands(width=32, scale=0.3)
    whole = linear_losses(student, targets, teacher=teacher, kd_weight=1.0)
    values = []
    for k in (1, 5, 20, 49):
        kept = top_log_probs(teacher, k)
        values.append(linear_losses(student, targets, teacher=kept, kd_weight=1.0))
    kd = [float(each.kd) for each in values]
    assert 0 < kd[0] < kd[1] < kd[2] < kd[3]
    torch.testing.assert_close(values[-1].kd, whole.kd, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(whole.total, student)
    for a, b in zip(torch.autograd.grad(values[-1].total, student), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_student_that_is_sure_of_the_kept_tokens_has_finite_losses():
    student = Operands(torch.eye(4, requires_grad=True), (200 * torch.eye(50, 4)).requires_grad_())
    kept = TopLogProbs(torch.arange(4)[:, None], torch.tensor([[-0.1, -2.3]]).repeat(4, 1))
    found = linear_losses(student, torch.arange(4), teacher=kept, kd_weight=0.5)
    gradients = torch.autograd.grad(found.total, student)
    assert all(bool(value.isfinite().all()) for value in (*found, *gradients))
