"""Index arithmetic that all attention layers of one call of a program share, done once a call.

A call processes s new tokens that begin at position `input_pos`. From these two numbers
`CallPlan` derives the rotary rows, the window mask, the ring slots and the split of the queries
over attention operators. In an export both numbers are symbolic. That explains the unusual style
of this module: minima and maxima in place of branches, no shape that may be 0, and
`torch._check` where the exporter needs to know a bound.

Shapes: s tokens of this call, l cache slots, w positions of the sliding window, b queries of a
block, g query heads that share one key head.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from flash.arch import ArchSpec, Attention
from flash.compat.torch import assume
from flash.lowering.settings import AttentionForm, LoweringSettings, SlidingForm
from flash.model.decoder import rotary_table

MASKED_SCORE = -1e6
"""Added to a masked score. The exponential of its difference to any other score is 0."""
MAX_BLOCK_QUERIES = 64
"""Largest number of queries in one block of a `RingPlan` [tokens]."""


class RingPlan(NamedTuple):
    """Split of the s queries of a call over a ring of w slots.

    The queries fall into three kinds, in this order:

    1. Causal queries, at positions below w. They see every earlier position, so they use causal
       attention over the ring while it fills.
    2. Block queries, at positions from w on. They see the w - 1 positions before them and
       themselves. They are computed in blocks of b queries, each over the w + b keys that its
       queries can see, under one mask for all blocks.
    3. The last query of the call, the only one in decoding. It runs when the ring holds all new
       tokens, and then its window is the whole ring.

    The attention operators crash without queries, and ExecuTorch cannot order the dimensions of a
    tensor that may be empty. Therefore a kind without queries computes one query over one key, and
    `output_order` does not select its result.
    """

    num_causal: int
    """Number of causal queries, the first of the call; at least 1 (see above)."""
    causal_start: int
    """Position of the first causal query."""
    num_old_slots: int
    """Number of ring slots, counted from slot 0, that the blocks read; at least 1."""
    block_queries: Tensor
    """Indices into the s queries `[blocks, b]`; the last block repeats the last index."""
    block_keys: Tensor
    """Indices into (old slots, s new keys) `[blocks, w + b]`."""
    block_mask: Tensor
    """Additive mask of every block `[b, w + b]`: 0 or -inf."""
    last_slot: int
    """Index of the last slot that the last query sees; it sees slots 0 to this one."""
    output_order: Tensor
    """Row of (causal, block, last) results for each of the s queries `[s]`."""


class LeadingPlan(NamedTuple):
    """Attention by matrix products of all queries of a call but the last, the leading ones.

    Layers with full attention have one such plan, sliding layers of the stock form another. The
    last query, the only one in decoding, goes through `custom_sdpa`, which reads the keys where
    they are: XNNPACK works on a copy of them, which takes longer than the attention of one query. A
    call without leading queries computes one query over one key, as in `RingPlan`.
    """

    num_queries: int
    """Number of leading queries, counted from the first of the call; at least 1."""
    num_keys: int
    """Number of slots, counted from the first, that the leading queries are given; at least 1."""
    bias: Tensor
    """`[g * num_queries, num_keys]`, added to the scores of one key head: 0 or `MASKED_SCORE`, more
    than once where two reasons hide a key."""
    output_order: Tensor
    """Row of (leading, last) results for each of the s queries `[s]`."""


class CallRange(NamedTuple):
    """Tokens of one call: their positions and all that attention layers derive from these."""

    start: int
    """Position of the first token; symbolic in an export."""
    cos: Tensor
    """Rotary cosines `[s, 1, head_dim / 2]`."""
    sin: Tensor
    """Rotary sines `[s, 1, head_dim / 2]`."""
    mask: Tensor | None = None
    """Additive mask of sliding layers in the stock form `[s, l]`, like `LeadingPlan.bias`; with a
    `window_leading` it is the last query's `[1, l]`."""
    slots: Tensor | None = None
    """Slot of each new token in a ring `[kv heads, s]`; None for caches with a slot a position."""
    ring_plan: RingPlan | None = None
    """Plan of sliding layers in the ring form."""
    leading: LeadingPlan | None = None
    """Plan of full attention with matrix products."""
    window_leading: LeadingPlan | None = None
    """Plan of sliding layers in the stock form with matrix products."""


