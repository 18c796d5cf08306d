"""The search space: its settings, its members, their number, and ways to draw them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np

from flash.arch.spec import GROUP, ArchSpec, Attention
from flash.errors import InputError, check_name, require, under


class Variant(NamedTuple):
    """Sizes that all layers share and of which a space has few values."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads."""
    vocab_size: int
    """Tokens in the vocabulary."""

    @classmethod
    def of(cls, spec: ArchSpec) -> "Variant":
        """Return the variant that an architecture has."""
        return cls(spec.num_heads, spec.num_kv_heads, spec.vocab_size)


_SEARCHED = {"layer_types", "model_dim", "ffn_dim", *Variant._fields}
_FIXED = tuple(each.name for each in fields(ArchSpec) if each.name not in _SEARCHED)
"""Fields of an architecture that no space chooses."""
WIDTH_KNOTS = 3
"""Knots over depth of the lines that drawn FFN widths follow."""


@dataclass(kw_only=True)
class Choices:
    """The values `min, min + step, ..., max` of one searched size."""

    min: int
    """Smallest value."""
    max: int
    """Largest value; `min` plus a whole number of steps."""
    step: int = 1
    """Distance between neighboring values."""

    def __post_init__(self) -> None:
        require(self.min > 0, "min", self.min, "a positive integer")
        require(self.step > 0, "step", self.step, "a positive integer")
        require(
            self.max >= self.min and (self.max - self.min) % self.step == 0,
            "max",
            self.max,
            f"min + a whole number of steps ({self.min} + n * {self.step})",
        )

    @property
    def values(self) -> tuple[int, ...]:
        """All values in ascending order."""
        return tuple(range(self.min, self.max + 1, self.step))


@dataclass(kw_only=True)
class FfnChoices(Choices):
    """Values of the FFN width, of the whole model or of each layer."""

    per_layer: bool = False
    """Each layer has a width of its own. The paper has one for all."""


