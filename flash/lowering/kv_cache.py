"""KV caches of attention layers, and the operators that attend to them.

A cache (`FloatKVCache`, `Int8KVCache`) stores the keys and values of one layer and calls the
attention operator for its number format. The order of writing, reading and attending around it is
one of four functions: `attend_causal`, `attend_masked`, `attend_masked_ring` or `attend_ring`.

Caches are buffers that custom operators change in place. An exported graph does not show such a
change as a data dependency, so `_after` makes the order of reads and writes explicit.

Shapes: s tokens of this call, l cache slots, h query heads, g query heads that share a key head, d
head size. Caches and operators have the key heads as a batch, so that the keys of a head lie
together in memory: keys and values are `[kv heads, s, 1, d]`, queries `[kv heads, s, g, d]`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flash.arch import ArchSpec, CacheFormat
from flash.lowering.attention_plan import CallRange, LeadingPlan, window_covers_context
from flash.lowering.settings import LoweringSettings, SlidingForm

Encoded = tuple[Tensor, ...]
"""Keys, values or queries by key head in the cache's format: numbers, then their scales and zero
points if the format has any."""


class FloatKVCache(nn.Module):
    """Keys and values of one layer in float32 or bfloat16, updated in place."""

    def __init__(self, spec: ArchSpec, slots: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (spec.num_kv_heads, slots, 1, spec.head_dim)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype), persistent=False)
        self.kv_heads, self.dtype = spec.num_kv_heads, dtype

    def encode(self, x: Tensor) -> Encoded:
        """Convert keys, values or queries `[1, s, n, d]` to the format of the cache."""
        return (_split_by_key_head(x, self.kv_heads).to(self.dtype),)

    def contents(self, name: str) -> Encoded:
        """All slots of "keys" or "values"."""
        return (getattr(self, name),)

    def first_as_float(self, name: str, count: int) -> Tensor:
        """The first `count` slots of "keys" or "values" in float32 `[kv heads, count, d]`."""
        return _first_slots(self.contents(name)[0], count).to(torch.float32)

    def attend(
        self, q: Encoded, keys: Encoded, values: Encoded, start: int, mask: Tensor | None
    ) -> Tensor:
        """Attention of the s queries q, the first of them at position `start`, in float32.

        With a mask `[s, keys]` a query sees the keys that the mask shows. Without one it sees the
        keys up to its own position.
        """
        position = (start, None, 0.0, True) if mask is None else (0, mask, 0.0, False)
        out = torch.ops.llama.custom_sdpa(q[0], keys[0], values[0], *position)
        return out.to(torch.float32)


class Int8KVCache(nn.Module):
    """Keys and values in int8 with a scale and zero point for each token and head."""

    def __init__(self, spec: ArchSpec, slots: int) -> None:
        super().__init__()
        shape = (spec.num_kv_heads, slots, 1, spec.head_dim)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int8), persistent=False)
            scales = torch.ones((*shape[:3], 1))
            self.register_buffer(f"{name}_scale", scales, persistent=False)
            self.register_buffer(f"{name}_zero", scales.to(torch.int8), persistent=False)
        self.kv_heads = spec.num_kv_heads

    def encode(self, x: Tensor) -> Encoded:
        """Convert `[1, s, n, d]` to int8 values, float scales and int8 zero points of each row."""
        ops = torch.ops.quantized_decomposed
        x = _split_by_key_head(x, self.kv_heads)
        scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        value = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
        return value, scale.to(torch.float32), zero.to(torch.int8)

    def contents(self, name: str) -> Encoded:
        """All slots of "keys" or "values"."""
        return getattr(self, name), getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero")

    def first_as_float(self, name: str, count: int) -> Tensor:
        """The first `count` slots of "keys" or "values" in float32 `[kv heads, count, d]`."""
        value, scale, zero = (_first_slots(x, count) for x in self.contents(name))
        # The operator subtracts in the zero point's type.
        return torch.ops.quantized_decomposed.dequantize_per_token(
            value, scale, zero.to(torch.int64), -128, 127, torch.int8, torch.float32
        )

    def attend(
        self, q: Encoded, keys: Encoded, values: Encoded, start: int, mask: Tensor | None
    ) -> Tensor:
        """Attention of the s queries q, the first of them at position `start`, in float32.

        With a mask `[s, keys]` a query sees the keys that the mask shows. Without one it sees the
        keys up to its own position.
        """
        position = (start, None, 0.0, True) if mask is None else (0, mask, 0.0, False)
        scales = (q[2], q[1], keys[2], keys[1], values[2], values[1])
        return torch.ops.llama.custom_quantized_sdpa(
            q[0], keys[0], values[0], *position, None, *scales
        )


def _split_by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """Keys, values or queries `[1, s, n, d]` as `[kv heads, s, n / kv heads, d]`."""
    _, length, heads, size = x.shape
    shared = heads // kv_heads
    rows = x.view(length, kv_heads, shared * size).transpose(0, 1).contiguous()
    return rows.view(kv_heads, length, shared, size)


def _first_slots(cache: Tensor, count: int) -> Tensor:
    """The first `count` slots of `[kv heads, l, 1, d]` as `[kv heads, count, d]`."""
    # ExecuTorch's other operators that drop a dimension, such as squeeze, copy.
    return cache.narrow(1, 0, count).view(cache.shape[0], count, cache.shape[3])


KVCache = FloatKVCache | Int8KVCache
Attend = Callable[[KVCache, Tensor, Tensor, Tensor, CallRange], Tensor]
"""A function that writes k and v `[1, s, kv heads, d]` into the cache and returns the attention of
q `[1, s, h, d]`, or of the last query alone if q is `[1, 1, h, d]`, as `[1, s or 1, h * d]`."""


def make_attention(
    spec: ArchSpec, lowering: LoweringSettings, sliding: bool
) -> tuple[KVCache, Attend]:
    """Create an empty cache for one layer and choose the function that attends to it."""
    slots = lowering.slots(spec.sliding_window if sliding else None)
    match lowering.cache:
        case CacheFormat.int8:
            cache = Int8KVCache(spec, slots)
        case CacheFormat.bf16:
            cache = FloatKVCache(spec, slots, torch.bfloat16)
        case CacheFormat.fp32:
            cache = FloatKVCache(spec, slots, torch.float32)
    if not sliding or window_covers_context(spec, lowering):
        return cache, attend_causal
    if lowering.sliding is SlidingForm.ring:
        return cache, attend_ring
    return cache, attend_masked if slots == lowering.max_context else attend_masked_ring


def _join_key_heads(out: Tensor) -> Tensor:
    """Attention `[kv heads, s, g, d]` as `[1, s, h * d]`."""
    kv_heads, length, shared, size = out.shape
    rows = out.view(kv_heads, length, shared * size).transpose(0, 1)
    return rows.reshape(1, length, kv_heads * shared * size)


def attend_causal(cache: KVCache, q: Tensor, k: Tensor, v: Tensor, call: CallRange) -> Tensor:
    """Attend to every position up to the query; a token's slot is its position."""
    _write_contiguous(cache, k, v, call.start)
    length = q.shape[1]
    if call.leading is None or _is_single_query(q):
        return _attend_all(cache, q, call.start + k.shape[1] - length, None)
    last = _attend_all(cache, q[:, -1:], call.start + length - 1, None)
    return _attend_leading(cache, q, call.leading, last)


