"""`ArchSpec`: the description of one architecture that all other packages share."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from flash.errors import InputError, is_number, nearest, require, shown, under


class Attention(Enum):
    """Attention of a decoder layer, in front of its FFN.

    Members have the names that transformers uses for `layer_types`.
    """

    full_attention = "full_attention"
    sliding_attention = "sliding_attention"
    skip_attention = "skip_attention"

    @property
    def efficient(self) -> bool:
        """True for the cheap kinds of the paper, skip and sliding (Sec. 3.2)."""
        return self is not Attention.full_attention

    @property
    def attends(self) -> bool:
        """True unless the layer skips its attention."""
        return self is not Attention.skip_attention

    @classmethod
    def parse(cls, kind: "Attention | str") -> "Attention":
        """The kind with the name `kind`; a kind is returned as it is.

        Raises:
            InputError: No kind has this name.
        """
        if isinstance(kind, cls):
            return kind
        if not isinstance(kind, str) or kind not in cls.__members__:
            raise InputError(
                f"layer_types={shown(kind)}: expected one of {', '.join(cls.__members__)}; "
                f"{nearest(str(kind), cls.__members__)}"
            )
        return cls[kind]


_MOST_LAYERS = 10_000
"""Layers beyond which a description is taken for damaged."""
_LARGEST_SIZE = 2**31 - 1
"""Largest size; larger ones are taken for damaged."""
GROUP = 32
"""Group size of the 4-bit weights (Sec. 4.1); input widths of all matrices are multiples of it."""


class RopeKind(Enum):
    """Rules that change rotary frequencies for contexts longer than those of pretraining."""

    linear = "linear"
    """Divides all frequencies by the factor (position interpolation, arXiv:2306.15595)."""
    llama3 = "llama3"
    """Divides the slow frequencies, leaves the fast ones and interpolates between both (Llama 3.1,
    arXiv:2407.21783)."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A change of the rotary frequencies for long contexts.

    Errors name keys relative to this class, such as `factor`.

    Attributes:
        kind: Rule of the change.
        factor: Divisor of the slow frequencies, at least 1.
        low_freq_factor: `llama3` only. Frequencies that make fewer turns than this over the
            original context are divided by the whole factor.
        high_freq_factor: `llama3` only. Frequencies that make more turns than this stay.
        original_context: `llama3` only. Longest context of pretraining [tokens].

    Raises:
        InputError: A value is illegal.
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        kind = self.kind.value if isinstance(self.kind, RopeKind) else self.kind
        known = isinstance(kind, str) and kind in RopeKind.__members__
        require(known, "kind", kind, f"one of {', '.join(RopeKind.__members__)}")
        object.__setattr__(self, "kind", RopeKind(kind))
        for name, least in (("factor", 1), ("low_freq_factor", 0), ("high_freq_factor", 0)):
            value = getattr(self, name)
            valid = is_number(value) and (value >= 1 if least else value > 0)
            require(valid, name, value, "a number of at least 1" if least else "a positive number")
        require(
            self.low_freq_factor < self.high_freq_factor,
            "low_freq_factor",
            self.low_freq_factor,
            f"a positive number below high_freq_factor={self.high_freq_factor}",
        )
        _require_size(self.original_context, "original_context")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON and YAML."""
        return {**dataclasses.asdict(self), "kind": self.kind.value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RopeScaling":
        """Inverse of `to_dict`.

        Raises:
            InputError: A key is unknown or missing, or a value is illegal.
        """
        return cls(**_checked(values, cls))


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """One decoder-only architecture (arXiv:2603.15954, Table 3).

    Illegal values raise an error and are never corrected. A spec is hashable; `from_dict` inverts
    `to_dict`, and `from_json` inverts `to_json`. Errors name keys relative to this class, such as
    `ffn_dim` or `rope_scaling.factor`; callers put the place in front with `flash.errors.under`.

    Attributes:
        model_dim: Residual-stream width, d_model.
        ffn_dim: FFN hidden width, d_ffn, of all layers or, as a list, of each. A list of equal
            widths becomes one number.
        layer_types: Attention kind of each layer; its length is the depth, d_L. The constructor
            also takes the names of the kinds, or a `pattern`.
        num_heads: Query heads; not searched in the paper.
        num_kv_heads: Key and value heads (GQA).
        head_dim: Width of one head; `num_heads * head_dim` need not equal `model_dim`.
        vocab_size: Tokens in the vocabulary.
        tie_embeddings: True if the output head is the input embedding.
        qk_norm: True for an RMSNorm on every query and key head, as in Qwen3.
        qkv_bias: True for biases on query, key and value projections, as in Qwen2.
        sliding_window: Positions that a query of a sliding layer sees, its own included [tokens].
        rope_theta: Base of the rotary embedding.
        rope_scaling: Change of the rotary frequencies for long contexts; None leaves them.
        norm_eps: Epsilon of every RMSNorm.
        max_context: Longest supported context [tokens].

    Raises:
        InputError: A value is illegal.
    """

    model_dim: int
    ffn_dim: int | tuple[int, ...]
    layer_types: tuple[Attention, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_embeddings: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    sliding_window: int = 256
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    max_context: int = 8192

    def __post_init__(self) -> None:
        # OmegaConf and JSON hand over lists of kinds or of their names; people type letters.
        kinds = self.layer_types
        require(
            isinstance(kinds, str | list | tuple),
            "layer_types",
            kinds,
            "a pattern such as FF-S, or a list of kinds",
        )
        require(len(kinds) <= _MOST_LAYERS, "layer_types", "...", f"at most {_MOST_LAYERS} layers")
        kinds = parse_pattern(kinds) if isinstance(kinds, str) else map(Attention.parse, kinds)
        object.__setattr__(self, "layer_types", tuple(kinds))
        require(bool(self.layer_types), "layer_types", "[]", "at least one layer")
        self._check_ffn_dims()
        if isinstance(self.rope_scaling, Mapping):
            with under("rope_scaling"):
                scaling = RopeScaling.from_dict(self.rope_scaling)
            object.__setattr__(self, "rope_scaling", scaling)
        sizes = (
            "model_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "sliding_window",
            "max_context",
        )
        for name in sizes:
            _require_size(getattr(self, name), name)
        for name in ("tie_embeddings", "qk_norm", "qkv_bias"):
            value = getattr(self, name)
            require(isinstance(value, bool), name, value, "true or false")
        scaling = self.rope_scaling
        valid = scaling is None or isinstance(scaling, RopeScaling)
        require(valid, "rope_scaling", scaling, "a mapping with kind and factor, or null")
        _require_groups(self.model_dim, "model_dim")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (rotary pairs)")
        require(
            (self.num_heads * self.head_dim) % GROUP == 0,
            "head_dim",
            self.head_dim,
            f"a size whose product with num_heads={self.num_heads} is a multiple of {GROUP}, the "
            "group size of the 4-bit weights",
        )
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, name, value, "a positive number")

    def _check_ffn_dims(self) -> None:
        """Check the FFN widths; equal ones become one number, so that equal models are equal."""
        if isinstance(self.ffn_dim, Sequence) and not isinstance(self.ffn_dim, str):
            require(
                len(self.ffn_dim) == self.num_layers,
                "ffn_dim",
                list(self.ffn_dim),
                f"one width, or one for each of {self.num_layers} layers",
            )
            object.__setattr__(self, "ffn_dim", tuple(self.ffn_dim))
        for width in self.ffn_dims:
            _require_size(width, "ffn_dim")
            _require_groups(width, "ffn_dim")
        if len(set(self.ffn_dims)) == 1:
            object.__setattr__(self, "ffn_dim", self.ffn_dims[0])

    @property
    def num_layers(self) -> int:
        """Depth, d_L."""
        return len(self.layer_types)

    @property
    def ffn_dims(self) -> tuple[int, ...]:
        """FFN hidden width of each layer."""
        if isinstance(self.ffn_dim, tuple):
            return self.ffn_dim
        return (self.ffn_dim,) * self.num_layers

    @property
    def mean_ffn_dim(self) -> float:
        """Mean FFN hidden width of the layers; an integer if all are equal."""
        if isinstance(self.ffn_dim, int):
            return self.ffn_dim
        return sum(self.ffn_dims) / self.num_layers

    @property
    def ffn_range(self) -> str:
        """FFN hidden width as text: one number, or the least and the greatest."""
        least, greatest = min(self.ffn_dims), max(self.ffn_dims)
        return f"{least}" if least == greatest else f"{least}-{greatest}"

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have attention, full or sliding."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind.attends)

    @property
    def pattern(self) -> str:
        """The layer kinds as one letter per layer: `F` full, `S` sliding, `-` skip."""
        return "".join(_LETTER[kind] for kind in self.layer_types)

    @property
    def longest_efficient_run(self) -> int:
        """Most consecutive layers without full attention (Sec. 3.5 wants at most 2)."""
        longest = run = 0
        for kind in self.layer_types:
            run = run + 1 if kind.efficient else 0
            longest = max(longest, run)
        return longest

    def replace(self, **changes: Any) -> "ArchSpec":
        """A copy with some attributes changed.

        Raises:
            InputError: A new value is illegal.
        """
        return dataclasses.replace(self, **changes)

    def as_program(self) -> "ArchSpec":
        """The spec under which the program of this one and its latencies are known.

        Tied or not, the programs are the same; so are their measurements.
        """
        return self.replace(tie_embeddings=True)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON, YAML and Optuna studies.

        `qkv_bias` and `rope_scaling` are left out when they have their defaults. Stored
        measurements are keyed by this dictionary, and those made before the two fields existed keep
        their keys.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["layer_types"] = [kind.value for kind in self.layer_types]
        if isinstance(self.ffn_dim, tuple):
            values["ffn_dim"] = list(self.ffn_dim)
        del values["qkv_bias"], values["rope_scaling"]
        if self.qkv_bias:
            values["qkv_bias"] = True
        if self.rope_scaling is not None:
            values["rope_scaling"] = self.rope_scaling.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ArchSpec":
        """The spec with these plain values; the inverse of `to_dict`.

        Raises:
            InputError: A key is unknown or missing, or a value is illegal.
        """
        return cls(**_checked(values, cls))

    def to_json(self) -> str:
        """One line of JSON with sorted keys; equal specs give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "ArchSpec":
        """Inverse of `to_json`.

        Raises:
            InputError: A key is unknown or missing, or a value is illegal.
        """
        return cls.from_dict(json.loads(text))

    def __str__(self) -> str:
        return f"{self.num_layers}L d{self.model_dim} f{self.ffn_range} {self.pattern}"


