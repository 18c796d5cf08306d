"""Sums of measured half-blocks, interpolated for any width and depth of the space.

All attention halves of a kind share the plan of a call, such as a mask. One half measured alone is
plan and half; a pair has a half more; the last half of a model, which answers for one token, is
measured as well. From these three follow the latencies of plan, half and last half.

The latency of an attention half depends on its kind, its heads and model_dim, that of an FFN half
on model_dim and ffn_dim, that of the ends on model_dim and vocab_size. Their work is at most
bilinear in the widths (a matrix product costs model_dim x ffn_dim). Each is therefore measured on a
small grid and interpolated linearly on each axis of a width, and the number of lowerings does not
grow with the number of architectures. Numbers of heads are few, and all are measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flash.arch import ArchSpec, Attention
from flash.device.workload import Phase, Point
from flash.errors import InputError
from flash.latency.cost_model import Specs, SpecTable, Values
from flash.lowering.blocks import LAST, PAIR
from flash.lowering.settings import LoweringSettings

FIXED_SIZES = (
    "head_dim",
    "qk_norm",
    "qkv_bias",
    "sliding_window",
)
"""Sizes that affect blocks and that the search does not change."""


Heads = tuple[int, int]
"""Numbers of query heads and of key and value heads."""


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Shape of one measurable part of a decoder.

    Attributes:
        name: Name of its `BlockKind`.
        model_dim: Width of the residual stream.
        ffn_dim: Hidden width of an FFN half, else None.
        heads: Query heads and key heads of attention halves, else None.
        vocab_size: Rows of embedding and head, else None.
    """

    name: str
    model_dim: int
    ffn_dim: int | None = None
    heads: Heads | None = None
    vocab_size: int | None = None

    @property
    def table(self) -> "Table":
        """Key of the table in which the part is interpolated."""
        return self.name, self.heads or self.vocab_size


Table = tuple[str, Heads | int | None]
"""Key of a table: the name of the parts, and their heads or vocabulary if they depend on them."""
ENDS, FFN = "ends", "ffn"
_PLAN = "_plan"
"""End of the name of what halves of a kind share, with the cost of a call."""


