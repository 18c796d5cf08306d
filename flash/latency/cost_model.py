"""Architectures as arrays, and what they cost on paper at one point of the workload.

Predictors take specs; the first thing they do is to gather the sizes that matter in a `SpecTable`,
a few microseconds a spec. Everything after that is array arithmetic. Who predicts for the same
specs again and again makes the table once and hands over that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from flash.arch import ArchSpec, Attention
from flash.device.workload import Phase, Point
from flash.lowering.settings import AttentionForm, LoweringSettings, SlidingForm

Values = Float[np.ndarray, " n"]

SIZES = (
    "model_dim",
    "ffn_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "sliding_window",
    "tie_embeddings",
    "qk_norm",
    "qkv_bias",
)
"""Attributes of a spec that a table holds as they are."""
_sizes = attrgetter(*SIZES)
_COUNTS = ("num_layers", "num_full", "num_sliding", "num_tail", "last_full", "last_sliding")
_COLUMN = {name: i for i, name in enumerate((*SIZES, *_COUNTS))}


@dataclass(frozen=True)
class SpecTable:
    """The sizes of n architectures that latency depends on.

    Where a layer stands is left out but for the tail: the layers from the last one with attention
    on, all of them where none has attention.

    Attributes:
        values: `SIZES`, then the number of layers, of full and of sliding ones, of layers in the
            tail; whether the last one with attention is full, and whether it is sliding.
    """

    values: Int[np.ndarray, "n 16"]

    @classmethod
    def of(cls, specs: "Specs") -> "SpecTable":
        """The table of these specs; a table is returned as it is."""
        if isinstance(specs, SpecTable):
            return specs
        full, sliding = Attention.full_attention, Attention.sliding_attention
        rows: list[tuple[int, ...]] = []
        for spec in specs:
            kinds = spec.layer_types
            last = max((i for i, kind in enumerate(kinds) if kind.attends), default=0)
            counts = (len(kinds), kinds.count(full), kinds.count(sliding), len(kinds) - last)
            ends = (kinds[last] is full, kinds[last] is sliding)
            rows.append((*_sizes(spec), *counts, *ends))
        return cls(np.array(rows, dtype=np.int64).reshape(-1, len(_COLUMN)))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> "SpecTable":
        """The table of some of the specs: a slice, a mask or an array of indices."""
        return SpecTable(self.values[index])

    def column(self, name: str) -> Int[np.ndarray, " n"]:
        """One size of every spec: a name in `SIZES`, or a count."""
        return self.values[:, _COLUMN[name]]

    @property
    def num_attending(self) -> Int[np.ndarray, " n"]:
        """Layers that have attention at all."""
        return self.column("num_full") + self.column("num_sliding")

    @property
    def q_dim(self) -> Int[np.ndarray, " n"]:
        """Width of all query heads."""
        return self.column("num_heads") * self.column("head_dim")

    @property
    def kv_dim(self) -> Int[np.ndarray, " n"]:
        """Width of all key heads, which is that of the value heads."""
        return self.column("num_kv_heads") * self.column("head_dim")

    @property
    def attention_weights(self) -> Int[np.ndarray, " n"]:
        """Weights of all attention projections."""
        per_layer = self.column("model_dim") * 2 * (self.q_dim + self.kv_dim)
        return self.num_attending * per_layer

    @property
    def query_weights(self) -> Int[np.ndarray, " n"]:
        """Weights of the projections of queries and outputs."""
        return self.num_attending * self.column("model_dim") * 2 * self.q_dim

    @property
    def ffn_weights(self) -> Int[np.ndarray, " n"]:
        """Weights of all FFN projections."""
        return self.column("num_layers") * 3 * self.column("model_dim") * self.column("ffn_dim")

    @property
    def head_weights(self) -> Int[np.ndarray, " n"]:
        """Weights of the output head."""
        return self.column("vocab_size") * self.column("model_dim")


Specs = Sequence[ArchSpec] | SpecTable
"""What predictors predict for."""


def parameters(table: SpecTable) -> Int[np.ndarray, " n"]:
    """`flash.arch.count_parameters(spec).total` of every spec."""
    tables = table.head_weights * (2 - table.column("tie_embeddings"))
    vectors = 2 * table.column("head_dim") * table.column("qk_norm")
    vectors += (table.q_dim + 2 * table.kv_dim) * table.column("qkv_bias")
    vectors = table.num_attending * (table.column("model_dim") + vectors)
    vectors += (table.column("num_layers") + 1) * table.column("model_dim")
    return tables + table.attention_weights + table.ffn_weights + vectors


def flops(table: SpecTable, point: Point) -> Int[np.ndarray, " n"]:
    """`flash.arch.prefill_flops` or `decode_flops` of every spec at this point."""
    first = point.tokens if point.phase is Phase.decode else 0
    tokens = 1 if point.phase is Phase.decode else point.tokens
    pairs = table.column("num_full") * _pairs(np.array(first + tokens), first, tokens)
    pairs += table.column("num_sliding") * _pairs(table.column("sliding_window"), first, tokens)
    linear = 2 * tokens * (table.attention_weights + table.ffn_weights)
    return linear + 2 * table.head_weights + 4 * pairs * table.q_dim


def _pairs(window: np.ndarray, first: int, tokens: int) -> np.ndarray:
    """Query-key pairs of `tokens` queries, the first at position `first`, within a window."""

    def until(positions: int) -> np.ndarray:
        growing = np.minimum(positions, window)
        return growing * (growing + 1) // 2 + (positions - growing) * window

    return until(first + tokens) - until(first)


WORK = (
    "ffn_gemm",
    "attention_gemm",
    "head",
    "ffn_elements",
    "model_elements",
    "full",
    "sliding",
    "mask",
    "operators",
    "call",
)
"""What `counted` counts. Up, gate and down projections are one column, since their work is in a
fixed proportion whatever the spec; so are multiply-adds and bytes of a kind of matrix product,
and, with the heads fixed, all that an attention layer does beside its projections."""

# Order-of-magnitude rates of one core: coefficients are then near each other, and near one where
# the device is such a core. Only their proportions matter (`NonNegativeRegression`).
_GEMM = 7e7
"""Multiply-adds of quantised matrix products a ms."""
_STREAM = 2e7
"""Packed weights read from memory a ms."""
_ATTENTION = 1.5e7
"""Multiply-adds of scores and weighted sums in `custom_sdpa` a ms."""
_PRODUCTS = 4.4e7
"""The same in XNNPACK's products a ms."""
_SCORES = 1.3e6
"""Scores a ms that XNNPACK adds a bias to and takes the softmax of."""
_CACHE = 8e5
"""Keys and values, as numbers, read from the cache a ms."""
_ELEMENTS = 2e5
"""Elements a ms through a half's chain of elementwise operators (about five, ~1 ns each)."""
_OPERATORS = 1e3
"""Calls of an operator a ms."""
_FFN_OPERATORS, _ATTENTION_OPERATORS = 12, 25
_CALL = 0.02
"""Entering and leaving a program, and its ends [ms]."""


