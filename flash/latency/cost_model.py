"""Analytical cost model: parameters, FLOPs and counted work of many architectures at once.

Predictors accept specs and first gather their sizes in a `SpecTable`, which takes a few
microseconds a spec; everything after that is array arithmetic. Code that predicts repeatedly for
the same specs can build the table once and pass it in place of the specs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "sliding_window",
    "tie_embeddings",
    "qk_norm",
    "qkv_bias",
)
"""Attributes of a spec that a table holds unchanged."""
_sizes = attrgetter(*SIZES)
_COUNTS = (
    "num_layers",
    "num_full",
    "num_sliding",
    "num_tail",
    "last_full",
    "last_sliding",
    "ffn_total",
    "ffn_tail",
)
_COLUMN = {name: i for i, name in enumerate((*SIZES, *_COUNTS))}


@dataclass(frozen=True)
class SpecTable:
    """Table of the sizes of n architectures on which latency depends.

    The positions of layers are left out except for the tail: the layers from the last one with
    attention on, or all layers if none has attention.

    Attributes:
        values: Columns `SIZES`; then the numbers of layers, of layers with full attention, of
            layers with sliding attention and of layers in the tail; then two 0/1 flags: the last
            layer with attention is full, or it is sliding; then the sums of the FFN widths of all
            layers and of those in the tail.
        ffn_dims: FFN width of each layer. The last column is the last layer's; specs with fewer
            layers than columns have zeros in front.
    """

    values: Int[np.ndarray, "n 17"]
    ffn_dims: Int[np.ndarray, "n depth"]

    @classmethod
    def of(cls, specs: "Specs") -> "SpecTable":
        """Build the table of these specs; a table is returned unchanged."""
        if isinstance(specs, SpecTable):
            return specs
        full, sliding = Attention.full_attention, Attention.sliding_attention
        rows: list[tuple[int, ...]] = []
        widths: list[tuple[int, ...]] = []
        depth = max((len(spec.layer_types) for spec in specs), default=0)
        for spec in specs:
            kinds, own = spec.layer_types, spec.ffn_dims
            last = max((i for i, kind in enumerate(kinds) if kind.attends), default=0)
            counts = (len(kinds), kinds.count(full), kinds.count(sliding), len(kinds) - last)
            ends = (kinds[last] is full, kinds[last] is sliding)
            widths.append((0,) * (depth - len(kinds)) + own)
            rows.append((*_sizes(spec), *counts, *ends, sum(own), sum(own[last:])))
        return cls(
            np.array(rows, dtype=np.int64).reshape(-1, len(_COLUMN)),
            np.array(widths, dtype=np.int64).reshape(len(specs), depth),
        )

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> "SpecTable":
        """Select some of the specs by a slice, a mask or an array of indices."""
        return SpecTable(self.values[index], self.ffn_dims[index])

    def column(self, name: str) -> Int[np.ndarray, " n"]:
        """Return one column for every spec: a name in `SIZES`, a count or a flag."""
        return self.values[:, _COLUMN[name]]

    @property
    def num_attending(self) -> Int[np.ndarray, " n"]:
        """Number of layers with attention, full or sliding."""
        return self.column("num_full") + self.column("num_sliding")

    @property
    def q_dim(self) -> Int[np.ndarray, " n"]:
        """Total width of the query heads."""
        return self.column("num_heads") * self.column("head_dim")

    @property
    def kv_dim(self) -> Int[np.ndarray, " n"]:
        """Total width of the key heads, equal to that of the value heads."""
        return self.column("num_kv_heads") * self.column("head_dim")

    @property
    def attention_weights(self) -> Int[np.ndarray, " n"]:
        """Number of weights of all attention projections."""
        per_layer = self.column("model_dim") * 2 * (self.q_dim + self.kv_dim)
        return self.num_attending * per_layer

    @property
    def query_weights(self) -> Int[np.ndarray, " n"]:
        """Number of weights of the query and output projections."""
        return self.num_attending * self.column("model_dim") * 2 * self.q_dim

    @property
    def ffn_weights(self) -> Int[np.ndarray, " n"]:
        """Number of weights of all FFN projections."""
        return 3 * self.column("model_dim") * self.column("ffn_total")

    @property
    def head_weights(self) -> Int[np.ndarray, " n"]:
        """Number of weights of the output head."""
        return self.column("vocab_size") * self.column("model_dim")


Specs = Sequence[ArchSpec] | SpecTable
"""Architectures to predict for: specs, or the table built from them."""


def parameters(table: SpecTable) -> Int[np.ndarray, " n"]:
    """Compute `flash.arch.count_parameters(spec).total` for every spec."""
    tables = table.head_weights * (2 - table.column("tie_embeddings"))
    vectors = 2 * table.column("head_dim") * table.column("qk_norm")
    vectors += (table.q_dim + 2 * table.kv_dim) * table.column("qkv_bias")
    vectors = table.num_attending * (table.column("model_dim") + vectors)
    vectors += (table.column("num_layers") + 1) * table.column("model_dim")
    return tables + table.attention_weights + table.ffn_weights + vectors


def flops(table: SpecTable, point: Point) -> Int[np.ndarray, " n"]:
    """Compute `flash.arch.prefill_flops` or `decode_flops` for every spec at this point."""
    first = point.tokens if point.phase is Phase.decode else 0
    tokens = 1 if point.phase is Phase.decode else point.tokens
    pairs = table.column("num_full") * _pairs(np.array(first + tokens), first, tokens)
    pairs += table.column("num_sliding") * _pairs(table.column("sliding_window"), first, tokens)
    linear = 2 * tokens * (table.attention_weights + table.ffn_weights)
    return linear + 2 * table.head_weights + 4 * pairs * table.q_dim


def _pairs(window: np.ndarray, first: int, tokens: int) -> np.ndarray:
    """Count query-key pairs within a window, for queries at positions first..first+tokens-1."""

    def until(positions: int) -> np.ndarray:
        growing = np.minimum(positions, window)
        return growing * (growing + 1) // 2 + (positions - growing) * window

    return until(first + tokens) - until(first)


WORK_COLUMNS = (
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
"""Columns of `nominal_work_ms`. Up, gate and down projections share a column, since their work has
a fixed proportion in every spec. So do the multiply-adds and bytes of one kind of matrix product
and, with fixed heads, all work of an attention layer apart from its projections."""

# Order-of-magnitude rates of one core, with which the fitted coefficients are near each other, and
# near 1 on such a core. Only the proportions of the rates matter (`NonNegativeRegression`).
_GEMM = 7e7
"""Multiply-adds of quantized matrix products [1/ms]."""
_STREAM = 2e7
"""Packed weights read from memory [1/ms]."""
_ATTENTION = 1.5e7
"""Multiply-adds of scores and weighted sums in `custom_sdpa` [1/ms]."""
_PRODUCTS = 4.4e7
"""Multiply-adds of scores and weighted sums in XNNPACK's matrix products [1/ms]."""
_SCORES = 1.3e6
"""Attention scores to which XNNPACK adds a bias and applies softmax [1/ms]."""
_CACHE = 8e5
"""Elements of keys and values read from the cache [1/ms]."""
_ELEMENTS = 2e5
"""Elements that pass through the elementwise operators of a half, about five [1/ms]."""
_OPERATORS = 1e3
"""Calls of an operator [1/ms]."""
_FFN_OPERATORS, _ATTENTION_OPERATORS = 12, 25
_CALL = 0.02
"""Time to enter and leave a program, including embedding and final norm [ms]."""


