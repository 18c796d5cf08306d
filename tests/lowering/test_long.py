"""A program with 8,192 positions."""

import pytest
import torch

from flash.arch import Quantization
from flash.lowering.gate import _runtime_step
from flash.lowering.lower import lower
from flash.lowering.settings import LoweringSettings


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["F-", "FS"])
def test_eight_thousand_tokens_in_chunks_and_then_one_by_one(toy, pattern):
    model = toy(pattern)
    text = torch.randint(0, 96, (8192,), generator=torch.Generator().manual_seed(2))
    settings = LoweringSettings(
        quantization=Quantization.fp32, max_context=8192, prefill_chunk=1024
    )
    step = _runtime_step(lower(model, settings))
    expected = model(text[None])[0]
    ends = [*range(1024, 7169, 1024), 8000, *range(8001, 8005), 8191, 8192]
    start = 0
    for end in ends:
        out = step(text[None, start:end], torch.tensor([start]))[0]
        error = (out - expected[end - 1]).abs().max() / expected[end - 1].abs().max()
        assert error < 1e-4, end
        start = end
