"""The search space: its settings, its members, their number, and ways to draw them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from flash.arch.spec import ArchSpec, Attention
from flash.errors import InputError, check_name, require, under


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
class SpaceSettings:
    """Config group `space`: the searched sizes (Table 3) and the rule on patterns (Sec. 3.5)."""

    name: str
    """Name of the space in reports."""
    num_layers: Choices
    """Depth, d_L [layers]."""
    model_dim: Choices
    """Residual-stream width, d_model; multiples of 32."""
    ffn_dim: Choices
    """FFN hidden width, d_ffn; multiples of 32."""
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
        self.settings = settings
        self.base = backbone.replace(tie_embeddings=True)
        self.depths = settings.num_layers.values
        self.model_dims = settings.model_dim.values
        self.ffn_dims = settings.ffn_dim.values
        self.kinds = tuple(sorted(set(settings.kinds), key=list(Attention).index))
        for key, values, limit in (
            ("num_layers", self.depths, backbone.num_layers),
            ("model_dim", self.model_dims, backbone.model_dim),
            ("ffn_dim", self.ffn_dims, backbone.ffn_dim),
        ):
            if values[-1] > limit:
                raise InputError(
                    f"space.{key}.max={values[-1]}: expected at most the backbone's {limit}; "
                    "lower it or choose a wider backbone"
                )
        # Widths that are not whole groups must fail now, not at the first sample that has one.
        with under("space"):
            for model_dim in self.model_dims:
                self.base.replace(model_dim=model_dim)
            for ffn_dim in self.ffn_dims:
                self.base.replace(ffn_dim=ffn_dim)

    def __contains__(self, spec: ArchSpec) -> bool:
        return self.violated_rule(spec) is None

    def violated_rule(self, spec: ArchSpec) -> str | None:
        """The rule that keeps `spec` out of the space; None for a member."""
        same = self.base.replace(
            layer_types=spec.layer_types, model_dim=spec.model_dim, ffn_dim=spec.ffn_dim
        )
        if spec != same:
            return "heads, vocabulary or other fixed settings differ from the backbone's"
        for key, value, choices in (
            ("num_layers", spec.num_layers, self.depths),
            ("model_dim", spec.model_dim, self.model_dims),
            ("ffn_dim", spec.ffn_dim, self.ffn_dims),
        ):
            if value not in choices:
                return f"{key}={value} is not among {choices[0]}..{choices[-1]}"
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
        patterns = sum(self.count_patterns(depth, constrained=constrained) for depth in self.depths)
        return patterns * len(self.model_dims) * len(self.ffn_dims)

    def count_slots(self) -> int:
        """Size of the space as the paper counts it, with a pattern of full depth at every depth.

        For Table 3 this is 3^16 x 7 x 25 x 9 = 67.8e9, the paper's "about 70 billion".
        """
        sizes = len(self.depths) * len(self.model_dims) * len(self.ffn_dims)
        return len(self.kinds) ** self.depths[-1] * sizes

    def make(self, model_dim: int, ffn_dim: int, layer_types: tuple[Attention, ...]) -> ArchSpec:
        """The spec with these values and the backbone's for all else; it need not be a member."""
        return self.base.replace(model_dim=model_dim, ffn_dim=ffn_dim, layer_types=layer_types)

    def sample(self, rng: np.random.Generator) -> ArchSpec:
        """One architecture, uniform over all members of the space."""
        patterns = np.array([self.count_patterns(depth) for depth in self.depths], dtype=float)
        depth = int(rng.choice(self.depths, p=patterns / patterns.sum()))
        return self.sample_at_depth(rng, depth)

    def sample_at_depth(self, rng: np.random.Generator, depth: int) -> ArchSpec:
        """One architecture, uniform over the members that have `depth` layers."""
        model_dim = int(rng.choice(self.model_dims))
        ffn_dim = int(rng.choice(self.ffn_dims))
        while True:  # repeats only after a pattern of skips alone, which is rare or impossible
            spec = self.make(model_dim, ffn_dim, self._sample_pattern(rng, depth))
            if spec in self:
                return spec

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
            found[self.make(model_dim, ffn_dim, drawn.layer_types)] = None
        return list(found)

    def neighbors(self, spec: ArchSpec) -> Iterator[ArchSpec]:
        """Members one step away from `spec`.

        A step changes the kind of one layer, adds or removes a layer, or moves a width to the next
        value.
        """
        seen = {spec}
        for candidate in self._steps(spec):
            if candidate not in seen and candidate in self:
                seen.add(candidate)
                yield candidate

    def _steps(self, spec: ArchSpec) -> Iterator[ArchSpec]:
        kinds = spec.layer_types
        for i in range(len(kinds)):
            for kind in self.kinds:
                yield spec.replace(layer_types=(*kinds[:i], kind, *kinds[i + 1 :]))
            if len(kinds) > 1:
                yield spec.replace(layer_types=kinds[:i] + kinds[i + 1 :])
        for i in range(len(kinds) + 1):
            for kind in self.kinds:
                yield spec.replace(layer_types=(*kinds[:i], kind, *kinds[i:]))
        for field_name, choices in (("model_dim", self.model_dims), ("ffn_dim", self.ffn_dims)):
            value = getattr(spec, field_name)
            index = choices.index(value)
            for step in (-1, 1):
                if 0 <= index + step < len(choices):
                    yield spec.replace(**{field_name: choices[index + step]})