def counted(
    table: SpecTable, point: Point, lowering: LoweringSettings, chunk: int
) -> Float[np.ndarray, "n 10"]:
    """Work by kind (`WORK`), each in ms on a nominal device, of every spec at this point.

    Source: the operators of flash/lowering/modules.py. `custom_sdpa` computes the causal triangle
    for full attention, in chunks too; given a mask it computes every slot of the cache. Matrix
    products compute all keys up to a call's last for each of its queries.

    Args:
        table: Architectures.
        point: What is timed.
        lowering: Forms of attention, slots of sliding layers, what is left out of a prompt.
        chunk: Most prompt tokens of one call.
    """
    tokens, _, calls = _lengths(point, chunk)
    layers, model_dim = table.column("num_layers"), table.column("model_dim")
    attending = table.num_attending
    skips = lowering.prefill_last_only and point.phase is Phase.prefill
    tail = table.column("num_tail") * skips
    lasts = (table.column("last_full") + table.column("last_sliding")) * skips

    def gemm(weights: np.ndarray, rows: int | np.ndarray) -> np.ndarray:
        return weights * (rows / _GEMM + calls / _STREAM)

    operators = _FFN_OPERATORS * layers + _ATTENTION_OPERATORS * attending
    columns = {
        "ffn_gemm": gemm(table.ffn_weights, _rows(tokens, calls, tail, layers)),
        "attention_gemm": gemm(table.query_weights, _rows(tokens, calls, lasts, attending))
        + gemm(table.attention_weights - table.query_weights, tokens),
        "head": gemm(table.head_weights, calls),
        "ffn_elements": tokens * (layers - tail) * table.column("ffn_dim") / _ELEMENTS,
        "model_elements": tokens
        * ((1 + layers - tail + attending) * model_dim + lasts * 2 * table.kv_dim)
        / _ELEMENTS,
        **_attention(table, point, lowering, chunk),
        "operators": calls * operators / _OPERATORS,
        "call": np.full(len(table), calls * _CALL),
    }
    return np.stack([columns[name] for name in WORK], axis=1)