class CallPlan(nn.Module):
    """Computation of the `CallRange` of a call from its `input_pos` and number of tokens."""

    cos: Tensor
    sin: Tensor
    slot_of_position: Tensor

    def __init__(self, spec: ArchSpec, lowering: LoweringSettings, has_sliding: bool) -> None:
        """Precompute tables for all positions.

        Args:
            spec: Architecture of the decoder.
            lowering: Formats and lengths of the program.
            has_sliding: Whether any layer has a sliding window.
        """
        super().__init__()
        positions = torch.arange(lowering.max_context)
        cos, sin = rotary_table(positions, spec)
        half = spec.head_dim // 2
        self.register_buffer("cos", cos[:, None, :half].clone(), persistent=False)
        self.register_buffer("sin", sin[:, None, :half].clone(), persistent=False)
        self.max_context = lowering.max_context
        covered = window_covers_context(spec, lowering)
        self.window = spec.sliding_window if has_sliding and not covered else None
        self.ring_planner = self.window_planner = None
        full = Attention.full_attention in spec.layer_types or covered
        matmul = full and lowering.attention is AttentionForm.matmul
        self.full_planner = _KeyPlanner(spec, lowering, None) if matmul else None
        self.kv_heads = spec.num_kv_heads
        self.num_slots = lowering.slots(spec.sliding_window)
        if self.window is None:
            return
        if lowering.sliding is SlidingForm.ring:
            self.ring_planner = _RingPlanner(self.window, lowering.chunk)
        else:
            self.window_planner = _KeyPlanner(spec, lowering, self.window)
        if self.num_slots < self.max_context:
            slot_of_position = positions % self.num_slots
            self.register_buffer("slot_of_position", slot_of_position, persistent=False)

    def forward(self, input_pos: Tensor, length: int) -> CallRange:
        """Plan a call of `length` tokens that begins at position `input_pos` `[1]`."""
        start = cast(int, input_pos[0].item())  # symbolic in an export
        assume(start >= 0)
        assume(start + length <= self.max_context)
        cos = self.cos.narrow(0, start, length)
        sin = self.sin.narrow(0, start, length)
        leading = None
        if self.full_planner is not None:
            _, leading = self.full_planner(start, length)
        if self.window is None:
            return CallRange(start, cos, sin, leading=leading)
        slots = None
        if self.num_slots < self.max_context:
            slots = self.slot_of_position.narrow(0, start, length).repeat(self.kv_heads, 1)
        if self.ring_planner is not None:
            ring_plan = self.ring_planner(start, length)
            return CallRange(start, cos, sin, slots=slots, ring_plan=ring_plan, leading=leading)
        assert self.window_planner is not None
        mask, window_leading = self.window_planner(start, length)
        return CallRange(
            start, cos, sin, mask=mask, slots=slots, leading=leading, window_leading=window_leading
        )


def window_covers_context(spec: ArchSpec, lowering: LoweringSettings) -> bool:
    """Return True if sliding layers of the ring form see the whole context, as full ones do."""
    ring = lowering.sliding is SlidingForm.ring
    return ring and spec.sliding_window >= lowering.max_context


def _sym_min(a: int, b: int) -> int:
    """Minimum of two numbers, either of which may be symbolic in an export."""
    return cast(int, torch.sym_min(a, b))


def _sym_max(a: int, b: int) -> int:
    """Maximum of two numbers, either of which may be symbolic in an export."""
    return cast(int, torch.sym_max(a, b))


def _as_bounded_symbol(number: int, most: int) -> int:
    """The same number, from 1 to `most`; in an export it becomes a symbol of its own.

    Both the exporter and ExecuTorch must be able to prove that a shape made of it is not empty.
    They can prove that of a symbol with bounds, but not of an expression with minima and maxima.
    """
    symbol = cast(int, torch.full((1,), number, dtype=torch.long).item())
    assume(symbol >= 1)
    assume(symbol <= most)
    return symbol


