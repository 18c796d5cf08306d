"""Lowering settings: errors, defaults, and counted bytes against those of real programs."""

import pytest
import torch

from flash.arch import ArchSpec, Quantization, parse_pattern
from flash.errors import InputError
from flash.lowering.lower import lower
from flash.lowering.settings import AttentionForm, LoweringSettings
from flash.model.decoder import Decoder

SPEC = ArchSpec(
    model_dim=64,
    ffn_dim=128,
    layer_types=parse_pattern("-"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    vocab_size=128,
)


@pytest.mark.parametrize(
    ("quantization", "group_size", "embedding_bits"),
    [("fp32", 32, 4), ("int8da4w", 32, 4), ("int8da4w", 64, 8)],
)
def test_programs_grow_by_the_counted_bytes(quantization, group_size, embedding_bits):
    """The difference of two programs: what does not depend on the sizes drops out."""
    settings = LoweringSettings(
        quantization=Quantization[quantization],
        group_size=group_size,
        embedding_bits=embedding_bits,
        max_context=32,
    )
    torch.manual_seed(0)
    wide = SPEC.replace(ffn_dim=1024, vocab_size=1024)
    grown = len(lower(Decoder(wide), settings)) - len(lower(Decoder(SPEC), settings))
    counted = settings.weight_bytes(wide) - settings.weight_bytes(SPEC)
    assert grown == pytest.approx(counted, rel=0.02)


def test_settings_name_the_bad_value():
    with pytest.raises(InputError, match="^prefill_chunk=100: expected"):
        LoweringSettings(max_context=64, prefill_chunk=100)
    with pytest.raises(InputError, match="^max_context=0: expected"):
        LoweringSettings(max_context=0)
    assert LoweringSettings(max_context=4096).chunk == 256
    sdpa = LoweringSettings(max_context=4096, attention=AttentionForm.sdpa)
    assert sdpa.chunk == 1024
    assert LoweringSettings(max_context=64).chunk == 64
