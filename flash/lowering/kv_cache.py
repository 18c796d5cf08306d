"""The caches of attention layers: which keys a query meets, and in which operator.

A store holds keys and values in float32 or int8. What happens around it is a function of its own:
`causal`, `masked`, `masked_ring` or `ring`.

Shapes: s tokens of this call, l cache slots, h heads, d head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flash.arch import ArchSpec, CacheFormat
from flash.lowering.attention_plan import CallRange, sees_all
from flash.lowering.settings import LoweringSettings, SlidingForm

Coded = tuple[Tensor, ...]
"""Keys, values or queries `[b, s, h, d]` as stored: the numbers, then how to read them."""


class FloatStore(nn.Module):
    """Keys and values of one layer in float32, updated in place."""

    def __init__(self, spec: ArchSpec, slots: int) -> None:
        super().__init__()
        shape = (1, slots, spec.num_kv_heads, spec.head_dim)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)

    def encode(self, x: Tensor) -> Coded:
        """Keys, values or queries as they are stored."""
        return (x,)

    def stored(self, name: str) -> Coded:
        """All slots of "keys" or "values"."""
        return (getattr(self, name),)

    def first(self, name: str, count: int) -> Tensor:
        """The first slots of "keys" or "values" as numbers `[count, kv heads, d]`."""
        return self.stored(name)[0].narrow(1, 0, count)[0]

    def attend(
        self,
        q: Coded,
        keys: Coded,
        values: Coded,
        start: int,
        mask: Tensor | None,
        causal: bool = True,
    ) -> Tensor:
        """Attention of the s queries q, the first at position `start`.

        Causal, or each to all `start + s` keys, or to what the mask `[s, keys]` shows.
        """
        position = (start, None, 0.0, causal) if mask is None else (0, mask, 0.0, False)
        return torch.ops.llama.custom_sdpa(q[0], keys[0], values[0], *position)


class Int8Store(nn.Module):
    """Keys and values in int8 with a scale and zero point for each token and head."""

    def __init__(self, spec: ArchSpec, slots: int) -> None:
        super().__init__()
        shape = (1, slots, spec.num_kv_heads, spec.head_dim)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int8), persistent=False)
            scales = torch.ones((*shape[:3], 1))
            self.register_buffer(f"{name}_scale", scales, persistent=False)
            self.register_buffer(f"{name}_zero", scales.to(torch.int8), persistent=False)

    def encode(self, x: Tensor) -> Coded:
        """int8 values, float scales and int8 zero points of each token and head."""
        ops = torch.ops.quantized_decomposed
        scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        value = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
        return value, scale.to(torch.float32), zero.to(torch.int8)

    def stored(self, name: str) -> Coded:
        """All slots of "keys" or "values"."""
        return getattr(self, name), getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero")

    def first(self, name: str, count: int) -> Tensor:
        """The first slots of "keys" or "values" as numbers `[count, kv heads, d]`."""
        value, scale, zero = (x.narrow(1, 0, count)[0] for x in self.stored(name))
        # The operator subtracts in the zero point's type.
        return torch.ops.quantized_decomposed.dequantize_per_token(
            value, scale, zero.to(torch.int64), -128, 127, torch.int8, torch.float32
        )

    def attend(
        self,
        q: Coded,
        keys: Coded,
        values: Coded,
        start: int,
        mask: Tensor | None,
        causal: bool = True,
    ) -> Tensor:
        """Attention of the s queries q, the first at position `start`.

        Causal, or each to all `start + s` keys, or to what the mask `[s, keys]` shows.
        """
        position = (start, None, 0.0, causal) if mask is None else (0, mask, 0.0, False)
        scales = (q[2], q[1], keys[2], keys[1], values[2], values[1])
        return torch.ops.llama.custom_quantized_sdpa(
            q[0], keys[0], values[0], *position, None, *scales
        )


Store = FloatStore | Int8Store
Attend = Callable[[Store, Tensor, Tensor, Tensor, CallRange], Tensor]
"""Stores k and v `[1, s, kv heads, d]` and returns the attention of q `[1, s, heads, d]`, or of the
last query alone `[1, 1, heads, d]`."""


def attention_of(spec: ArchSpec, settings: LoweringSettings, sliding: bool) -> tuple[Store, Attend]:
    """An empty cache for one layer and what to do with it."""
    slots = settings.slots(spec.sliding_window if sliding else None)
    store = FloatStore if settings.cache is CacheFormat.fp32 else Int8Store
    if not sliding or sees_all(spec, settings):
        return store(spec, slots), causal
    if settings.sliding is SlidingForm.ring:
        return store(spec, slots), ring
    return store(spec, slots), masked if slots == settings.max_context else masked_ring


def causal(store: Store, q: Tensor, k: Tensor, v: Tensor, place: CallRange) -> Tensor:
    """Everything up to the query; slot = position."""
    _write_linear(store, k, v, place.start)
    queries, keys, values = store.encode(q), store.stored("keys"), store.stored("values")
    alone, plan = _is_last(q), place.last
    if plan is None:
        start = place.start + k.shape[1] - 1 if alone else place.start
        return store.attend(queries, keys, values, start, None)
    heads, size = q.shape[2:]
    if alone:
        others = store.attend(queries, keys, values, plan.alone_start, None).view(1, heads * size)
    elif plan.bias is None:
        first = _part(queries, 0, plan.others)
        others = store.attend(first, keys, values, plan.others_start, None)
        others = others.view(-1, heads * size)
    else:
        first_keys, first_values = store.first("keys", plan.keys), store.first("values", plan.keys)
        first_queries = q.view(-1, heads, size).narrow(0, 0, plan.others)
        others = _products(first_queries, first_keys, first_values, plan.bias)
    shared = tuple(_share_keys(x, k.shape[2]) for x in _part(queries, q.shape[1] - 1, 1))
    last = store.attend(shared, keys, values, plan.start, None, causal=False)
    last = last.transpose(1, 2).reshape(1, heads * size)
    return torch.cat([others, last]).index_select(0, plan.apart if alone else plan.order)[None]


def _is_last(q: Tensor) -> bool:
    """Whether q is the last query alone, whatever the length of the call."""
    return isinstance(q.shape[1], int) and q.shape[1] == 1


def _products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of q `[s, h, d]` to k and v `[n, kv heads, d]` in matrix products: `[s, h * d]`.

    Query heads that share a key head are more rows of one product. Tensors have at most three
    dimensions, since ExecuTorch asks of four whether they are an image, which it cannot tell while
    the lengths are symbols.
    """
    heads, size = q.shape[1:]
    rows = (q * size**-0.5).transpose(0, 1).reshape(k.shape[1], -1, size)
    scores = torch.bmm(rows, k.permute(1, 2, 0)) + bias
    out = torch.bmm(torch.softmax(scores, -1), v.transpose(0, 1))
    return out.view(heads, -1, size).transpose(0, 1).reshape(-1, heads * size)