def nominal_work_ms(
    table: SpecTable, point: Point, lowering: LoweringSettings, chunk: int
) -> Float[np.ndarray, "n 10"]:
    """Count the work of every spec at this point, by `WORK_COLUMNS`, in ms of a nominal device.

    Source: the operators of flash/lowering/modules.py. `custom_sdpa` computes the causal triangle
    for full attention, also when the prompt is split into chunks; given a mask, it computes every
    slot of the cache. Attention by matrix products computes all keys up to the last of the call for
    each query of the call, or all slots of a ring. What hides keys is computed once a call for all
    layers of a kind.

    Args:
        table: Architectures.
        point: Point of the workload.
        lowering: Forms of attention, slots of sliding layers, work skipped in a prefill.
        chunk: Greatest number of prompt tokens in one call.
    """
    tokens, _, calls = _lengths(point, chunk)
    layers, model_dim = table.column("num_layers"), table.column("model_dim")
    attending = table.num_attending
    skips = lowering.prefill_last_only and point.phase is Phase.prefill
    tail = table.column("num_tail") * skips
    ffn_total, ffn_tail = table.column("ffn_total"), table.column("ffn_tail") * skips
    lasts = (table.column("last_full") + table.column("last_sliding")) * skips

    def gemm(weights: np.ndarray, rows: int | np.ndarray) -> np.ndarray:
        return weights * (rows / _GEMM + calls / _STREAM)

    operators = _FFN_OPERATORS * layers + _ATTENTION_OPERATORS * attending
    columns = {
        "ffn_gemm": gemm(table.ffn_weights, _rows(tokens, calls, ffn_tail, ffn_total)),
        "attention_gemm": gemm(table.query_weights, _rows(tokens, calls, lasts, attending))
        + gemm(table.attention_weights - table.query_weights, tokens),
        "head": gemm(table.head_weights, calls),
        "ffn_elements": tokens * (ffn_total - ffn_tail) / _ELEMENTS,
        "model_elements": tokens
        * ((1 + layers - tail + attending) * model_dim + lasts * 2 * table.kv_dim)
        / _ELEMENTS,
        **_attention(table, point, lowering, chunk),
        "operators": calls * operators / _OPERATORS,
        "call": np.full(len(table), calls * _CALL),
    }
    return np.stack([columns[name] for name in WORK_COLUMNS], axis=1)