class _KeyPlanner(nn.Module):
    """Computation of what hides keys from queries, for one kind of layers.

    With matrix products a prompt's queries see all slots of a ring buffer, which holds the new
    tokens already; of a cache with a slot a position they see those up to the last of them.
    """

    indices: Tensor
    float_indices: Tensor

    def __init__(self, spec: ArchSpec, lowering: LoweringSettings, window: int | None) -> None:
        """Precompute tables for all positions.

        Args:
            spec: Architecture of the decoder.
            lowering: Formats and lengths of the program.
            window: Positions that a query sees, with itself; None sees all before it.
        """
        super().__init__()
        self.group, self.chunk = spec.num_heads // spec.num_kv_heads, lowering.chunk
        self.window, self.num_slots = window, lowering.slots(window)
        self.is_ring = self.num_slots < lowering.max_context
        self.matmul = lowering.attention is AttentionForm.matmul
        indices = torch.arange(lowering.max_context)
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("float_indices", indices.float(), persistent=False)

    def forward(self, start: int, length: int) -> tuple[Tensor | None, LeadingPlan | None]:
        """Plan a call.

        Returns:
            The mask for `custom_sdpa`, of the last query alone where products attend for the
            others; None without a window. And the plan of these others, or None.
        """
        held = self._held(start, length)
        queries = self.float_indices.narrow(0, start, length)
        leading = self._leading(start, length, held) if self.matmul else None
        if self.window is None:
            return None, leading
        if leading is not None:
            queries = queries[-1:]
        return self._bias(queries[:, None], held[None, :]), leading

    def _leading(self, start: int, length: int, held: Tensor) -> LeadingPlan:
        num_queries, leads = _sym_max(length - 1, 1), _sym_min(length - 1, 1)
        start = start * leads
        num_keys = leads * (self.num_slots - 1) + 1 if self.is_ring else start + num_queries
        num_keys = _as_bounded_symbol(num_keys, self.num_slots)
        num_queries = _as_bounded_symbol(num_queries, self.chunk)
        queries = self.float_indices.narrow(0, start, num_queries)
        query = self.indices.narrow(0, 0, length)
        return LeadingPlan(
            num_queries=num_queries,
            num_keys=num_keys,
            bias=self._bias(
                queries.expand(self.group, -1).reshape(-1, 1),
                held.narrow(0, 0, num_keys)[None, :],
            ),
            output_order=torch.where(query < length - 1, query, num_queries),
        )

    def _held(self, start: int, length: int) -> Tensor:
        """Position of the newest token in each slot `[l]`, once this call's tokens are in."""
        if not self.is_ring:
            return self.float_indices
        newest = start + length - 1
        slots = self.indices.narrow(0, 0, self.num_slots)
        held = (newest - (newest - slots) % self.num_slots).float()
        return held - held.clamp(-1, 0) * MASKED_SCORE  # an empty slot is too old for everyone

    def _bias(self, queries: Tensor, held: Tensor) -> Tensor:
        """Hide the keys `[1, n]` that come after a query `[m, 1]` or before its window."""
        bias = _where_positive(held - queries)
        if self.window is None:
            return bias
        return bias + _where_positive(queries - held - (self.window - 1))


def _where_positive(x: Tensor) -> Tensor:
    """`MASKED_SCORE` where whole numbers are above 0, else 0.

    Only of operators that XNNPACK has; it has no comparisons.
    """
    return x.clamp(0, 1) * MASKED_SCORE


class _RingPlanner(nn.Module):
    """Computation of a call's `RingPlan`."""

    indices: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    mask: Tensor

    def __init__(self, window: int, chunk: int) -> None:
        super().__init__()
        self.window, self.block = window, min(MAX_BLOCK_QUERIES, window, chunk)
        max_blocks = -(-chunk // self.block)
        block_start = torch.arange(max_blocks)[:, None] * self.block
        query = torch.arange(self.block)
        key = torch.arange(window + self.block)
        hidden = (key <= query[:, None]) | (key > query[:, None] + window)
        mask = torch.zeros(()).masked_fill(hidden, float("-inf"))
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("indices", torch.arange(chunk), persistent=False)
        self.register_buffer("query_offsets", block_start + query, persistent=False)
        self.register_buffer("key_offsets", block_start + key, persistent=False)

    def forward(self, start: int, length: int) -> RingPlan:
        window = self.window
        causal = _sym_max(0, _sym_min(window - start, length - 1))
        computed_causal = _sym_max(causal, 1)
        in_blocks = length - 1 - causal
        any_in_blocks = _sym_max(0, _sym_min(in_blocks, 1))
        blocks = _sym_max((in_blocks + self.block - 1) // self.block, 1)
        # A block is shorter than `self.block` only if it is the only one.
        block = _sym_max(_sym_min(in_blocks, self.block), 1)
        span = any_in_blocks * (window + block - 1) + 1
        num_old_slots = any_in_blocks * (window - 1) + 1
        queries = self.query_offsets.narrow(0, 0, blocks).narrow(1, 0, block) + causal
        # Relative to the first new key; a span starts one window before its first query.
        keys = self.key_offsets.narrow(0, 0, blocks).narrow(1, 0, span) + (causal - window)
        old_slots = (keys + start) % window * any_in_blocks
        new_keys = keys.clamp(max=length - 1) + num_old_slots
        query = self.indices.narrow(0, 0, length)
        order = torch.where(query < causal, query, query + (computed_causal - causal))
        last_row = computed_causal + blocks * block
        return RingPlan(
            num_causal=computed_causal,
            causal_start=_sym_min(start, window - 1) * _sym_min(causal, 1),
            num_old_slots=num_old_slots,
            block_queries=queries.clamp(max=length - 1),
            block_keys=torch.where(keys < 0, old_slots, new_keys),
            block_mask=self.mask.narrow(0, 0, block).narrow(1, 0, span),
            last_slot=_sym_min(start + length - 1, window - 1),
            output_order=torch.where(query == length - 1, last_row, order),
        )
