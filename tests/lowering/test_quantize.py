"""Quantisation of a module, and its agreement with the fake quantisation used in training."""

import dataclasses
import importlib

import pytest
import torch

from flash.lowering.gate import check_parity
from flash.lowering.lower import lower, quantized_module
from flash.lowering.settings import GateSettings
from flash.model.quantization import fake_quantize, head_operands
from tests.lowering.test_modules import last_logits


@torch.no_grad()
@pytest.mark.parametrize(("group_size", "embedding_bits"), [(32, 4), (64, 8)])
def test_a_fake_quantized_decoder_has_the_weights_and_logits_of_the_quantized_module(
    toy, settings, text, group_size, embedding_bits
):
    model = toy("FS", qkv_bias=True, ffn_dim=128)
    exact = model(text[None, :20])[0, -1]
    formats = dataclasses.replace(settings(), group_size=group_size, embedding_bits=embedding_bits)
    module = quantized_module(model, formats)
    fake_quantize(model, group_size, embedding_bits)
    fake = model(text[None, :20])[0, -1]
    rounding = (fake - exact).abs().max()
    _, weight = head_operands(model, exact[None, :64])
    assert torch.equal(weight, module.head.lm_head.weight.dequantize())
    # What is left is the order of sums, which may tip an activation over to the next integer; other
    # groups or bits would be as far from this as from the exact logits.
    assert (last_logits(module, text, [16, 4])[0] - fake).abs().max() < 0.3 * rounding


def test_the_program_of_a_fake_quantized_decoder_agrees_with_it(toy, settings, text):
    model = toy("F-")
    fake_quantize(model)
    # Against this decoder, quantising changes nothing any more; against the float one it does.
    gate = GateSettings(prefill_tokens=24, decode_tokens=8)
    program = lower(model, settings())
    report, before = (
        check_parity(each, settings(), text, gate, program=program) for each in (model, toy("F-"))
    )
    quantized, exported, runtime = report.stages
    assert report.passed, report
    assert quantized.kl < 0.01 * before.stages[0].kl
    assert runtime.kl < 0.1 * before.stages[0].kl


def test_gradients_pass_through_the_rounding_and_the_tied_weight_stays_one(toy):
    model = toy("F-")
    names = [name for name, _ in model.named_parameters()]
    fake_quantize(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.randint(0, 96, (2, 9))
    model(tokens).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_quantizing_by_rows_equals_quantizing_at_once(toy, settings, monkeypatch):
    at_once = quantized_module(toy("F-"), settings())
    module = importlib.import_module("flash.lowering.quantize")
    monkeypatch.setattr(module, "CHUNK_WEIGHTS", 7 * 64)  # 7 rows of most matrices
    by_rows = dict(quantized_module(toy("F-"), settings()).named_parameters())
    for name, parameter in at_once.named_parameters():
        for part in getattr(parameter, "tensor_data_names", ()):
            assert torch.equal(getattr(parameter, part), getattr(by_rows[name], part))
