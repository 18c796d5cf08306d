import pytest
import torch
import yaml

from flash.arch import (
    ArchSpec,
    CacheFormat,
    Quantization,
    count_parameters,
    decode_flops,
    kv_cache_bytes,
    parse_pattern,
    prefill_flops,
    weight_bytes,
)
from flash.config import CONF
from flash.model.decoder import Decoder

SPEC = ArchSpec(
    model_dim=64,
    ffn_dim=96,
    layer_types=parse_pattern("F-S"),
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=101,
    sliding_window=3,
)


@pytest.mark.parametrize(
    "change",
    [{}, {"qk_norm": False}, {"tie_embeddings": False}, {"layer_types": parse_pattern("FFFS-")}],
)
def test_parameter_count_equals_the_built_module(change):
    spec = SPEC.replace(**change)
    with torch.device("meta"):
        built = sum(p.numel() for p in Decoder(spec).parameters())
    assert count_parameters(spec).total == built


@pytest.mark.parametrize(
    ("name", "millions"), [("flash_350m", 394.6), ("flash_650m", 617.8), ("flash_1_4b", 1386.9)]
)
def test_the_papers_winners_have_the_papers_size(name, millions):
    values = yaml.safe_load((CONF / "arch" / f"{name}.yaml").read_text())
    del values["defaults"]
    spec = ArchSpec.from_dict(values)
    assert round(count_parameters(spec).total / 1e6, 1) == millions


def test_flops_by_hand():
    linear = 3 * (3 * 64 * 96) + 2 * (2 * 64 * 64 + 2 * 64 * 32)
    head = 64 * 101
    # Keys seen by 5 queries: full 1+2+3+4+5, window of three 1+2+3+3+3; 4 heads of 16 channels.
    pairs = 15 + 12
    assert prefill_flops(SPEC, 5) == 2 * (5 * linear + head) + 4 * pairs * 64
    assert decode_flops(SPEC, 5) == 2 * (linear + head) + 4 * (6 + 3) * 64


def test_prefill_is_the_sum_of_its_tokens():
    head = 2 * 64 * 101
    tokens = sum(decode_flops(SPEC, position) - head for position in range(20))
    assert prefill_flops(SPEC, 20) == tokens + head


def test_cache_bytes_by_hand():
    # Two attending layers; the window keeps 3 of 10 tokens; 2 heads of 16 channels, k and v.
    assert kv_cache_bytes(SPEC, 10, 3, CacheFormat.fp32) == 2 * (10 + 3) * 2 * 16 * 4
    assert kv_cache_bytes(SPEC, 10, 3, CacheFormat.bf16) == 2 * (10 + 3) * 2 * 16 * 2
    assert kv_cache_bytes(SPEC, 10, 3, CacheFormat.int8) == 2 * (10 + 3) * 2 * (16 + 4 + 1)


def test_weight_bytes_by_hand():
    spec = SPEC.replace(vocab_size=128)
    counts = count_parameters(spec)
    table = 128 * 64
    linear = counts.attention + counts.ffn + table
    assert weight_bytes(spec, Quantization.fp32) == 4 * (linear + table + counts.vectors)
    packed = linear // 2 + linear // 32 * 2 + table // 2 + table // 32 * 5
    assert weight_bytes(spec, Quantization.int8da4w) == packed + 4 * counts.vectors
