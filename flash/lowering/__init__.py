"""Decoder -> torch.export -> XNNPACK program (.pte), whole or in blocks, and its parity gate."""

from flash.lowering.blocks import Block, BlockKind, blocks_of, lower_block
from flash.lowering.gate import GateReport, GateSettings, Stage, check_parity
from flash.lowering.locate import locate
from flash.lowering.lower import lower, write
from flash.lowering.settings import AttentionForm, LoweringSettings, SlidingForm

__all__ = [
    "AttentionForm",
    "Block",
    "BlockKind",
    "GateReport",
    "GateSettings",
    "LoweringSettings",
    "SlidingForm",
    "Stage",
    "blocks_of",
    "check_parity",
    "locate",
    "lower",
    "lower_block",
    "write",
]
