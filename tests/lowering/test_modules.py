"""Exportable modules in eager mode against the decoder that they share their weights with."""

from dataclasses import replace

import pytest
import torch

from flash.arch import RopeKind, RopeScaling
from flash.lowering.modules import ExportableDecoder, FfnHalf
from flash.lowering.settings import AttentionForm
from flash.model.decoder import Decoder


def last_logits(module, text, chunks):
    start = 0
    for length in chunks:
        out = module(text[None, start : start + length], torch.tensor([start]))
        start += length
    return out


@torch.no_grad()
@pytest.mark.parametrize("attention", AttentionForm)
@pytest.mark.parametrize("prefill_last_only", [True, False])
@pytest.mark.parametrize(
    ("pattern", "qk_norm"),
    [("F-", True), ("S-S", True), ("FS", False), ("-FF", True), ("--", False)],
)
def test_module_equals_decoder_at_every_step(
    toy, settings, text, pattern, qk_norm, prefill_last_only, attention
):
    model = toy(pattern, qk_norm)
    formats = replace(settings("fp32"), attention=attention, prefill_last_only=prefill_last_only)
    module = ExportableDecoder(model, formats)
    expected = model(text[None, :20])[0]
    for chunks in ([9, 7, 1, 1, 1, 1], [16, 4], [1] * 20):
        torch.testing.assert_close(
            last_logits(module, text, chunks)[0], expected[19], atol=2e-6, rtol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize(("cache", "limit"), [("fp32", 2e-6), ("bf16", 0.01), ("int8", 0.02)])
@pytest.mark.parametrize("attention", AttentionForm)
@pytest.mark.parametrize("kv_heads", [1, 4])  # of the two layers the last goes on with one token
def test_one_key_head_for_all_and_for_each(toy, settings, text, kv_heads, attention, cache, limit):
    torch.manual_seed(0)
    model = Decoder(toy("FF").spec.replace(num_kv_heads=kv_heads)).eval()
    expected = model(text[None])[0]
    for chunks in ([1] * 8, [2, 1, 1, 1], [3, 1, 4, 1], [4, 5]):
        lowering = replace(settings("fp32", cache), attention=attention)
        module, end = ExportableDecoder(model, lowering), 0
        for length in chunks:
            out = module(text[None, end : end + length], torch.tensor([end]))[0]
            end += length
            error = (out - expected[end - 1]).abs().max() / expected[end - 1].abs().max()
            assert error < limit, (chunks, end)


LLAMA3 = RopeScaling(kind=RopeKind.llama3, factor=8.0, original_context=16)


@torch.no_grad()
def test_module_has_the_biases_and_the_scaled_rotary_embedding(toy, settings, text):
    model = toy("FS", False, qkv_bias=True, rope_scaling=LLAMA3)
    plain = toy("FS", False)
    plain.load_state_dict(model.state_dict(), strict=False)
    expected = model(text[None, :20])[0, -1]
    assert (plain(text[None, :20])[0, -1] - expected).abs().max() > 0.01
    out = last_logits(ExportableDecoder(model, settings("fp32")), text, [9, 7, 1, 1, 1, 1])
    torch.testing.assert_close(out[0], expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_position_zero_starts_a_new_sequence(toy, settings, text):
    module = ExportableDecoder(toy("FS"), settings("fp32"))
    first = last_logits(module, text, [6, 1]).clone()
    last_logits(module, text.flip(0), [16, 16])
    torch.testing.assert_close(last_logits(module, text, [6, 1]), first)


@torch.no_grad()
def test_int8_cache_stays_close_to_float(toy, settings, text):
    model = toy("FS")
    module = ExportableDecoder(model, settings("fp32", "int8"))
    expected = model(text[None, :20])[0, -1]
    error = (last_logits(module, text, [16, 3, 1])[0] - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.02


def test_module_shares_the_decoders_memory(toy, settings):
    model = toy("F-")
    module = ExportableDecoder(model, settings("fp32"))
    owned = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in module.parameters()} <= owned


@torch.no_grad()
@pytest.mark.parametrize("prefill_last_only", [True, False])
@pytest.mark.parametrize(("pattern", "whole"), [("F-F--", 2), ("----", 0), ("FF", 1)])
def test_what_nothing_reads_is_left_out_of_a_prompt(
    toy, settings, text, pattern, whole, prefill_last_only
):
    """FFNs from the last layer with attention on see the last token only."""
    module = ExportableDecoder(
        toy(pattern), replace(settings("fp32"), prefill_last_only=prefill_last_only)
    )
    lengths = []
    for half in module.halves:
        if isinstance(half, FfnHalf):
            half.register_forward_hook(lambda *args: lengths.append(args[1][0].shape[1]))
    module(text[None, :12], torch.tensor([0]))
    read_by_others = whole if prefill_last_only else len(pattern)
    assert lengths == [12] * read_by_others + [1] * (len(pattern) - read_by_others)