def _require_size(value: Any, name: str) -> None:
    """Check a size.

    Raises:
        InputError: It is no positive integer, or a damaged one.
    """
    require(type(value) is int and value > 0, name, value, "a positive integer")
    require(value <= _LARGEST_SIZE, name, value, f"at most {_LARGEST_SIZE}")


def _require_groups(value: int, name: str) -> None:
    """Check that a width is a whole number of groups.

    Raises:
        InputError: It is not.
    """
    expected = f"a multiple of {GROUP}, the group size of the 4-bit weights"
    require(value % GROUP == 0, name, value, expected)


def _checked(values: Mapping[str, Any], schema: type) -> Mapping[str, Any]:
    """`values`, after a check that the dataclass `schema` takes their keys and misses none.

    Raises:
        InputError: A key is unknown or missing, or there is no mapping.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{shown(values)}: expected a mapping of keys to values")
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for name in values:
        if name not in fields:
            raise InputError(f"{name}: unknown key; {nearest(str(name), fields)}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"{name}: missing; give it a value")
    return values


_LETTER = {
    Attention.full_attention: "F",
    Attention.sliding_attention: "S",
    Attention.skip_attention: "-",
}


def parse_pattern(pattern: str) -> tuple[Attention, ...]:
    """Layer kinds of a pattern such as `"FF-S"`; the inverse of `ArchSpec.pattern`.

    Raises:
        InputError: A letter is none of `F`, `S` and `-`.
    """
    kinds = {letter: kind for kind, letter in _LETTER.items()}
    for letter in pattern:
        require(letter in kinds, "layer_types", pattern, "only the letters F, S and -")
    return tuple(kinds[letter] for letter in pattern)