def _lengths(point: Point, chunk: int) -> tuple[int, int, int]:
    """Return the number of processed tokens, the position of the first, and the calls."""
    if point.phase is Phase.decode:
        return 1, point.tokens, 1
    return point.tokens, 0, -(-point.tokens // chunk)


def _attention(
    table: SpecTable, point: Point, lowering: LoweringSettings, chunk: int
) -> dict[str, np.ndarray]:
    """Compute the columns `full`, `sliding` and `mask` of `nominal_work_ms`."""
    tokens, first, calls = _lengths(point, chunk)
    last, prefill = first + tokens, point.phase is Phase.prefill
    window, sliding = table.column("sliding_window"), table.column("num_sliding")
    elements = tokens * (table.q_dim + 2 * table.kv_dim) / _ELEMENTS

    def attend(pairs: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Time one layer, given its query-key pairs and the keys that each call reads."""
        read = 2 * calls * keys * table.kv_dim / _CACHE
        return 2 * pairs * table.q_dim / _ATTENTION + read

    def multiply(pairs: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Time one layer by matrix products, which work on copies of the keys."""
        rates = 2 * table.q_dim / _PRODUCTS + table.column("num_heads") / _SCORES
        return attend(np.array(0), keys) + pairs * rates

    full = attend(_pairs(np.array(last), first, tokens), np.array(last))
    # One query of each call, over all keys up to the end of the call.
    asked = np.minimum(np.arange(1, calls + 1) * chunk, tokens)
    last_full = attend(np.array(asked.sum()), np.array(asked.mean()))
    products = lowering.attention is AttentionForm.matmul and prefill
    group = table.column("num_heads") / table.column("num_kv_heads")
    pairs, mask = np.diff(asked, prepend=0) @ asked, np.zeros(len(table))
    if products:
        full = multiply(pairs, np.array(asked.mean()))
        mask = mask + (table.column("num_full") > 0) * pairs * group / _SCORES
    if lowering.sliding is SlidingForm.ring:
        seen = np.minimum(window, lowering.max_context)
        slide = attend(_pairs(seen, first, tokens), np.minimum(seen, last))
        last_slide = attend(calls * seen, seen)
    else:
        slots = np.minimum(lowering.max_context, 2 * np.maximum(window, lowering.chunk))
        slide, last_slide = attend(tokens * slots, slots), attend(calls * slots, slots)
        hidden = tokens * slots / _ELEMENTS
        if products:
            ring = slots < lowering.max_context
            seen = np.where(ring, tokens * slots, pairs)
            slide = multiply(seen, np.where(ring, slots, asked.mean()))
            hidden = 2 * seen * group / _SCORES  # too old, or too new
        mask = mask + (sliding > 0) * hidden
    skips = lowering.prefill_last_only and prefill
    ends = {kind: table.column(f"last_{kind}") * skips for kind in ("full", "sliding")}
    whole = table.column("num_full") - ends["full"]
    return {
        "full": whole * (full + elements) + ends["full"] * last_full,
        "sliding": (sliding - ends["sliding"]) * (slide + elements) + ends["sliding"] * last_slide,
        "mask": mask,
    }


def _rows(tokens: int, calls: int, tail: np.ndarray, all_: np.ndarray) -> np.ndarray:
    """Average the rows of a product over all layers, or weights; the tail sees one token a call."""
    return tokens + (calls - tokens) * tail / np.maximum(all_, 1)


def shape_features(table: SpecTable) -> Float[np.ndarray, "n 5"]:
    """Return logs of depth and mean widths, and shares of full and sliding layers."""
    depth = table.column("num_layers")
    ffn_dims = table.column("ffn_total") / depth
    sizes = [np.log(each) for each in (depth, table.column("model_dim"), ffn_dims)]
    shares = [table.column(name) / depth for name in ("num_full", "num_sliding")]
    return np.stack([*sizes, *shares], axis=1)
