import importlib
import weakref
from dataclasses import replace

import pytest
import torch

from flash.arch import RopeKind, RopeScaling
from flash.errors import InputError
from flash.lowering.lower import lower, quantized_form, write
from flash.lowering.modules import ExportableDecoder, FfnHalf
from flash.lowering.settings import AttentionForm, LoweringSettings
from flash.model.decoder import Decoder


def last_logits(form, text, chunks):
    start = 0
    for length in chunks:
        out = form(text[None, start : start + length], torch.tensor([start]))
        start += length
    return out


@torch.no_grad()
@pytest.mark.parametrize("attention", AttentionForm)
@pytest.mark.parametrize("prefill_last_only", [True, False])
@pytest.mark.parametrize(
    ("pattern", "qk_norm"),
    [("F-", True), ("S-S", True), ("FS", False), ("-FF", True), ("--", False)],
)
def test_form_equals_decoder_at_every_step(
    toy, settings, text, pattern, qk_norm, prefill_last_only, attention
):
    model = toy(pattern, qk_norm)
    formats = replace(settings("fp32"), attention=attention, prefill_last_only=prefill_last_only)
    form = ExportableDecoder(model, formats)
    expected = model(text[None, :20])[0]
    for chunks in ([9, 7, 1, 1, 1, 1], [16, 4], [1] * 20):
        torch.testing.assert_close(
            last_logits(form, text, chunks)[0], expected[19], atol=2e-6, rtol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize(("cache", "limit"), [("fp32", 2e-6), ("int8", 0.02)])
@pytest.mark.parametrize("attention", AttentionForm)
@pytest.mark.parametrize("kv_heads", [1, 4])  # of the two layers the last goes on with one token
def test_query_heads_that_share_a_key_head(toy, settings, text, kv_heads, attention, cache, limit):
    """From the first position on: below `group - 1` the shared way cannot be taken."""
    torch.manual_seed(0)
    model = Decoder(toy("FF").spec.replace(num_kv_heads=kv_heads)).eval()
    expected = model(text[None])[0]
    for chunks in ([1] * 8, [2, 1, 1, 1], [3, 1, 4, 1], [4, 5]):
        form, end = (
            ExportableDecoder(model, replace(settings("fp32", cache), attention=attention)),
            0,
        )
        for length in chunks:
            out = form(text[None, end : end + length], torch.tensor([end]))[0]
            end += length
            error = (out - expected[end - 1]).abs().max() / expected[end - 1].abs().max()
            assert error < limit, (chunks, end)


LLAMA3 = RopeScaling(kind=RopeKind.llama3, factor=8.0, original_context=16)


@torch.no_grad()
def test_form_has_the_biases_and_the_scaled_rotary_embedding(toy, settings, text):
    model = toy("FS", False, qkv_bias=True, rope_scaling=LLAMA3)
    plain = toy("FS", False)
    plain.load_state_dict(model.state_dict(), strict=False)
    expected = model(text[None, :20])[0, -1]
    assert (plain(text[None, :20])[0, -1] - expected).abs().max() > 0.01
    out = last_logits(ExportableDecoder(model, settings("fp32")), text, [9, 7, 1, 1, 1, 1])
    torch.testing.assert_close(out[0], expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_position_zero_starts_a_new_sequence(toy, settings, text):
    form = ExportableDecoder(toy("FS"), settings("fp32"))
    first = last_logits(form, text, [6, 1]).clone()
    last_logits(form, text.flip(0), [16, 16])
    torch.testing.assert_close(last_logits(form, text, [6, 1]), first)


@torch.no_grad()
def test_int8_cache_stays_close_to_float(toy, settings, text):
    model = toy("FS")
    form = ExportableDecoder(model, settings("fp32", "int8"))
    expected = model(text[None, :20])[0, -1]
    error = (last_logits(form, text, [16, 3, 1])[0] - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.02


def test_lowering_leaves_the_decoder_as_it_was(toy, settings):
    model = toy("F-")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    form = quantized_form(model, settings())
    assert not any(parameter.requires_grad for parameter in form.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_form_shares_the_decoders_memory(toy, settings):
    model = toy("F-")
    form = ExportableDecoder(model, settings("fp32"))
    owned = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in form.parameters()} <= owned


def test_float_weights_that_no_one_keeps_are_freed_before_the_passes(toy, settings, monkeypatch):
    models = [toy("F-")]
    weight = weakref.ref(models[0].lm_head.weight)
    left = []
    module = importlib.import_module("flash.lowering.lower")
    monkeypatch.setattr(module, "serialise", lambda *a, **k: left.append(weight()) or b"")
    lower(models.pop(), settings())
    assert left == [None]


def test_quantising_by_rows_equals_quantising_at_once(toy, settings, monkeypatch):
    at_once = quantized_form(toy("F-"), settings())
    module = importlib.import_module("flash.lowering.quantize")
    monkeypatch.setattr(module, "PART", 7 * 64)  # 7 rows of most matrices
    by_rows = dict(quantized_form(toy("F-"), settings()).named_parameters())
    for name, parameter in at_once.named_parameters():
        for part in getattr(parameter, "tensor_data_names", ()):
            assert torch.equal(getattr(parameter, part), getattr(by_rows[name], part))


def test_context_beyond_the_architecture_is_an_error(toy):
    with pytest.raises(InputError, match=r"lowering.max_context=9000: expected at most"):
        lower(toy("F"), LoweringSettings(max_context=9000))


def test_settings_name_the_bad_value():
    with pytest.raises(InputError, match="^prefill_chunk=100: expected"):
        LoweringSettings(max_context=64, prefill_chunk=100)
    with pytest.raises(InputError, match="^max_context=0: expected"):
        LoweringSettings(max_context=0)
    assert LoweringSettings(max_context=4096).prefill_chunk == 256
    sdpa = LoweringSettings(max_context=4096, attention=AttentionForm.sdpa)
    assert sdpa.prefill_chunk == 1024
    assert LoweringSettings(max_context=64).prefill_chunk == 64


def test_write_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "new" / "model.pte"
    write(path, b"old")
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["model.pte"]


@torch.no_grad()
@pytest.mark.parametrize("prefill_last_only", [True, False])
@pytest.mark.parametrize(("pattern", "whole"), [("F-F--", 2), ("----", 0), ("FF", 1)])
def test_what_nothing_reads_is_left_out_of_a_prompt(
    toy, settings, text, pattern, whole, prefill_last_only
):
    """From the last layer with attention on, FFNs see the last token only."""
    form = ExportableDecoder(
        toy(pattern), replace(settings("fp32"), prefill_last_only=prefill_last_only)
    )
    lengths = []
    for half in form.halves:
        if isinstance(half, FfnHalf):
            half.register_forward_hook(lambda *args: lengths.append(args[1][0].shape[1]))
    form(text[None, :12], torch.tensor([0]))
    read_by_others = whole if prefill_last_only else len(pattern)
    assert lengths == [12] * read_by_others + [1] * (len(pattern) - read_by_others)