def _attend_leading(cache: KVCache, q: Tensor, plan: LeadingPlan, last: Tensor) -> Tensor:
    """Attention of q `[1, s, h, d]` `[1, s, h * d]`, given that of its last query `[1, 1, h * d]`.

    The keys and values of this call are in the cache.
    """
    length, heads, size = q.shape[1:]
    leading = _matmul_attention(
        q.view(length, heads, size).narrow(0, 0, plan.num_queries),
        cache.first_as_float("keys", plan.num_keys),
        cache.first_as_float("values", plan.num_keys),
        plan.bias,
    )
    rows = torch.cat([leading, last.view(1, heads * size)]).index_select(0, plan.output_order)
    return rows.view(1, length, heads * size)


def _attend_all(cache: KVCache, q: Tensor, start: int, mask: Tensor | None) -> Tensor:
    """Attention of q `[1, s, h, d]` to the slots of the cache `[1, s, h * d]`."""
    keys, values = cache.contents("keys"), cache.contents("values")
    return _join_key_heads(cache.attend(cache.encode(q), keys, values, start, mask))


def _is_single_query(q: Tensor) -> bool:
    """Return True if q is the last query alone, even where the call's length is symbolic."""
    return isinstance(q.shape[1], int) and q.shape[1] == 1


def _matmul_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of q `[s, h, d]` to k and v `[kv heads, n, d]` in matrix products: `[s, h * d]`.

    Query heads that share a key head are further rows of one product. Tensors have at most three
    dimensions: of four, ExecuTorch asks whether they are an image, which it cannot tell while the
    lengths are symbols.
    """
    heads, size = q.shape[1:]
    rows = (q * size**-0.5).transpose(0, 1).reshape(k.shape[0], -1, size)
    scores = torch.bmm(rows, k.transpose(1, 2)) + bias
    out = torch.bmm(torch.softmax(scores, -1), v)
    return out.view(heads, -1, size).transpose(0, 1).reshape(-1, heads * size)


def attend_masked(cache: KVCache, q: Tensor, k: Tensor, v: Tensor, call: CallRange) -> Tensor:
    """Attend to the slots that the mask shows; a token's slot is its position."""
    _write_contiguous(cache, k, v, call.start)
    return _attend_window(cache, q, call)


