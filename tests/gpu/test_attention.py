"""Flex attention with block masks against SDPA with masks of all pairs, on the same numbers."""

import pytest
import torch
import torch.nn.functional as F

from flash.model.attention import MaskSpec, attend

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

DOCUMENTS = [[100, 60, 140], [300]]
"""Lengths of the documents of two sequences; no boundary lies on one of a block of 128."""
LENGTH = 300


@pytest.fixture
def documents(device):
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in DOCUMENTS]
    return torch.stack(rows).to(device)


def heads(device, dtype, count):
    shape = (2, count, LENGTH, 64)
    # Flex attention has no backward pass on a CPU.
    learns = device.type == "cuda"
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=learns)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("window", [None, 96], ids=["full", "sliding"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "documents"])
def test_flex_attention_equals_sdpa(device, documents, masked, window, dtype, atol):
    torch.manual_seed(0)
    q, k, v = heads(device, dtype, 4), heads(device, dtype, 2), heads(device, dtype, 2)
    mask = MaskSpec(0, LENGTH, documents if masked else None, device)
    blocks = attend(q, k, v, mask.block_mask(window))
    positions = torch.arange(LENGTH, device=device)
    seen = positions[:, None] >= positions
    if window is not None:
        seen = seen & (positions[:, None] - positions < window)
    if masked:
        seen = (seen & (documents[:, :, None] == documents[:, None, :]))[:, None]
    pairs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(blocks, pairs, atol=atol, rtol=atol)
    if device.type != "cuda":
        return
    upstream = torch.randn_like(blocks)
    ours = torch.autograd.grad(blocks, (q, k, v), upstream, retain_graph=True)
    theirs = torch.autograd.grad(pairs, (q, k, v), upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=4 * atol, rtol=4 * atol)


def test_masks_on_a_gpu_are_blocks_except_for_plain_causal_attention(device, documents):
    if device.type != "cuda":
        pytest.skip("masks on a CPU are tensors")
    assert MaskSpec(0, LENGTH, None, device).mask(None) is None
    for window, ids in ((96, None), (None, documents)):
        assert not isinstance(MaskSpec(0, LENGTH, ids, device).mask(window), torch.Tensor)