@dataclass(kw_only=True)
class SpaceSettings:
    """Config group `space`: the searched sizes (Table 3) and the rule on patterns (Sec. 3.5)."""

    name: str
    """Name of the space in reports."""
    num_layers: Choices
    """Depth, d_L [layers]."""
    model_dim: Choices
    """Residual-stream width, d_model; multiples of 32."""
    ffn_dim: FfnChoices
    """FFN hidden width, d_ffn; multiples of 32."""
    num_heads: list[int] | None = None
    """Numbers of query heads; null is the backbone's, as in the paper."""
    num_kv_heads: list[int] | None = None
    """Numbers of key and value heads, divisors of the backbone's; null is the backbone's."""
    vocab_size: list[int] | None = None
    """Sizes of the vocabulary, at most the backbone's; null is the backbone's."""
    kinds: list[Attention] = field(default_factory=lambda: list(Attention))
    """Attention kinds that a layer may have; full attention must be among them."""
    max_efficient_run: int = 2
    """Most consecutive layers without full attention; the paper bans 3 or more."""
    require_attention: bool = True
    """Leave out patterns in which all layers skip attention; such models cannot use context."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        require(
            Attention.full_attention in self.kinds,
            "kinds",
            [kind.value for kind in self.kinds],
            "a list with full_attention in it",
        )
        for key in ("num_heads", "num_kv_heads", "vocab_size"):
            values = getattr(self, key)
            valid = values is None or (len(values) > 0 and min(values) > 0)
            require(valid, key, values, "null, or a list of positive integers")
        run = self.max_efficient_run
        require(run >= 0, "max_efficient_run", run, "0 or more")


class SearchSpace:
    """The architectures that a search may propose, all of which can be cut out of one backbone.

    Args:
        settings: Searched sizes, and rules on patterns.
        backbone: Architecture that gives heads, vocabulary and all other values that are not
            searched. Candidates tie their embeddings, as the paper's winners do.

    Raises:
        InputError: A size exceeds the backbone's, or is not a multiple of the group size.
    """

    def __init__(self, settings: SpaceSettings, backbone: ArchSpec) -> None:
        for key, choices, limit in (  # before any is listed, as there may be billions
            ("num_layers", settings.num_layers, backbone.num_layers),
            ("model_dim", settings.model_dim, backbone.model_dim),
            ("ffn_dim", settings.ffn_dim, min(backbone.ffn_dims)),
        ):
            if choices.max > limit:
                raise InputError(
                    f"space.{key}.max={choices.max}: expected at most the backbone's {limit}; "
                    "lower it or choose a wider backbone"
                )
        self.settings = settings
        self.base = backbone.replace(tie_embeddings=True)
        self.depths = settings.num_layers.values
        self.model_dims = settings.model_dim.values
        self.ffn_dims = settings.ffn_dim.values
        self.per_layer = settings.ffn_dim.per_layer
        self.kinds = tuple(sorted(set(settings.kinds), key=list(Attention).index))
        # Widths that are not whole groups must fail now, not at the first sample that has one.
        with under("space"):
            for model_dim in self.model_dims:
                self.base.replace(model_dim=model_dim)
            for ffn_dim in self.ffn_dims:
                self.base.replace(ffn_dim=ffn_dim)
            self.vocab_sizes = self._legal_vocab_sizes(backbone)
            self.heads = self._legal_heads(backbone)
        self.variants = tuple(
            Variant(*heads, vocab_size) for heads in self.heads for vocab_size in self.vocab_sizes
        )

    def _legal_vocab_sizes(self, backbone: ArchSpec) -> tuple[int, ...]:
        """All sizes of the vocabulary, ascending.

        Raises:
            InputError: A size is larger than the backbone's.
        """
        sizes = self.settings.vocab_size or [backbone.vocab_size]
        for size in sizes:
            expected = f"at most the backbone's {backbone.vocab_size}"
            require(size <= backbone.vocab_size, "vocab_size", size, expected)
        return tuple(sorted(set(sizes)))

    def _legal_heads(self, backbone: ArchSpec) -> tuple[tuple[int, int], ...]:
        """All numbers of query heads and key heads that go together, fewest first.

        Raises:
            InputError: A number is not one that pruning can make, or goes with no other.
        """
        queries = self.settings.num_heads or [backbone.num_heads]
        keys = self.settings.num_kv_heads or [backbone.num_kv_heads]
        for num in queries:
            fits = num <= backbone.num_heads and num * backbone.head_dim % GROUP == 0
            expected = f"at most the backbone's {backbone.num_heads}, in whole groups of {GROUP}"
            require(fits, "num_heads", num, f"{expected} with head_dim={backbone.head_dim}")
        for num in keys:
            divides = backbone.num_kv_heads % num == 0
            expected = f"a divisor of the backbone's {backbone.num_kv_heads}, as heads are merged"
            require(divides, "num_kv_heads", num, expected)
        pairs = sorted({(q, kv) for q in queries for kv in keys if q % kv == 0})
        for name, wanted, place in (("num_heads", queries, 0), ("num_kv_heads", keys, 1)):
            lone = [num for num in wanted if num not in {pair[place] for pair in pairs}]
            other = keys if place == 0 else queries
            expected = "a " + ("multiple" if place == 0 else "divisor") + f" of one of {other}"
            require(not lone, name, lone, expected)
        return tuple(pairs)

    def __contains__(self, spec: ArchSpec) -> bool:
        return self.violated_rule(spec) is None

    def describe(self, spec: ArchSpec) -> str:
        """The text of a spec, with heads and vocabulary where the space has a choice."""
        heads = f" h{spec.num_heads}/{spec.num_kv_heads}" if len(self.heads) > 1 else ""
        return f"{spec}{heads}" + (f" v{spec.vocab_size}" if len(self.vocab_sizes) > 1 else "")

    def violated_rule(self, spec: ArchSpec) -> str | None:
        """The rule that keeps `spec` out of the space; None for a member."""
        for name in _FIXED:
            if getattr(spec, name) != getattr(self.base, name):
                return f"{name}: expected the backbone's, which is not searched"
        for key, values, choices in (
            ("num_layers", (spec.num_layers,), self.depths),
            ("model_dim", (spec.model_dim,), self.model_dims),
            ("ffn_dim", spec.ffn_dims, self.ffn_dims),
        ):
            for value in values:
                if value not in choices:
                    return f"{key}={value} is not among {choices[0]}..{choices[-1]}"
        if isinstance(spec.ffn_dim, tuple) and not self.per_layer:
            return f"ffn_dim={spec.ffn_range} differs from layer to layer"
        if (spec.num_heads, spec.num_kv_heads) not in self.heads:
            known = ", ".join(f"{q}/{kv}" for q, kv in self.heads)
            return f"heads {spec.num_heads}/{spec.num_kv_heads} are not among {known}"
        if spec.vocab_size not in self.vocab_sizes:
            return f"vocab_size={spec.vocab_size} is not among {[*self.vocab_sizes]}"
        if not set(spec.layer_types) <= set(self.kinds):
            return f"pattern {spec.pattern} has a kind that the space lacks"
        if spec.longest_efficient_run > self.settings.max_efficient_run:
            return (
                f"pattern {spec.pattern} has {spec.longest_efficient_run} efficient layers in a "
                f"row, at most {self.settings.max_efficient_run} are allowed"
            )
        if self.settings.require_attention and not spec.attention_layers:
            return f"pattern {spec.pattern} has no attention at all"
        return None

    @cached_property
    def _completions(self) -> list[list[int]]:
        """Number of legal ways `[n][run]` to append n layers to `run` efficient layers in a row."""
        longest = self.settings.max_efficient_run
        cheap = len(self.kinds) - 1
        table = [[1] * (longest + 1)]
        for _ in range(self.depths[-1]):
            last = table[-1]
            table.append([
                last[0] + (cheap * last[run + 1] if run < longest else 0)
                for run in range(longest + 1)
            ])
        return table

    def _without_attention(self, depth: int) -> int:
        """Number of patterns, 0 or 1, that obey the run rule but consist of skips only."""
        lone = Attention.skip_attention in self.kinds and depth <= self.settings.max_efficient_run
        return int(self.settings.require_attention and lone)

    def count_patterns(self, depth: int, *, constrained: bool = True) -> int:
        """Number of patterns of `depth` layers; unconstrained, each layer may be of any kind."""
        if not constrained:
            return len(self.kinds) ** depth
        return self._completions[depth][0] - self._without_attention(depth)

    def count(self, *, constrained: bool = True) -> int:
        """Exact number of distinct architectures, within the rules or without them."""
        shapes = sum(
            self.count_patterns(depth, constrained=constrained) * self._count_widths(depth)
            for depth in self.depths
        )
        return shapes * len(self.model_dims) * len(self.variants)

    def _count_widths(self, depth: int) -> int:
        """Number of ways to give FFN widths to `depth` layers."""
        return len(self.ffn_dims) ** (depth if self.per_layer else 1)

    def count_slots(self) -> int:
        """Size of the space as the paper counts it, with a pattern of full depth at every depth.

        For Table 3 this is 3^16 x 7 x 25 x 9 = 67.8e9, the paper's "about 70 billion".
        """
        sizes = len(self.depths) * len(self.model_dims) * self._count_widths(self.depths[-1])
        return len(self.kinds) ** self.depths[-1] * sizes * len(self.variants)

    def make(
        self,
        model_dim: int,
        ffn_dim: int | Sequence[int],
        layer_types: tuple[Attention, ...],
        variant: Variant | None = None,
    ) -> ArchSpec:
        """The spec with these values and the backbone's for all else; it need not be a member."""
        sizes = (variant or Variant.of(self.base))._asdict()
        return self.base.replace(
            model_dim=model_dim, ffn_dim=ffn_dim, layer_types=layer_types, **sizes
        )

    def sample(self, rng: np.random.Generator) -> ArchSpec:
        """One architecture, uniform over all members of the space."""
        members = np.array(
            [self.count_patterns(depth) * self._count_widths(depth) for depth in self.depths],
            dtype=float,
        )
        depth = int(rng.choice(self.depths, p=members / members.sum()))
        return self.sample_at_depth(rng, depth)

    def sample_at_depth(self, rng: np.random.Generator, depth: int) -> ArchSpec:
        """One architecture, uniform over the members that have `depth` layers."""
        model_dim = int(rng.choice(self.model_dims))
        each = rng.choice(self.ffn_dims, depth).tolist() if self.per_layer else None
        ffn_dim = each or int(rng.choice(self.ffn_dims))
        variant = self._sample_variant(rng)
        while True:  # repeats only after a pattern of skips alone, which is rare or impossible
            spec = self.make(model_dim, ffn_dim, self._sample_pattern(rng, depth), variant)
            if spec in self:
                return spec

    def _sample_variant(self, rng: np.random.Generator) -> Variant:
        # A space without a choice draws nothing, so that its samples stay those of a seed.
        count = len(self.variants)
        return self.variants[int(rng.integers(count)) if count > 1 else 0]

    def _sample_pattern(self, rng: np.random.Generator, depth: int) -> tuple[Attention, ...]:
        cheap = [kind for kind in self.kinds if kind.efficient]
        pattern: list[Attention] = []
        run = 0
        for left in range(depth - 1, -1, -1):
            full = self._completions[left][0]
            total = self._completions[left + 1][run]
            if rng.random() * total < full:
                pattern.append(Attention.full_attention)
                run = 0
            else:
                pattern.append(cheap[int(rng.integers(len(cheap)))])
                run += 1
        return tuple(pattern)

    def stratified(self, rng: np.random.Generator, n: int) -> list[ArchSpec]:
        """Up to `n` different architectures, spread evenly over depth, width and FFN width.

        Nearly all uniform samples have the greatest depth and a medium size, and leave both ends
        of the frontier without trials. Here, each size takes its values in shuffled rounds.
        """

        def rounds(values: tuple[int, ...]) -> list[int]:
            repeats = math.ceil(n / len(values))
            return [int(v) for _ in range(repeats) for v in rng.permutation(values)][:n]

        found: dict[ArchSpec, None] = {}
        sizes = zip(
            rounds(self.depths), rounds(self.model_dims), rounds(self.ffn_dims), strict=True
        )
        for depth, model_dim, ffn_dim in sizes:
            drawn = self.sample_at_depth(rng, depth)
            shaped = self.shaped(rng, model_dim, ffn_dim, drawn.layer_types, Variant.of(drawn))
            found[shaped] = None
        return list(found)

    def shaped(
        self,
        rng: np.random.Generator,
        model_dim: int,
        ffn_dim: int,
        layer_types: tuple[Attention, ...],
        variant: Variant,
    ) -> ArchSpec:
        """The spec with these values; if each layer has its own FFN width, they are drawn.

        Drawn widths have about `ffn_dim` as their mean and follow a smooth shape over depth.
        """
        depth = len(layer_types)
        widths = self._sample_widths(rng, depth, ffn_dim) if self.per_layer else ffn_dim
        return self.make(model_dim, widths, layer_types, variant)

    def _sample_widths(self, rng: np.random.Generator, depth: int, middle: int) -> list[int]:
        """Draw FFN widths that follow a line over depth with `WIDTH_KNOTS` knots.

        Widths drawn for each layer alone would nearly always have the same mean and no trend. One
        draw in four has the same width in all layers.
        """
        last = len(self.ffn_dims) - 1
        center = self.ffn_dims.index(middle)
        spread = rng.integers(4) / 3 * last
        knots = center + spread * (rng.random(WIDTH_KNOTS) - 0.5)
        places = np.interp(np.linspace(0, 1, depth), np.linspace(0, 1, WIDTH_KNOTS), knots)
        return [self.ffn_dims[i] for i in places.round().clip(0, last).astype(int)]

    def neighbors(self, spec: ArchSpec) -> Iterator[ArchSpec]:
        """Members one step away from `spec`.

        A step changes the kind of one layer, adds or removes a layer, or moves a size to the next
        value: a width, the FFN width of one layer or of a third of them, a number of heads, or the
        vocabulary.
        """
        seen = {spec}
        for candidate in self._steps(spec):
            if candidate not in seen and candidate in self:
                seen.add(candidate)
                yield candidate

    def _steps(self, spec: ArchSpec) -> Iterator[ArchSpec]:
        kinds, widths = spec.layer_types, spec.ffn_dims
        for i in range(len(kinds)):
            for kind in self.kinds:
                yield spec.replace(layer_types=(*kinds[:i], kind, *kinds[i + 1 :]))
            if len(kinds) > 1:
                yield spec.replace(
                    layer_types=kinds[:i] + kinds[i + 1 :], ffn_dim=widths[:i] + widths[i + 1 :]
                )
        for i in range(len(kinds) + 1):
            # A new layer has the width of the one in front of it, the first that of the next.
            beside = (*widths[:i], widths[max(i - 1, 0)], *widths[i:])
            for kind in self.kinds:
                yield spec.replace(layer_types=(*kinds[:i], kind, *kinds[i:]), ffn_dim=beside)
        for model_dim in _beside(self.model_dims, spec.model_dim):
            yield spec.replace(model_dim=model_dim)
        for first, end in self._runs(len(kinds)):
            for step in (-1, 1):
                moved = [_moved(self.ffn_dims, width, step) for width in widths[first:end]]
                yield spec.replace(ffn_dim=(*widths[:first], *moved, *widths[end:]))
        for variant in self._variants_beside(Variant.of(spec)):
            yield spec.replace(**variant._asdict())

    def _variants_beside(self, variant: Variant) -> Iterator[Variant]:
        """Variants that differ in one size, by one value of those that go with the other sizes."""
        for i, name in enumerate(Variant._fields):
            along = {v[i]: v for v in self.variants if v._replace(**{name: variant[i]}) == variant}
            for value in _beside(sorted(along), variant[i]):
                yield along[value]

    def _runs(self, depth: int) -> Iterator[tuple[int, int]]:
        """Begin and end of the runs of layers whose FFN widths a step moves together."""
        yield 0, depth
        if self.per_layer:
            yield from ((depth * i // 3, depth * (i + 1) // 3) for i in range(3))
            yield from ((i, i + 1) for i in range(depth))


def _beside(choices: Sequence[int], value: int) -> list[int]:
    """The choices next to `value`, the lower one first."""
    index = choices.index(value)
    return [*choices[max(index - 1, 0) : index], *choices[index + 1 : index + 2]]


def _moved(choices: Sequence[int], value: int, step: int) -> int:
    """The choice `step` places from `value`, or the last on that side."""
    return choices[min(max(choices.index(value) + step, 0), len(choices) - 1)]