def _share_keys(x: Tensor, kv_heads: int) -> Tensor:
    """One query `[1, 1, h, d]` as h / kv_heads queries of kv_heads heads: each key is read once."""
    return x.view(1, kv_heads, -1, x.shape[-1]).transpose(1, 2).contiguous()


def masked(store: Store, q: Tensor, k: Tensor, v: Tensor, place: CallRange) -> Tensor:
    """What the mask shows; slot = position."""
    _write_linear(store, k, v, place.start)
    keys, values = store.stored("keys"), store.stored("values")
    return store.attend(store.encode(q), keys, values, place.start, _mask(q, place))


def _mask(q: Tensor, place: CallRange) -> Tensor:
    assert place.mask is not None
    return place.mask[-1:] if _is_last(q) else place.mask


def _write_linear(store: Store, k: Tensor, v: Tensor, start: int) -> None:
    for name, new in (("keys", k), ("values", v)):
        for value, slots in zip(store.encode(new), store.stored(name), strict=True):
            torch.ops.llama.update_cache(value, slots, start)


def masked_ring(store: Store, q: Tensor, k: Tensor, v: Tensor, place: CallRange) -> Tensor:
    """What the mask shows; slot = position modulo slots: ExecuTorch's ring buffer."""
    assert place.slots is not None
    _write(store, "keys", store.encode(k), place.start, place.slots)
    _write(store, "values", store.encode(v), place.start, place.slots)
    keys, values = store.stored("keys"), store.stored("values")
    return store.attend(store.encode(q), keys, values, 0, _mask(q, place))


def ring(store: Store, q: Tensor, k: Tensor, v: Tensor, place: CallRange) -> Tensor:
    """The window before each query, in three parts; slot = position modulo window."""
    assert place.slots is not None
    assert place.plan is not None
    plan, start, slots = place.plan, place.start, place.slots
    queries, keys, values = store.encode(q), store.encode(k), store.encode(v)
    all_keys, all_values = store.stored("keys"), store.stored("values")
    if _is_last(q):
        _write(store, "keys", keys, start, slots)
        _write(store, "values", values, start, slots)
        return store.attend(queries, all_keys, all_values, plan.last_start, None)

    # Looked up first: from here on new tokens replace old ones.
    later = store.attend(
        _blocks(queries, plan.queries),
        _blocks(_pool(all_keys, keys, plan.old), plan.keys),
        _blocks(_pool(all_values, values, plan.old), plan.keys),
        0,
        plan.mask,
    )
    later = later.view(1, -1, *later.shape[2:])

    first = _after(later, slots.narrow(1, 0, plan.early))
    _write(store, "keys", _part(keys, 0, plan.early), start, first)
    _write(store, "values", _part(values, 0, plan.early), start, first)
    early_queries = _part(queries, 0, plan.early)
    early = store.attend(early_queries, all_keys, all_values, plan.early_start, None)

    slots = _after(early, slots)
    _write(store, "keys", keys, start, slots)
    _write(store, "values", values, start, slots)
    last_query = _part(queries, q.shape[1] - 1, 1)
    last = store.attend(last_query, all_keys, all_values, plan.last_start, None)
    return torch.cat([early, later, last], dim=1).index_select(1, plan.order)


def _after(read: Tensor, slots: Tensor) -> Tensor:
    """The same slots, known only once `read` is.

    In an exported graph every write makes a new value, in a program they share one buffer: only
    what a write needs is sure to happen before it.
    """
    return torch.where(read.reshape(-1)[:1] > 0, slots, slots)


def _write(store: Store, name: str, new: Coded, start: int, slots: Tensor) -> None:
    # Tokens are written in their order: of two for one slot the later stays.
    for value, stored in zip(new, store.stored(name), strict=True):
        torch.ops.llama.update_cache_with_indices(value, stored, start, slots)


def _part(coded: Coded, start: int, length: int) -> Coded:
    return tuple(x.narrow(1, start, length) for x in coded)


def _pool(ring: Coded, new: Coded, old: int) -> Coded:
    pairs = zip(_part(ring, 0, old), new, strict=True)
    return tuple(torch.cat(pair, dim=1) for pair in pairs)


def _blocks(coded: Coded, chosen: Tensor) -> Coded:
    """Rows of the sequence as a batch of blocks `[blocks, length, h, d]`."""
    return tuple(
        x.index_select(1, chosen.flatten()).view(*chosen.shape, *x.shape[2:]) for x in coded
    )
