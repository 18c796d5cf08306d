"""Blocks: their equality, counts and programs."""

from dataclasses import replace

import pytest
import torch

from flash.arch import ArchSpec, parse_pattern
from flash.lowering.blocks import Block, BlockKind, block_module, lower_block

SPEC = ArchSpec(
    model_dim=64,
    ffn_dim=96,
    layer_types=parse_pattern("FS-F"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    vocab_size=96,
    sliding_window=10,
)


def test_blocks_depend_only_on_what_their_program_depends_on():
    full, sliding = (
        Block.of(kind, SPEC) for kind in (BlockKind.full_attention, BlockKind.sliding_attention)
    )
    ffn, ends = (Block.of(kind, SPEC) for kind in (BlockKind.ffn, BlockKind.ends))
    other = replace(SPEC, ffn_dim=128, layer_types=parse_pattern("F"), vocab_size=128)
    assert Block.of(BlockKind.full_attention, other) == full
    assert Block.of(BlockKind.sliding_attention, other) == sliding
    assert Block.of(BlockKind.ffn, other) != ffn
    assert Block.of(BlockKind.ends, other) != ends
    narrow = replace(SPEC, sliding_window=5, num_kv_heads=2)
    assert Block.of(BlockKind.ffn, narrow) == ffn
    assert Block.of(BlockKind.ends, narrow) == ends
    assert Block.of(BlockKind.full_attention, narrow) != full
    assert Block.of(BlockKind.full_attention, replace(SPEC, sliding_window=5)) == full
    assert Block.of(BlockKind.sliding_attention, replace(SPEC, sliding_window=5)) != sliding


def test_block_names_differ():
    assert len({str(Block.of(kind, SPEC)) for kind in BlockKind}) == len(BlockKind)


@pytest.mark.parametrize("kind", [kind for kind in BlockKind if kind.attention is not None])
def test_a_pair_is_two_halves_and_the_last_answers_for_one_token(settings, kind):
    module = block_module(Block.of(kind, SPEC), settings())
    x = torch.randn(1, 6, SPEC.model_dim)
    assert len(module.halves) == (2 if kind.value.endswith("_pair") else 1)
    y = module(x, torch.zeros(1, dtype=torch.long))
    assert y.shape == (1, 1 if kind.value.endswith("_last") else 6, SPEC.model_dim)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(BlockKind))
def test_every_block_lowers_to_the_same_bytes_each_time(settings, kind):
    block = Block.of(kind, SPEC)
    assert lower_block(block, settings()) == lower_block(block, settings())
