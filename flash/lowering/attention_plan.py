"""What the attention layers of one call share: rotary rows, window mask, places in the rings.

Made once a call for all layers. Shapes: s tokens of this call, l cache slots, w window.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from flash.arch import ArchSpec, Attention
from flash.compat.torch import assume
from flash.lowering.settings import AttentionForm, LoweringSettings, SlidingForm
from flash.model.decoder import rotary_table

HIDDEN = -1e6
"""Added to a score that does not count. The exponential of the difference to any score is 0."""
BLOCK = 64
"""Most queries of one block of `RingPlan` [tokens]."""


class RingPlan(NamedTuple):
    """How the s queries of a call are shared out over a ring of w slots.

    1. Positions below w see everything before them: causal attention over the ring as it fills.
    2. Positions from w on see exactly the w - 1 before them and themselves: blocks of b queries,
       each over the w + b keys that it can see, under the same mask for all blocks.
    3. The last query finds its window, and nothing else, in the ring that holds all new tokens.
       In decoding it is the only one.

    The attention operators crash on no queries, and ExecuTorch cannot order the dimensions of a
    tensor that may be empty. So a kind without queries computes one over one key, which no one
    looks at.
    """

    early: int
    """Number of queries of the first kind, at least 1; the first of the call."""
    early_start: int
    """Position of the first of them."""
    old: int
    """Slots of the ring, from the first on, that the blocks look up; at least 1."""
    queries: Tensor
    """Which of the s queries go into each block `[blocks, b]`; the last block is filled up."""
    keys: Tensor
    """Which of (old slots, s new keys) go into each block `[blocks, w + b]`."""
    mask: Tensor
    """`[b, w + b]`, 0 or -inf."""
    last_start: int
    """Newest slot that the last query sees: all up to it."""
    order: Tensor
    """Which of (early queries, block queries, last query) is each of the s queries `[s]`."""


class LastQuery(NamedTuple):
    """How a call's last query, the only one in decoding, is attended to apart from the others.

    All g query heads that share a key head go through the keys together, as g queries that see the
    same n keys. `custom_sdpa` takes n from the start position of the first of them, which cannot be
    negative: up to position g - 2 the last query stays with the others. A kind without queries
    computes one over one key, as in `RingPlan`, and no one looks at it.

    The others go through `custom_sdpa`, or, with a `bias`, through matrix products.
    """

    others: int
    """Number of queries, from the first on, that are attended to; 1 or more."""
    others_start: int
    """Position of the first of them."""
    start: int
    """Position of the first of the g queries, had they been neighbours."""
    order: Tensor
    """Which of (others, last) is each of the s queries `[s]`."""
    alone_start: int
    """Where the last query is without the others: its position where it stays with them, or 0."""
    apart: Tensor
    """Whether the last query does not stay with the others, as an index `[1]`."""
    keys: int
    """Number of keys, from the first on, up to the last of the others; 1 or more."""
    bias: Tensor | None
    """`[g * others, keys]`, added to the scores of one key head: 0, or what hides a later key."""


class CallRange(NamedTuple):
    """Where a call stands in the sequence."""

    start: int
    """Position of its first token, symbolic in an export."""
    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    """Sliding layers of the stock form: `[s, l]`, 0 or -inf."""
    slots: Tensor | None = None
    """Rings: the slot of each new token `[1, s]`."""
    plan: RingPlan | None = None
    """Sliding layers of the ring form."""
    last: LastQuery | None = None
    """Full attention with matrix products, or in which several query heads share a key head."""


class CallPlan(nn.Module):
    """`CallRange` from `input_pos`.

    How the mask of the stock form is made does not show in the time (three formulations measured
    alike): with a mask `custom_sdpa` computes every slot of the cache.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    slot_of: Tensor

    def __init__(self, spec: ArchSpec, settings: LoweringSettings, windows: bool) -> None:
        super().__init__()
        slots = torch.arange(settings.max_context)
        cos, sin = rotary_table(slots, spec)
        half = spec.head_dim // 2
        self.register_buffer("cos", cos[:, None, :half].clone(), persistent=False)
        self.register_buffer("sin", sin[:, None, :half].clone(), persistent=False)
        self.max_context = settings.max_context
        self.window = spec.sliding_window if windows and not sees_all(spec, settings) else None
        self.ring = None
        group = spec.num_heads // spec.num_kv_heads
        full = Attention.full_attention in spec.layer_types or sees_all(spec, settings)
        matmul = settings.attention is AttentionForm.matmul
        apart = full and group <= settings.max_context and (matmul or group > 1)
        self.last_query = _Last(group, settings) if apart else None
        self.num_slots = settings.slots(spec.sliding_window)
        if self.window is None:
            return
        if settings.sliding is SlidingForm.ring:
            self.ring = _Ring(self.window, settings.chunk)
        else:
            self.register_buffer("slots", slots, persistent=False)
        if self.num_slots < self.max_context:
            self.register_buffer("slot_of", slots % self.num_slots, persistent=False)

    def forward(self, input_pos: Tensor, length: int) -> CallRange:
        start = cast(int, input_pos[0].item())  # symbolic in an export
        assume(start >= 0)
        assume(start + length <= self.max_context)
        cos = self.cos.narrow(0, start, length)
        sin = self.sin.narrow(0, start, length)
        last = self.last_query(start, length) if self.last_query is not None else None
        if self.window is None:
            return CallRange(start, cos, sin, last=last)
        ring_slots = None
        if self.num_slots < self.max_context:
            ring_slots = self.slot_of.narrow(0, start, length)[None]
        if self.ring is not None:
            plan = self.ring(start, length)
            return CallRange(start, cos, sin, slots=ring_slots, plan=plan, last=last)
        queries = self.slots.narrow(0, start, length)[:, None]
        if ring_slots is None:
            distance = queries - self.slots[None, :]
            unseen = (distance < 0) | (distance >= self.window)
        else:
            # The newest position in each slot, once this call's tokens are in; negative if none.
            newest = start + length - 1
            slots = self.slots.narrow(0, 0, self.num_slots)
            held = newest - (newest - slots) % self.num_slots
            distance = queries - held[None, :]
            unseen = (distance < 0) | (distance >= self.window) | (held < 0)[None, :]
        mask = torch.zeros(()).masked_fill(unseen, float("-inf"))
        return CallRange(start, cos, sin, mask=mask, slots=ring_slots, last=last)


