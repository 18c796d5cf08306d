"""Bytes counted on paper against the bytes of real programs."""

import pytest
import torch

from flash.arch import ArchSpec, Quantization, parse_pattern, weight_bytes
from flash.lowering import LoweringSettings, lower
from flash.model import Decoder

SPEC = ArchSpec(
    model_dim=64,
    ffn_dim=128,
    layer_types=parse_pattern("-"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    vocab_size=128,
)


@pytest.mark.parametrize("quantization", list(Quantization))
def test_programs_grow_by_the_counted_bytes(quantization):
    """The difference of two programs: what does not depend on the sizes drops out."""
    settings = LoweringSettings(quantization=quantization, max_context=32)
    torch.manual_seed(0)
    wide = SPEC.replace(ffn_dim=1024, vocab_size=1024)
    grown = len(lower(Decoder(wide), settings)) - len(lower(Decoder(SPEC), settings))
    counted = weight_bytes(wide, quantization) - weight_bytes(SPEC, quantization)
    assert grown == pytest.approx(counted, rel=0.02)