def _lengths(point: Point, chunk: int) -> tuple[int, int, int]:
    """Tokens that go through, position of the first, calls."""
    if point.phase is Phase.decode:
        return 1, point.tokens, 1
    return point.tokens, 0, -(-point.tokens // chunk)


def _attention(
    table: SpecTable, point: Point, lowering: LoweringSettings, chunk: int
) -> dict[str, np.ndarray]:
    """The columns `full`, `sliding` and `mask` of `counted`."""
    tokens, first, calls = _lengths(point, chunk)
    last, prefill = first + tokens, point.phase is Phase.prefill
    window, sliding = table.column("sliding_window"), table.column("num_sliding")
    elements = tokens * (table.q_dim + 2 * table.kv_dim) / _ELEMENTS

    def attend(pairs: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One layer: pairs of query and key, keys read in each call."""
        read = 2 * calls * keys * table.kv_dim / _CACHE
        return 2 * pairs * table.q_dim / _ATTENTION + read

    full = attend(_pairs(np.array(last), first, tokens), np.array(last))
    # Of each call one query, over all keys up to the call's end.
    asked = np.minimum(np.arange(1, calls + 1) * chunk, tokens)
    last_full = attend(np.array(asked.sum()), np.array(asked.mean()))
    if lowering.attention is AttentionForm.matmul and prefill:
        pairs = float(np.diff(asked, prepend=0) @ asked)
        full = attend(np.array(0), np.array(asked.mean()))
        full = full + pairs * (2 * table.q_dim / _PRODUCTS + table.column("num_heads") / _SCORES)
    if lowering.sliding is SlidingForm.ring:
        seen = np.minimum(window, lowering.max_context)
        slide = attend(_pairs(seen, first, tokens), np.minimum(seen, last))
        last_slide, mask = attend(calls * seen, seen), np.zeros(len(table))
    else:
        slots = np.minimum(lowering.max_context, 2 * np.maximum(window, lowering.chunk))
        slide, last_slide = attend(tokens * slots, slots), attend(calls * slots, slots)
        mask = (sliding > 0) * tokens * slots / _ELEMENTS
    skips = lowering.prefill_last_only and prefill
    ends = {kind: table.column(f"last_{kind}") * skips for kind in ("full", "sliding")}
    whole = table.column("num_full") - ends["full"]
    return {
        "full": whole * (full + elements) + ends["full"] * last_full,
        "sliding": (sliding - ends["sliding"]) * (slide + elements) + ends["sliding"] * last_slide,
        "mask": mask,
    }


def last_half_share(
    table: SpecTable, point: Point, lowering: LoweringSettings
) -> Float[np.ndarray, " n"]:
    """Work of a prompt that is left of a model's last attention half, over that of all of it."""
    names = [WORK.index(name) for name in ("attention_gemm", "full", "sliding")]
    kinds = np.stack([table.column("last_full"), table.column("last_sliding")], axis=1)
    values = table.values.copy()
    values[:, [_COLUMN["num_full"], _COLUMN["num_sliding"]]] = kinds  # one half, the last one
    one = SpecTable(values)
    left, whole = (
        counted(one, point, replace(lowering, prefill_last_only=skip), lowering.chunk)[
            :, names
        ].sum(1)
        for skip in (True, False)
    )
    return left / np.maximum(whole, 1e-12)


def _rows(tokens: int, calls: int, tail: np.ndarray, all_: np.ndarray) -> np.ndarray:
    """Mean rows of a product of all layers, if those of the tail see one token of each call."""
    return tokens + (calls - tokens) * tail / np.maximum(all_, 1)


def shape_features(table: SpecTable) -> Float[np.ndarray, "n 5"]:
    """Logs of depth, model_dim and ffn_dim; shares of full and of sliding layers."""
    depth = table.column("num_layers")
    sizes = [np.log(table.column(name)) for name in ("num_layers", "model_dim", "ffn_dim")]
    shares = [table.column(name) / depth for name in ("num_full", "num_sliding")]
    return np.stack([*sizes, *shares], axis=1)
