"""Blocks: their equality, counts and programs."""

from dataclasses import replace

import pytest

from flash.arch import ArchSpec, parse_pattern
from flash.lowering.blocks import Block, BlockKind, lower_block

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
    full, sliding, ffn, ends = (Block.of(kind, SPEC) for kind in BlockKind)
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
    assert len({str(Block.of(kind, SPEC)) for kind in BlockKind}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(BlockKind))
def test_every_block_lowers_to_the_same_bytes_each_time(settings, kind):
    block = Block.of(kind, SPEC)
    assert lower_block(block, settings()) == lower_block(block, settings())