def sees_all(spec: ArchSpec, settings: LoweringSettings) -> bool:
    """Whether the window hides nothing from sliding layers of the ring form."""
    ring = settings.sliding is SlidingForm.ring
    return ring and spec.sliding_window >= settings.max_context


def _smaller(a: int, b: int) -> int:
    """`min` for numbers of which some are symbolic in an export."""
    return cast(int, torch.sym_min(a, b))


def _larger(a: int, b: int) -> int:
    return cast(int, torch.sym_max(a, b))


def _simple(number: int, most: int) -> int:
    """The same number from 1 to `most`, in an export under a symbol of its own.

    Both the exporter and ExecuTorch have to see that a shape made of it is not empty. They see that
    of a symbol with bounds, not of an expression with minima and maxima.
    """
    symbol = cast(int, torch.full((1,), number, dtype=torch.long).item())
    assume(symbol >= 1)
    assume(symbol <= most)
    return symbol


class _Last(nn.Module):
    """`LastQuery` of a call, for `group` query heads a key head."""

    count: Tensor
    number: Tensor

    def __init__(self, group: int, settings: LoweringSettings) -> None:
        super().__init__()
        self.group, self.chunk = group, settings.chunk
        self.matmul = settings.attention is AttentionForm.matmul
        count = torch.arange(settings.max_context)
        self.register_buffer("count", count, persistent=False)
        if self.matmul:
            self.register_buffer("number", count.float(), persistent=False)

    def forward(self, start: int, length: int) -> LastQuery:
        last = start + length - 1
        apart = _smaller(_larger(last - (self.group - 2), 0), 1)
        others = _larger(length - apart, 1)
        others_start = start * _smaller(length - apart, 1)
        keys, bias = others_start + others, None
        if self.matmul:
            keys = _simple(keys, len(self.number))
            others = _simple(others, self.chunk)
            bias = self._bias(others_start, others, keys)
        nth = self.count.narrow(0, 0, length)
        return LastQuery(
            others=others,
            others_start=others_start,
            start=_larger(last - (self.group - 1), 0),
            order=torch.where(nth < length - apart, nth, others),
            alone_start=last * (1 - apart),
            apart=torch.full((1,), apart, dtype=torch.long),
            keys=keys,
            bias=bias,
        )

    def _bias(self, start: int, queries: int, keys: int) -> Tensor:
        query = self.number.narrow(0, start, queries).expand(self.group, -1).reshape(-1, 1)
        key = self.number.narrow(0, 0, keys)[None, :]
        return (key - query).clamp(0, 1) * HIDDEN  # operators that XNNPACK has, unlike comparisons


class _Ring(nn.Module):
    """`RingPlan` of a call."""

    count: Tensor
    queries: Tensor
    keys: Tensor
    mask: Tensor

    def __init__(self, window: int, chunk: int) -> None:
        super().__init__()
        self.window, self.block = window, min(BLOCK, window, chunk)
        most = -(-chunk // self.block)
        block = torch.arange(most)[:, None] * self.block
        query = torch.arange(self.block)
        key = torch.arange(window + self.block)
        unseen = (key <= query[:, None]) | (key > query[:, None] + window)
        mask = torch.zeros(()).masked_fill(unseen, float("-inf"))
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("count", torch.arange(chunk), persistent=False)
        self.register_buffer("queries", block + query, persistent=False)
        self.register_buffer("keys", block + key, persistent=False)

    def forward(self, start: int, length: int) -> RingPlan:
        window = self.window
        early = _larger(0, _smaller(window - start, length - 1))
        computed = _larger(early, 1)
        later = length - 1 - early
        some = _larger(0, _smaller(later, 1))
        blocks = _larger((later + self.block - 1) // self.block, 1)
        block = _larger(_smaller(later, self.block), 1)  # shorter only if it is alone
        span = some * (window + block - 1) + 1
        old = some * (window - 1) + 1
        queries = self.queries.narrow(0, 0, blocks).narrow(1, 0, block) + early
        # Relative to the first new key; a span starts one window before its first query.
        keys = self.keys.narrow(0, 0, blocks).narrow(1, 0, span) + (early - window)
        nth = self.count.narrow(0, 0, length)
        order = torch.where(nth < early, nth, nth + (computed - early))
        return RingPlan(
            early=computed,
            early_start=_smaller(start, window - 1) * _smaller(early, 1),
            old=old,
            queries=queries.clamp(max=length - 1),
            keys=torch.where(
                keys < 0, (keys + start) % window * some, keys.clamp(max=length - 1) + old
            ),
            mask=self.mask.narrow(0, 0, block).narrow(1, 0, span),
            last_start=_smaller(start + length - 1, window - 1),
            order=torch.where(nth == length - 1, computed + blocks * block, order),
        )