def grid_points(choices: Sequence[int], num: int) -> tuple[int, ...]:
    """Select `num` evenly spaced choices, both ends included; all if there are fewer."""
    values = sorted(set(choices))
    picked = np.linspace(0, len(values) - 1, min(num, len(values))).round().astype(int)
    return tuple(values[i] for i in picked)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Grid of measured parts.

    Attention is measured at every width with all numbers of heads, FFNs at every pair of widths,
    and the ends at every width with all vocabularies.
    """

    model_dims: tuple[int, ...]
    ffn_dims: tuple[int, ...]
    kinds: tuple[Attention, ...]
    heads: tuple[Heads, ...]
    vocab_sizes: tuple[int, ...]

    def parts(self) -> list[BlockShape]:
        """List all parts to measure."""
        attending = [kind.value for kind in self.kinds if kind.attends]
        return [
            *(
                BlockShape(name=ENDS, model_dim=d, vocab_size=size)
                for size in self.vocab_sizes
                for d in self.model_dims
            ),
            *(
                BlockShape(name=f"{kind}{form}", model_dim=d, heads=heads)
                for heads in self.heads
                for kind in attending
                for form in ("", PAIR, LAST)
                for d in self.model_dims
            ),
            *(
                BlockShape(name=FFN, model_dim=d, ffn_dim=f)
                for d in self.model_dims
                for f in self.ffn_dims
            ),
        ]


@dataclass(frozen=True)
class Composition:
    """Sums of blocks for n models.

    Attributes:
        total_ms: Sum of the latencies of all parts [ms].
        num_calls: Number of parts in the sum that contain the cost of a call: the ends, each FFN
            half, and the plan of each kind of attention.
    """

    total_ms: Values
    num_calls: Values

    def __getitem__(self, index: Any) -> "Composition":
        """Select some of the models."""
        return Composition(self.total_ms[index], self.num_calls[index])


class BlockTable:
    """Latencies of parts at one point of the workload, which add up to those of whole models.

    Args:
        point: Measured point of the workload.
        base: Spec with the fixed sizes of the measured parts.
        grid: Grid of measured parts.
        values_ms: Latency of each part of the grid [ms].
        lowering: Settings of the programs; they tell which work whole models skip in a prefill.
    """

    def __init__(
        self,
        point: Point,
        base: ArchSpec,
        grid: Grid,
        values_ms: Mapping[BlockShape, float],
        lowering: LoweringSettings,
    ) -> None:
        self.point, self._lowering = point, lowering
        self.grid = grid
        self.smallest_ms = min(values_ms[part] for part in grid.parts())
        self._fixed = tuple(getattr(base, name) for name in FIXED_SIZES)
        self._tables: dict[Table, np.ndarray] = {
            part.table: np.empty((len(grid.model_dims), len(_axis(grid, part.name))))
            for part in grid.parts()
        }
        for part in grid.parts():
            row = grid.model_dims.index(part.model_dim)
            column = 0 if part.ffn_dim is None else grid.ffn_dims.index(part.ffn_dim)
            self._tables[part.table][row, column] = values_ms[part]
        for heads in grid.heads:
            for kind in grid.kinds:
                if kind.attends:
                    self._separate(kind.value, heads)

    def _separate(self, kind: str, heads: Heads) -> None:
        """Separate the latencies of half, plan and last half."""
        forms = [f"{kind}{form}" for form in ("", PAIR, LAST)]
        one, pair, last = (self._tables.pop((name, heads)) for name in forms)
        plan = 2 * one - pair
        self._tables[kind, heads] = pair - one
        self._tables[f"{kind}{_PLAN}", heads] = plan
        self._tables[f"{kind}{LAST}", heads] = last - plan

    def compose(self, specs: Specs) -> "Composition":
        """Sum the parts of each model.

        Raises:
            InputError: A spec has a kind, a vocabulary or numbers of heads that were not measured,
                or differs from the measured blocks in `FIXED_SIZES`.
        """
        table = SpecTable.of(specs)
        self._check(table)
        depths = table.column("num_layers")
        whole, tail = self._ffns(table)
        total = self._ends(table) + whole
        num_kinds = np.zeros(len(table))
        for kind, numbers in _counts(table).items():
            if kind.attends and numbers.any():
                present = numbers > 0
                total += numbers * self._halves(kind.value, table)
                total += present * self._halves(f"{kind.value}{_PLAN}", table)
                num_kinds += present
        if self._lowering.prefill_last_only and self.point.phase is Phase.prefill:
            total -= self._unread(table, tail)
        return Composition(total, 1 + depths + num_kinds)

    def _unread(self, table: SpecTable, ffns: Values) -> Values:
        """Compute the excess of the parts, measured on all tokens, over those in a model's tail.

        An FFN in the tail processes one token of each call.

        Args:
            table: Sizes of the models.
            ffns: Latencies of the FFN halves in the tail [ms].
        """
        tokens, chunk = self.point.tokens, self._lowering.chunk
        one_token = -(-tokens // chunk) / tokens
        unread = (1 - one_token) * ffns
        for kind in (Attention.full_attention, Attention.sliding_attention):
            last = table.column(f"last_{kind.value.removesuffix('_attention')}")
            if last.any():
                unread += last * self._halves(kind.value, table)
                unread -= last * self._halves(f"{kind.value}{LAST}", table)
        return unread

    def _ffns(self, table: SpecTable) -> tuple[Values, Values]:
        """Sum the FFN halves of all layers, and of those in the tail [ms]."""
        layers, model_dims = table.column("num_layers"), table.column("model_dim")
        widest = table.ffn_dims.max(axis=1, initial=0)
        one_ms = self._at((FFN, None), model_dims, widest)
        whole, last = layers * one_ms, table.column("num_tail") * one_ms
        [mixed] = (table.column("ffn_total") < layers * widest).nonzero()
        models, places = table.ffn_dims[mixed].nonzero()
        if len(models):
            widths = table.ffn_dims[mixed][models, places]
            each_ms = self._at((FFN, None), model_dims[mixed][models], widths)
            tail = places >= table.ffn_dims.shape[1] - table.column("num_tail")[mixed][models]
            whole[mixed] = np.bincount(models, each_ms, len(mixed))
            last[mixed] = np.bincount(models, each_ms * tail, len(mixed))
        return whole, last

    def _halves(self, name: str, table: SpecTable) -> Values:
        """Interpolate the latency of one part of the attention halves for each model [ms]."""
        keys = {_code(*heads): (name, heads) for heads in self.grid.heads}
        return self._each(keys, _codes(table), table)

    def _ends(self, table: SpecTable) -> Values:
        """Interpolate the latency of embedding and head for each model [ms]."""
        keys = {size: (ENDS, size) for size in self.grid.vocab_sizes}
        return self._each(keys, table.column("vocab_size"), table)

    def _each(self, keys: Mapping[int, Table], chosen: np.ndarray, table: SpecTable) -> Values:
        """Interpolate each model in the table that `keys` has for its value in `chosen` [ms]."""
        model_dims = table.column("model_dim")
        if len(keys) == 1:
            return self._at(next(iter(keys.values())), model_dims)
        found = np.zeros(len(table))
        for value, key in keys.items():
            mine = chosen == value
            found[mine] = self._at(key, model_dims[mine])
        return found

    def _at(self, key: Table, x: np.ndarray, y: np.ndarray | None = None) -> Values:
        """Interpolate a part at widths x, and an FFN half at FFN widths y [ms]."""
        table = self._tables[key]
        i, u = _locate(self.grid.model_dims, x)
        next_i = np.minimum(i + 1, table.shape[0] - 1)
        if y is None:
            return (1 - u) * table[i, 0] + u * table[next_i, 0]
        j, v = _locate(self.grid.ffn_dims, y)
        next_j = np.minimum(j + 1, table.shape[1] - 1)
        low = (1 - v) * table[i, j] + v * table[i, next_j]
        high = (1 - v) * table[next_i, j] + v * table[next_i, next_j]
        return (1 - u) * low + u * high

    def _check(self, table: SpecTable) -> None:
        for name, expected in zip(FIXED_SIZES, self._fixed, strict=True):
            wrong = table.column(name)[table.column(name) != expected]
            if len(wrong):
                raise InputError(
                    f"arch.{name}={wrong[0]}: expected {expected}, as in the measured blocks of "
                    f"{self.point}; measure blocks for this backbone"
                )
        sizes = table.column("vocab_size")
        for size in sizes[~np.isin(sizes, self.grid.vocab_sizes)]:
            raise InputError(
                f"arch.vocab_size={size}: expected one whose ends were measured at {self.point} "
                f"({', '.join(map(str, self.grid.vocab_sizes))}); add it to space"
            )
        codes = _codes(table)[table.num_attending > 0]
        for code in codes[~np.isin(codes, [_code(*heads) for heads in self.grid.heads])]:
            known = ", ".join(f"{q}/{kv}" for q, kv in self.grid.heads)
            raise InputError(
                f"arch.num_heads={code // _HEADS} with arch.num_kv_heads={code % _HEADS}: expected "
                f"heads whose blocks were measured at {self.point} ({known}); add them to space"
            )
        for kind, numbers in _counts(table).items():
            if kind not in self.grid.kinds and numbers.any():
                raise InputError(
                    f"arch.layer_types={kind.value}: expected a kind whose block was measured at "
                    f"{self.point} ({', '.join(k.value for k in self.grid.kinds)}); "
                    "add it to space.kinds"
                )


def _counts(table: SpecTable) -> dict[Attention, np.ndarray]:
    """Count the layers of each kind in each spec."""
    return {
        Attention.full_attention: table.column("num_full"),
        Attention.sliding_attention: table.column("num_sliding"),
        Attention.skip_attention: table.column("num_layers") - table.num_attending,
    }


_HEADS = 2**31


def _code(num_heads: Any, num_kv_heads: Any) -> Any:
    """One number for both numbers of heads."""
    return num_heads * _HEADS + num_kv_heads


def _codes(table: SpecTable) -> np.ndarray:
    """Numbers of heads of each model, as one number."""
    return _code(table.column("num_heads"), table.column("num_kv_heads"))


def _axis(grid: Grid, name: str) -> tuple[int | None, ...]:
    return grid.ffn_dims if name == FFN else (None,)


def _locate(axis: tuple[int, ...], x: np.ndarray) -> tuple[np.ndarray, Values]:
    """Return the index below each x and the fraction to the next; ends are extrapolated."""
    if len(axis) == 1:
        return np.zeros(len(x), dtype=int), np.zeros(len(x))
    points = np.array(axis, dtype=float)
    i = np.clip(np.searchsorted(points, x, side="right") - 1, 0, len(points) - 2)
    return i, (x - points[i]) / (points[i + 1] - points[i])
