"""KV caches against the decoder: every format, sliding windows across ring wraps, long texts."""

from dataclasses import replace

import pytest
import torch

from flash.arch import CacheFormat, Quantization
from flash.lowering.gate import check_parity, load_runtime_step
from flash.lowering.lower import export_module, lower
from flash.lowering.modules import ExportableDecoder
from flash.lowering.parity_metrics import mean_kl
from flash.lowering.settings import AttentionForm, GateSettings, LoweringSettings, SlidingForm

WINDOW = 10  # of the toy model
CACHES = {"fp32": 2e-6, "bf16": 0.01, "int8": 0.02}
"""Largest relative error of a logit for each format."""
CHUNKS = [
    [4, *[1] * 40],  # a prompt shorter than the window, then decoding past several wraps
    [16, 16, *[1] * 30],  # longer than the window, several calls
    [16, 3, 16, 15, 1, 2, *[1] * 8],  # starts anywhere in the ring, lengths of no multiple
    [3, 16, 1, 1, 16, 1],
    [10, 11, 9],
]


def settings(sliding, chunk=16, quantization="fp32", cache="fp32", prefill_last_only=True):
    return LoweringSettings(
        prefill_last_only=prefill_last_only,
        quantization=Quantization[quantization],
        cache=CacheFormat[cache],
        sliding=SlidingForm[sliding],
        max_context=64,
        prefill_chunk=chunk,
    )


def largest_error(step, text, expected, chunks):
    """Largest relative error over the last logits of each call."""
    start, errors = 0, []
    for length in chunks:
        out = step(text[None, start : start + length], torch.tensor([start]))[0]
        start += length
        errors.append((out - expected[start - 1]).abs().max() / expected[start - 1].abs().max())
    return float(max(errors))


def test_slots_of_each_form():
    stock = settings("stock")
    assert stock.slots(WINDOW) == 32
    assert stock.slots(20) == 40
    assert stock.slots(40) == stock.slots(None) == 64
    ring = settings("ring")
    assert [ring.slots(window) for window in (WINDOW, 100, None)] == [10, 64, 64]