def _attend_window(cache: KVCache, q: Tensor, call: CallRange) -> Tensor:
    """Attention of q `[1, s, h, d]` to the slots that the mask shows `[1, s, h * d]`."""
    assert call.mask is not None
    if call.window_leading is None or _is_single_query(q):
        mask = call.mask[-1:] if _is_single_query(q) else call.mask
        return _attend_all(cache, q, 0, mask)
    last = _attend_all(cache, q[:, -1:], 0, call.mask)
    return _attend_leading(cache, q, call.window_leading, last)


def _write_contiguous(cache: KVCache, k: Tensor, v: Tensor, start: int) -> None:
    """Write k and v to neighbouring slots, the first of them `start`."""
    for name, new in (("keys", k), ("values", v)):
        for value, slots in zip(cache.encode(new), cache.contents(name), strict=True):
            torch.ops.llama.update_cache(value, slots, start)


def attend_masked_ring(cache: KVCache, q: Tensor, k: Tensor, v: Tensor, call: CallRange) -> Tensor:
    """Attend to the slots that the mask shows; a token's slot is its position modulo the slots.

    This is ExecuTorch's own ring buffer.
    """
    assert call.slots is not None
    _write(cache, "keys", cache.encode(k), call.start, call.slots)
    _write(cache, "values", cache.encode(v), call.start, call.slots)
    return _attend_window(cache, q, call)


def attend_ring(cache: KVCache, q: Tensor, k: Tensor, v: Tensor, call: CallRange) -> Tensor:
    """Attend to the window before each query; a token's slot is its position modulo the window.

    `RingPlan` describes the three kinds of queries. Old slots are read before new tokens replace
    them: first for the block queries, then for the causal ones, then for the last one.
    """
    assert call.slots is not None
    assert call.ring_plan is not None
    plan, start, slots = call.ring_plan, call.start, call.slots
    queries, keys, values = cache.encode(q), cache.encode(k), cache.encode(v)
    cached_keys, cached_values = cache.contents("keys"), cache.contents("values")
    if _is_single_query(q):
        _write(cache, "keys", keys, start, slots)
        _write(cache, "values", values, start, slots)
        last = cache.attend(queries, cached_keys, cached_values, plan.last_slot, None)
        return _join_key_heads(last)

    # Looked up first: from here on new tokens replace old ones.
    in_blocks = cache.attend(
        _gather_blocks(queries, plan.block_queries),
        _gather_blocks(_append(cached_keys, keys, plan.num_old_slots), plan.block_keys),
        _gather_blocks(_append(cached_values, values, plan.num_old_slots), plan.block_keys),
        0,
        plan.block_mask,
    )
    in_blocks = in_blocks.view(cache.kv_heads, -1, *in_blocks.shape[2:])

    causal_slots = _after(in_blocks, slots.narrow(1, 0, plan.num_causal))
    _write(cache, "keys", _narrow(keys, 0, plan.num_causal), start, causal_slots)
    _write(cache, "values", _narrow(values, 0, plan.num_causal), start, causal_slots)
    causal_queries = _narrow(queries, 0, plan.num_causal)
    causal = cache.attend(causal_queries, cached_keys, cached_values, plan.causal_start, None)

    slots = _after(causal, slots)
    _write(cache, "keys", keys, start, slots)
    _write(cache, "values", values, start, slots)
    last_query = _narrow(queries, q.shape[1] - 1, 1)
    last = cache.attend(last_query, cached_keys, cached_values, plan.last_slot, None)
    out = torch.cat([causal, in_blocks, last], dim=1).index_select(1, plan.output_order)
    return _join_key_heads(out)


def _after(read: Tensor, slots: Tensor) -> Tensor:
    """Return `slots` unchanged, but dependent on `read`, so that a write to them comes after it.

    In an exported graph every write makes a new value; in a program all writes share one buffer.
    Only what a write needs as an input is certain to be computed before it.
    """
    return torch.where(read.reshape(-1)[:1] > 0, slots, slots)


def _write(cache: KVCache, name: str, new: Encoded, start: int, slots: Tensor) -> None:
    # Tokens are written in their order: of two for one slot the later stays.
    for value, stored in zip(new, cache.contents(name), strict=True):
        torch.ops.llama.update_cache_with_indices(value, stored, start, slots)


def _narrow(encoded: Encoded, start: int, length: int) -> Encoded:
    return tuple(x.narrow(1, start, length) for x in encoded)


def _append(ring: Encoded, new: Encoded, num_old_slots: int) -> Encoded:
    """The first `num_old_slots` slots of the ring, and behind them the new keys or values."""
    pairs = zip(_narrow(ring, 0, num_old_slots), new, strict=True)
    return tuple(torch.cat(pair, dim=1) for pair in pairs)


def _gather_blocks(encoded: Encoded, indices: Tensor) -> Encoded:
    """Rows of the sequence as a batch of blocks `[kv heads * blocks, length, g or 1, d]`."""
    return tuple(
        x.index_select(1, indices.flatten()).view(-1, indices.shape[1], *x.shape[2:])
        for x in encoded
    )
