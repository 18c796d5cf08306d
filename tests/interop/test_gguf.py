"""Contents of GGUF files, and refused models; test_llama_cpp.py runs such files."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from flash.arch import ArchSpec, RopeKind, RopeScaling, parse_pattern
from flash.errors import CheckFailed, InputError
from flash.interop import gguf as gguf_format
from flash.interop.gguf import check_gguf, locate_gguf_failure, write_gguf
from flash.interop.gguf_tokenizer import pre_tokenizer_name
from flash.interop.settings import GgufFormat
from flash.lowering.parity_metrics import ParityLimits
from flash.model.decoder import Decoder
from flash.model.tokenizer import ModelTokenizer

REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3_SPLIT = rf"{SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2_SPLIT = rf"{SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE = {
    "gpt-2": (None, False),
    "smollm": ("digits", False),
    "llama-bpe": (LLAMA3_SPLIT, True),
    "smaug-bpe": (LLAMA3_SPLIT, False),
    "qwen2": (QWEN2_SPLIT, False),
    "gpt-4o": (GPT4O_SPLIT, False),
}
LLAMA3 = RopeScaling(kind=RopeKind.llama3, factor=8.0, original_context=32)
LINEAR = RopeScaling(kind=RopeKind.linear, factor=2.0)
SPECIAL = ["<|endoftext|>", "<|begin|>"]
TINY = Path(__file__).parents[2] / "backbones" / "tiny"
IDS = {"eos_token_id": 0}


def byte_level(pre: str, texts=("def main(x): return x + 12",), size: int = 300) -> Tokenizer:
    """Train a tokenizer with the pre-tokenizer that llama.cpp calls `pre`."""
    split, ignore_merges = PRE[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (None, "digits"))
    if split is None:
        tokenizer.pre_tokenizer = level
    else:
        digits = split == "digits"
        first = (
            pre_tokenizers.Digits(individual_digits=True)
            if digits
            else pre_tokenizers.Split(Regex(split), "isolated")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    return saved(byte_level("gpt-2"), tmp_path / "tokenizer")


def decoder(pattern: str, qk_norm: bool = False, **changes) -> Decoder:
    torch.manual_seed(0)
    values = {
        "model_dim": 64,
        "ffn_dim": 96,
        "layer_types": parse_pattern(pattern),
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "vocab_size": 320,
        "qk_norm": qk_norm,
        "max_context": 512,
        **changes,
    }
    model = Decoder(ArchSpec(**values)).eval()
    with torch.no_grad():  # values that tell one tensor from another, and logits that differ
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_()
            else:
                parameter.mul_(3)
    return model


def written(path: Path, model: Decoder, tokenizer: Path | None = None, weight_format: str = "f32"):
    matrices = GgufFormat[weight_format]
    opened = ModelTokenizer.open(tokenizer) if tokenizer is not None else None
    write_gguf(path, model, tokenizer=opened, weight_format=matrices)
    return gguf.GGUFReader(path)


def value(reader: gguf.GGUFReader, key: str):
    """A value, or None if there is none of this name."""
    found = reader.get_field(key)
    return None if found is None else found.contents()


def tensors(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def interleaved(rows: torch.Tensor, head_dim: int = 32) -> np.ndarray:
    """Interleave rows one at a time: row (head, i, half) is ours at (head, half, i)."""
    out = torch.empty_like(rows)
    half = head_dim // 2
    for head in range(len(rows) // head_dim):
        for i in range(half):
            for side in range(2):
                out[head * head_dim + 2 * i + side] = rows[head * head_dim + side * half + i]
    return out.detach().numpy()


def test_the_keys_of_a_plain_model(tmp_path, tokenizer):
    model = decoder("FF", rope_theta=12345.0, norm_eps=1e-6)
    reader = written(tmp_path / "small.gguf", model, tokenizer)
    expected = {
        "general.architecture": "llama",
        "general.name": "small",
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 12345.0,
        "llama.rope.scaling.type": None,
        "llama.vocab_size": 320,
        "general.file_type": 0,
    }
    assert {key: value(reader, key) for key in expected} == expected
    assert value(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert ArchSpec.from_json(value(reader, "flash.arch")) == model.spec
    assert value(reader, "flash.version")


@pytest.mark.parametrize("tied", [True, False])
def test_the_tensors_of_a_plain_model(tmp_path, tied):
    model = decoder("F", qkv_bias=True, tie_embeddings=tied)
    found = tensors(written(tmp_path / "a.gguf", model))
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    expected = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "blk.0.attn_norm.weight": layer.input_layernorm.weight,
        "blk.0.attn_q.weight": interleaved(attention.q_proj.weight),
        "blk.0.attn_k.weight": interleaved(attention.k_proj.weight),
        "blk.0.attn_v.weight": attention.v_proj.weight,
        "blk.0.attn_q.bias": interleaved(attention.q_proj.bias),
        "blk.0.attn_k.bias": interleaved(attention.k_proj.bias),
        "blk.0.attn_v.bias": attention.v_proj.bias,
        "blk.0.attn_output.weight": attention.o_proj.weight,
        "blk.0.ffn_norm.weight": layer.post_attention_layernorm.weight,
        "blk.0.ffn_gate.weight": mlp.gate_proj.weight,
        "blk.0.ffn_up.weight": mlp.up_proj.weight,
        "blk.0.ffn_down.weight": mlp.down_proj.weight,
    }
    if not tied:
        expected["output.weight"] = model.lm_head.weight
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        wanted = tensor if isinstance(tensor, np.ndarray) else tensor.detach().numpy()
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


def test_skipped_layers_have_no_heads_and_no_tensors(tmp_path):
    model = decoder("F-F")
    reader = written(tmp_path / "a.gguf", model)
    assert value(reader, "general.architecture") == "deci"
    assert value(reader, "deci.attention.head_count") == [4, 0, 4]
    assert value(reader, "deci.attention.head_count_kv") == [2, 0, 2]
    assert value(reader, "deci.feed_forward_length") == [96, 96, 96]
    found = tensors(reader)
    assert {name for name in found if name.startswith("blk.1.")} == {
        f"blk.1.ffn_{part}.weight" for part in ("norm", "gate", "up", "down")
    }
    np.testing.assert_array_equal(
        found["blk.2.attn_q.weight"], interleaved(model.model.layers[2].self_attn.q_proj.weight)
    )


def test_widths_by_layer_are_an_array_where_llama_cpp_reads_one(tmp_path):
    reader = written(tmp_path / "a.gguf", decoder("FF", ffn_dim=(96, 32)))
    assert value(reader, "general.architecture") == "deci"
    assert value(reader, "deci.feed_forward_length") == [96, 32]
    assert tensors(reader)["blk.1.ffn_down.weight"].shape == (64, 32)
    padded = written(tmp_path / "b.gguf", decoder("FF", qk_norm=True, ffn_dim=(96, 32)))
    assert value(padded, "qwen3.feed_forward_length") == 96
    assert not tensors(padded)["blk.1.ffn_down.weight"][:, 32:].any()


@pytest.mark.parametrize("pattern", ["-F-", "---"])
def test_the_first_layer_has_heads_since_llama_cpp_takes_their_size_there(tmp_path, pattern):
    reader = written(tmp_path / "a.gguf", decoder(pattern))
    assert value(reader, "deci.attention.head_count") == [4, 4 * (pattern[1] == "F"), 0]
    found = tensors(reader)
    for part in ("q", "k", "v", "output"):
        assert not found[f"blk.0.attn_{part}.weight"].any()
    np.testing.assert_array_equal(found["blk.0.attn_norm.weight"], np.ones(64, np.float32))


def test_qk_norm_is_qwen3_with_rows_as_they_are_and_zeros_for_skips(tmp_path):
    model = decoder("F-", qk_norm=True)
    reader = written(tmp_path / "a.gguf", model)
    assert value(reader, "general.architecture") == "qwen3"
    assert value(reader, "qwen3.attention.head_count") == 4
    found, attention = tensors(reader), model.model.layers[0].self_attn
    for ours, theirs in (("q_proj", "q"), ("k_proj", "k"), ("q_norm", "q_norm")):
        wanted = getattr(attention, ours).weight.detach().numpy()
        np.testing.assert_array_equal(found[f"blk.0.attn_{theirs}.weight"], wanted)
    assert not found["blk.1.attn_output.weight"].any()
    np.testing.assert_array_equal(found["blk.1.attn_k_norm.weight"], np.ones(32, np.float32))


def test_windows_that_cover_the_context_are_full_attention(tmp_path):
    reader = written(tmp_path / "a.gguf", decoder("FS", sliding_window=512))
    assert value(reader, "general.architecture") == "llama"


def test_rope_scaling_is_keys_or_a_tensor_of_divisors(tmp_path):
    reader = written(tmp_path / "linear.gguf", decoder("F", rope_scaling=LINEAR))
    assert value(reader, "llama.rope.scaling.type") == "linear"
    assert value(reader, "llama.rope.scaling.factor") == 2.0
    reader = written(tmp_path / "llama3.gguf", decoder("F-", rope_scaling=LLAMA3))
    assert value(reader, "deci.rope.scaling.type") is None
    found = tensors(reader)["rope_freqs.weight"]
    assert found.shape == (16,)
    for i, factor in enumerate(found):  # Llama 3.1's rule, written for wavelengths
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / 32)
        smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
        scaled = 1 / ((1 - smooth) / 8.0 + smooth)
        wanted = 1.0 if wavelength < 32 / 4 else 8.0 if wavelength > 32 / 1 else scaled
        assert factor == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("weight_format", "bits", "file_type", "share"),
    [
        ("f32", 32, 0, 0.0),
        ("f16", 16, 1, 2**-11),
        ("q8_0", 8.5, 7, 0.5 / 127 + 2**-11),
        ("q4_0", 4.5, 2, 1 / 8),
    ],
)
def test_matrices_are_stored_as_asked_and_the_rest_in_float32(
    tmp_path, weight_format, bits, file_type, share
):
    model = decoder("F-", tie_embeddings=False)
    reader = written(tmp_path / "a.gguf", model, weight_format=weight_format)
    assert value(reader, "general.file_type") == file_type
    assert (value(reader, "general.quantization_version") == 2) == weight_format.startswith("q")
    for tensor in reader.tensors:
        matrix = len(tensor.shape) == 2
        assert tensor.tensor_type.name == (weight_format.upper() if matrix else "F32"), tensor.name
        assert tensor.n_bytes == tensor.n_elements * (bits if matrix else 32) / 8
    weight = model.model.layers[1].mlp.down_proj.weight.detach().view(-1, 32)
    found = torch.from_numpy(tensors(reader)["blk.1.ffn_down.weight"].copy()).view(-1, 32)
    largest = weight.abs().amax(1, keepdim=True)  # of each block that has a scale of its own
    assert ((found - weight).abs() <= largest * share * 1.01).all()


def test_the_tokenizer_in_llama_cpp_terms(tmp_path):
    tokenizer = byte_level("gpt-2")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
    )
    path = saved(tokenizer, tmp_path / "tokenizer")
    (path.parent / "chat_template.jinja").write_text("{{ messages }}")
    reader = written(tmp_path / "a.gguf", decoder("F", vocab_size=352), path)
    tokens = value(reader, "tokenizer.ggml.tokens")
    types = value(reader, "tokenizer.ggml.token_type")
    size = tokenizer.get_vocab_size()
    assert tokens[:size] == [tokenizer.id_to_token(i) for i in range(size)]
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, 352)]
    assert len(tokens) == len(types) == 352
    assert types == [3, 3, *[1] * (size - 3), 4, *[5] * (352 - size)]
    merges = json.loads(path.read_text())["model"]["merges"]
    assert value(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert merges
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.bos_token_id") == 1
    assert value(reader, "tokenizer.ggml.eos_token_id") == 0
    assert value(reader, "tokenizer.ggml.add_bos_token") is True
    assert value(reader, "tokenizer.ggml.add_eos_token") is False
    assert value(reader, "tokenizer.chat_template") == "{{ messages }}"


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_all_end_tokens_are_in_the_file(tmp_path, tokenizer, number, caplog):
    ends = tuple(range(20, 20 + number))
    opened = dataclasses.replace(ModelTokenizer.open(tokenizer), begin=9, ends=ends, pad=8)
    path = tmp_path / "a.gguf"
    write_gguf(path, decoder("F"), tokenizer=opened, weight_format=GgufFormat.f32)
    reader = gguf.GGUFReader(path)
    names = ("bos", "eos", "eot", "eom", "padding")
    found = [value(reader, f"tokenizer.ggml.{name}_token_id") for name in names]
    eot, eom = ends[-1] if number > 1 else None, ends[1] if number > 2 else None
    assert found == [9, 20, eot, eom, 8]
    assert ("names three end tokens at most" in caplog.text) == (number > 3)


def test_a_tokenizer_that_adds_nothing(tmp_path, tokenizer):
    reader = written(tmp_path / "a.gguf", decoder("F"), tokenizer)
    assert value(reader, "tokenizer.ggml.bos_token_id") == 0
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    assert value(reader, "tokenizer.chat_template") is None


def test_without_a_tokenizer_the_file_takes_token_ids(tmp_path):
    reader = written(tmp_path / "a.gguf", decoder("F"))
    assert value(reader, "tokenizer.ggml.model") == "none"
    assert value(reader, "tokenizer.ggml.tokens") is None
    assert value(reader, "llama.vocab_size") == 320


@pytest.mark.parametrize("pre", PRE)
def test_pre_tokenizers_are_known_by_their_rules(tmp_path, pre):
    assert pre_tokenizer_name(saved(byte_level(pre), tmp_path)) == pre


def _prefixed() -> Tokenizer:
    tokenizer = byte_level("gpt-2")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def _merging() -> Tokenizer:
    tokenizer = byte_level("qwen2")
    tokenizer.model.ignore_merges = True
    return tokenizer


def _lower() -> Tokenizer:
    tokenizer = byte_level("gpt-2")
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (_prefixed(), "pre_tokenizer=.*llama.cpp knows no other; formats.gguf_tokenizer=false"),
        (_merging(), "ignore_merges=true: expected that of GPT-2"),
        (_lower(), "normalizer=Lowercase: expected none or NFC"),
        (Tokenizer(models.Unigram([("<|endoftext|>", 0.0)])), "type=Unigram: expected BPE"),
        (Tokenizer.from_file(str(TINY / "tokenizer.json")), "pre_tokenizer=.*p{N}{1,3}"),
    ],
)
def test_other_tokenizers_are_refused_with_the_reason(tmp_path, tokenizer, message):
    path = saved(tokenizer, tmp_path / "tokenizer")
    with pytest.raises(InputError, match=message):
        written(tmp_path / "a.gguf", decoder("F", vocab_size=2048), path)
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (decoder("FS"), "sliding_window=256: expected at least arch.max_context=512"),
        (decoder("F", True, qkv_bias=True), "qkv_bias=true: expected false with arch.qk_norm"),
        (decoder("F", True, rope_scaling=LLAMA3), "rope_scaling.kind=llama3: expected linear"),
        (decoder("F", vocab_size=256), "size=276: expected at most arch.vocab_size=256"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_with_the_reason(
    tmp_path, tokenizer, model, message
):
    path = tmp_path / "a.gguf"
    with pytest.raises(InputError, match=message):
        written(path, model, tokenizer)
    assert not path.exists()


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "out" / "a.gguf"
    written(path, decoder("F"))
    old, calls = path.read_bytes(), []

    def full_disk(array, stored):
        calls.append(stored)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return array

    monkeypatch.setattr(gguf_format.gguf.quants, "quantize", full_disk)
    with pytest.raises(OSError, match="No space left"):
        written(path, decoder("FF"))
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_the_search_for_a_bad_layer_writes_the_first_layers(tmp_path, text, monkeypatch):
    """llama.cpp is replaced by a check that fails from the third layer on."""
    depths = []

    def check(path, part, text, limits):
        depths.append(value(gguf.GGUFReader(path), "llama.block_count"))
        return SimpleNamespace(passed=depths[-1] < 3)

    monkeypatch.setattr(gguf_format, "check_gguf", check)
    limits, exact = ParityLimits(), GgufFormat.f32
    assert locate_gguf_failure(decoder("FFFF"), text, limits, exact, tmp_path) == "layer 2"
    assert locate_gguf_failure(decoder("FF"), text, limits, exact, tmp_path) is None
    assert depths == [2, 3, 1, 2]
    assert not list(tmp_path.iterdir())


def test_a_check_says_what_to_install(tmp_path, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match="pip install llama-cpp-python"):
        check_gguf(tmp_path / "a.gguf", decoder("F"), text, ParityLimits())


def test_a_crash_of_llama_cpp_ends_only_the_check(tmp_path, text, monkeypatch):
    (tmp_path / "child.py").write_text("import os; os.abort()", "utf-8")
    monkeypatch.setattr(gguf_format, "_CHILD", tmp_path / "child.py")
    monkeypatch.setattr(gguf_format, "_check_llama_cpp", lambda: None)
    with pytest.raises(CheckFailed, match=r"a\.gguf: llama.cpp crashed \(SIGABRT\).* AMX"):
        check_gguf(tmp_path / "a.gguf", decoder("F"), text, ParityLimits())
