"""Logits and tokens of llama.cpp on GGUF files against ours; needs llama-cpp-python."""

import importlib.util
import inspect
import json

import pytest
import torch

from flash.errors import CheckFailed
from flash.export.formats import ExportSource, publish
from flash.export.settings import ExportFormat, FormatSettings
from flash.interop import gguf as gguf_format
from flash.interop.gguf import LIMITS, check_gguf, locate_gguf_failure
from flash.interop.settings import GgufFormat
from flash.lowering.parity_metrics import ParityLimits
from flash.model.checkpoint import load
from flash.model.tokenizer import ModelTokenizer
from tests.interop.test_gguf import (
    LINEAR,
    LLAMA3,
    PRE,
    TINY,
    byte_level,
    decoder,
    saved,
    written,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
    ),
]


@pytest.fixture(scope="session")
def prose() -> str:
    """Source and documentation of the standard library."""
    return inspect.getsource(json.decoder) + inspect.getsource(json.encoder)


@pytest.fixture(scope="session")
def prompt(prose) -> torch.Tensor:
    ids = ModelTokenizer.open(TINY / "tokenizer.json").encode(prose)
    return torch.tensor(ids[200:296])


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("FF", {}),
        ("FF", {"tie_embeddings": False}),
        ("FF", {"qkv_bias": True}),
        ("FF", {"rope_scaling": LLAMA3}),
        ("FF", {"rope_scaling": LINEAR}),
        ("FF", {"qk_norm": True}),
        ("F--F", {}),
        ("F-F-", {"qkv_bias": True, "rope_scaling": LLAMA3}),
        ("-F-", {"tie_embeddings": False}),
        ("--", {}),
        ("-F-", {"qk_norm": True, "rope_scaling": LINEAR}),
        ("FF", {"num_heads": 6}),
        ("FF-F", {"ffn_dim": (96, 32, 64, 160), "num_kv_heads": 1}),
        ("FF", {"ffn_dim": (96, 32), "qk_norm": True}),
    ],
)
def test_llama_cpp_gives_the_same_logits(tmp_path, prompt, pattern, changes):
    model = decoder(pattern, vocab_size=2048, **changes)
    written(tmp_path / "a.gguf", model)
    found = check_gguf(tmp_path / "a.gguf", model, prompt, LIMITS[GgufFormat.f32])
    assert found.passed, found


@pytest.mark.parametrize("weight_format", list(GgufFormat))
def test_a_trained_model_keeps_its_answers_in_every_format(tmp_path, prompt, weight_format):
    model = load(TINY)
    written(tmp_path / "a.gguf", model, weight_format=weight_format.name)
    found = check_gguf(tmp_path / "a.gguf", model, prompt, LIMITS[weight_format])
    assert found.passed, found
    with torch.no_grad():  # after the file was written
        model.model.layers[3].mlp.down_proj.weight.mul_(-1)
    limits = LIMITS[weight_format]
    assert not check_gguf(tmp_path / "a.gguf", model, prompt, limits).passed


@pytest.mark.parametrize("pre", PRE)
def test_llama_cpp_cuts_text_into_the_same_tokens(tmp_path, prose, pre):
    import llama_cpp

    tokenizer = byte_level(pre, prose.splitlines(keepends=True), 1000)
    path = saved(tokenizer, tmp_path / "tokenizer")
    written(tmp_path / "a.gguf", decoder("F", vocab_size=1024), path)
    runtime = llama_cpp.Llama(str(tmp_path / "a.gguf"), vocab_only=True, verbose=False)
    odd = "I'm HE'LL it's\t\tÉtude, 12345 und 1٣   x\r\n\n  \u4f60\u597d  <think>ok<|endoftext|>\n"
    for text in (prose, odd):
        ids = tokenizer.encode(text).ids
        assert runtime.tokenize(text.encode(), add_bos=True, special=True) == ids
    assert runtime.detokenize(ids, special=True).decode() == odd


def test_a_file_that_llama_cpp_does_not_load_fails(tmp_path, prompt):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckFailed, match="llama.cpp does not load it"):
        check_gguf(path, decoder("F"), prompt, ParityLimits())


def test_the_layer_that_is_written_wrongly_is_found(tmp_path, prompt, monkeypatch):
    model, weight_format = load(TINY), GgufFormat.f32
    limits = LIMITS[weight_format]
    assert locate_gguf_failure(model, prompt, limits, weight_format, tmp_path) is None
    tensors = gguf_format._tensors

    def wrong(*args):
        for name, tensor in tensors(*args):
            yield name, -tensor if name == "blk.2.ffn_down.weight" else tensor

    monkeypatch.setattr(gguf_format, "_tensors", wrong)
    tokenizer = ModelTokenizer.open(TINY / "tokenizer.json")
    source = ExportSource(model=model, text=prompt, tokenizer=tokenizer)
    settings = FormatSettings(gguf=weight_format, gguf_tokenizer=False)
    with pytest.raises(CheckFailed, match=r"gate of format gguf failed in layer 2; nothing"):
        publish(ExportFormat.gguf, tmp_path / "export", source, settings, "key")
    assert not any(tmp_path.rglob("*.gguf"))