@pytest.mark.parametrize("sliding", ["stock", "ring"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("pattern", ["FSF", "F-S", "--", "SS-"])
def test_cache_bytes_are_those_of_the_buffers_of_the_program(toy, sliding, cache, pattern):
    lowering = settings(sliding, cache=cache)
    model = toy(pattern)
    program = export_module(ExportableDecoder(model, lowering), lowering)
    names = program.graph_signature.inputs_to_buffers
    writes = [node for node in program.graph.nodes if "update_cache" in str(node.target)]
    written = {names[node.args[1].name] for node in writes}
    allocated = sum(program.constants[name].nbytes for name in written)
    assert lowering.cache_bytes(model.spec) == allocated
    assert (allocated == 0) == (pattern == "--")


@torch.no_grad()
@pytest.mark.parametrize(
    ("sliding", "attention"), [("stock", "matmul"), ("stock", "sdpa"), ("ring", "sdpa")]
)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("prefill_last_only", [True, False])
@pytest.mark.parametrize("window", [WINDOW, 40], ids=["wraps", "context"])
def test_sliding_form_equals_decoder(
    toy, text, sliding, attention, cache, prefill_last_only, window
):
    model = type(plain := toy("FS"))(plain.spec.replace(sliding_window=window)).eval()
    model.load_state_dict(plain.state_dict())
    expected = model(text[None])[0]
    limit = CACHES[cache]
    formats = replace(
        settings(sliding, cache=cache, prefill_last_only=prefill_last_only),
        attention=AttentionForm[attention],
    )
    for chunks in CHUNKS:
        assert largest_error(ExportableDecoder(model, formats), text, expected, chunks) < limit
    short = ExportableDecoder(model, replace(formats, prefill_chunk=4))
    assert largest_error(short, text, expected, [4, 4, 3, 4, *[1] * 20, 2, 4]) < limit


@torch.no_grad()
@pytest.mark.parametrize(
    ("cache", "attention"), [("fp32", "matmul"), ("bf16", "matmul"), ("int8", "sdpa")]
)
def test_full_attention_program_equals_decoder_up_to_the_last_slot(toy, text, cache, attention):
    model = toy("FF")  # the last one goes on with one token
    expected = model(text[None])[0]
    step = load_runtime_step(
        lower(model, replace(settings("stock", cache=cache), attention=AttentionForm[attention]))
    )
    for chunks in ([16, 16, 16, 15, 1], [*[1] * 5, 3, 16, 16, 16, *[1] * 6, 2], [16, 16, 16, 16]):
        assert largest_error(step, text, expected, chunks) < max(CACHES[cache], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["FF", "SS"])
def test_bf16_cache_hardly_moves_the_distribution(toy, text, pattern):
    model = toy(pattern)
    module, rows = ExportableDecoder(model, settings("stock", cache="bf16")), []
    for position, token in enumerate(text):
        rows.append(module(token.view(1, 1), torch.tensor([position])))
    assert 0 < mean_kl(model(text[None])[0], torch.cat(rows)) < 1e-5


@torch.no_grad()
def test_window_beyond_the_context_needs_no_ring(toy, text):
    model = toy("S")
    wide = type(model)(model.spec.replace(sliding_window=100)).eval()
    wide.load_state_dict(model.state_dict())
    module = ExportableDecoder(wide, settings("ring"))
    assert largest_error(module, text, wide(text[None])[0], [16, 16, 16, 15, 1]) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("sliding", ["stock", "ring"])
@pytest.mark.parametrize(("cache", "limit"), [("fp32", 1e-4), ("bf16", CACHES["bf16"])])
def test_sliding_program_equals_decoder(toy, text, sliding, cache, limit):
    model = toy("SS")  # the last one goes on with one token
    step = load_runtime_step(lower(model, settings(sliding, cache=cache)))
    expected = model(text[None])[0]
    for chunks in CHUNKS:
        assert largest_error(step, text, expected, chunks) < limit


@pytest.mark.slow
@pytest.mark.parametrize("sliding", ["stock", "ring"])
@pytest.mark.parametrize(
    ("quantization", "cache"),
    [("int8da4w", "fp32"), ("int8da4w", "bf16"), ("fp32", "int8"), ("int8da4w", "int8")],
)
def test_sliding_program_passes_the_gate(toy, text, sliding, quantization, cache):
    formats = settings(sliding, quantization=quantization, cache=cache)
    report = check_parity(toy("FS"), formats, text, GateSettings(prefill_tokens=32))
    assert report.passed, report


@pytest.mark.slow
@pytest.mark.parametrize("sliding", ["stock", "ring"])
def test_fast_lowering_writes_the_stock_bytes_of_sliding_layers(toy, sliding):
    formats = replace(settings(sliding), quantization=Quantization.int8da4w)
    assert lower(toy("S"), formats) == lower(toy("S"), formats, fast=False)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["F-", "FS"])
def test_eight_thousand_tokens_in_chunks_and_then_one_by_one(toy, pattern):
    model = toy(pattern)
    text = torch.randint(0, 96, (8192,), generator=torch.Generator().manual_seed(2))
    settings = LoweringSettings(
        quantization=Quantization.fp32, max_context=8192, prefill_chunk=1024
    )
    step = load_runtime_step(lower(model, settings))
    expected = model(text[None])[0]
    ends = [*range(1024, 7169, 1024), 8000, *range(8001, 8005), 8191, 8192]
    start = 0
    for end in ends:
        out = step(text[None, start:end], torch.tensor([start]))[0]
        error = (out - expected[end - 1]).abs().max() / expected[end - 1].abs().max()
        assert error < 1e-4, end
        start = end
