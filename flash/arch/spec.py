"""`ArchSpec`: one architecture, the currency that every other package trades in."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from flash.errors import InputError, nearest, require


class Attention(Enum):
    """What a decoder layer does before its FFN. Members are named as in the ecosystem's configs."""

    full_attention = "full_attention"
    sliding_attention = "sliding_attention"
    skip_attention = "skip_attention"

    @property
    def efficient(self) -> bool:
        """Whether the layer is one of the paper's cheap kinds (skip or sliding)."""
        return self is not Attention.full_attention

    @property
    def attends(self) -> bool:
        """Whether the layer has attention at all."""
        return self is not Attention.skip_attention

    @classmethod
    def parse(cls, kind: "Attention | str") -> "Attention":
        """The kind of that name.

        Raises:
            InputError: There is none.
        """
        if isinstance(kind, cls):
            return kind
        if kind not in cls.__members__:
            raise InputError(
                f"arch.layer_types={kind}: expected one of {', '.join(cls.__members__)}; "
                f"{nearest(str(kind), cls.__members__)}"
            )
        return cls[str(kind)]


GROUP = 32
"""Group size of the 4-bit weights (Sec. 4.1); every matrix's input width must be a multiple."""


class RopeKind(Enum):
    """How rotary frequencies are changed for contexts beyond those of pretraining."""

    linear = "linear"
    """All frequencies divided by the factor (position interpolation, arXiv:2306.15595)."""
    llama3 = "llama3"
    """Only the slow ones, with a smooth passage to the fast ones (Llama 3.1, arXiv:2407.21783)."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A change of the rotary frequencies.

    Attributes:
        kind: The rule.
        factor: What the slow frequencies are divided by; 1 or more.
        low_freq_factor: `llama3`: frequencies with fewer turns than this in the original context
            are divided in full.
        high_freq_factor: `llama3`: those with more turns than this stay.
        original_context: `llama3`: context of pretraining [tokens].
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        key = "arch.rope_scaling"
        kind = self.kind.value if isinstance(self.kind, RopeKind) else self.kind
        known = ", ".join(RopeKind.__members__)
        require(kind in RopeKind.__members__, f"{key}.kind", kind, f"one of {known}")
        object.__setattr__(self, "kind", RopeKind(kind))
        require(self.factor >= 1, f"{key}.factor", self.factor, "a number of at least 1")
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            f"{key}.low_freq_factor",
            self.low_freq_factor,
            f"a positive number below high_freq_factor={self.high_freq_factor}",
        )
        value = self.original_context
        require(value > 0, f"{key}.original_context", value, "a positive integer")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {**dataclasses.asdict(self), "kind": self.kind.value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RopeScaling":
        """Inverse of `to_dict`.

        Raises:
            InputError: A key is unknown or missing, or a value is illegal.
        """
        return cls(**_checked(values, cls, "arch.rope_scaling"))


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """One decoder-only architecture (arXiv:2603.15954, Table 3).

    Illegal values raise; nothing is corrected. The object is hashable and round-trips through
    `to_dict` / `from_dict` and `to_json` / `from_json`.

    Attributes:
        model_dim: Residual-stream width, d_model.
        ffn_dim: FFN hidden width, d_ffn, the same in every layer.
        layer_types: Attention kind of each layer; its length is the depth, d_L. Also taken as a
            `pattern`.
        num_heads: Query heads; not searched in the paper.
        num_kv_heads: Key and value heads (GQA).
        head_dim: Width of one head; `num_heads * head_dim` need not equal `model_dim`.
        vocab_size: Tokens in the vocabulary.
        tie_embeddings: Whether the output head is the input embedding.
        qk_norm: RMSNorm on every query and key head, as in Qwen3.
        qkv_bias: Biases on query, key and value projections, as in Qwen2.
        sliding_window: Positions that a sliding layer sees, its own included [tokens].
        rope_theta: Base of the rotary embedding.
        rope_scaling: How its frequencies are changed for long contexts; None leaves them.
        norm_eps: Epsilon of every RMSNorm.
        max_context: Longest supported context [tokens].
    """

    model_dim: int
    ffn_dim: int
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
        # OmegaConf and JSON hand over lists (of names, in JSON's case); people like letters.
        kinds = self.layer_types
        kinds = parse_pattern(kinds) if isinstance(kinds, str) else map(Attention.parse, kinds)
        object.__setattr__(self, "layer_types", tuple(kinds))
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_dict(self.rope_scaling))
        sizes = (
            "model_dim",
            "ffn_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "sliding_window",
            "max_context",
        )
        for name in sizes:
            value = getattr(self, name)
            require(type(value) is int and value > 0, f"arch.{name}", value, "a positive integer")
        for name in ("model_dim", "ffn_dim"):
            value = getattr(self, name)
            require(
                value % GROUP == 0,
                f"arch.{name}",
                value,
                f"a multiple of {GROUP}, the group size of the 4-bit weights",
            )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "arch.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of arch.num_heads={self.num_heads}",
        )
        require(
            self.head_dim % 2 == 0, "arch.head_dim", self.head_dim, "an even number (rotary pairs)"
        )
        require(
            (self.num_heads * self.head_dim) % GROUP == 0,
            "arch.num_heads*head_dim",
            self.num_heads * self.head_dim,
            f"a multiple of {GROUP}, the group size of the 4-bit weights",
        )
        require(bool(self.layer_types), "arch.layer_types", "[]", "at least one layer")
        require(self.rope_theta > 0, "arch.rope_theta", self.rope_theta, "a positive number")
        require(self.norm_eps > 0, "arch.norm_eps", self.norm_eps, "a positive number")

    @property
    def num_layers(self) -> int:
        """Depth, d_L."""
        return len(self.layer_types)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have attention at all."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind.attends)

    @property
    def pattern(self) -> str:
        """The layer kinds in short: one of `F`, `S`, `-` a layer (full, sliding, skip)."""
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
        """A copy with some attributes changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    def as_program(self) -> "ArchSpec":
        """The spec under which the program of this one and its latencies are known.

        Tied or not, the programs are the same; so are their measurements.
        """
        return self.replace(tie_embeddings=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, so that JSON, YAML and an Optuna study can hold it.

        What most models lack is left out, so that their dictionaries, and the keys of measurements
        made from them, are those of before it could be said.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["layer_types"] = [kind.value for kind in self.layer_types]
        del values["qkv_bias"], values["rope_scaling"]
        if self.qkv_bias:
            values["qkv_bias"] = True
        if self.rope_scaling is not None:
            values["rope_scaling"] = self.rope_scaling.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ArchSpec":
        """Build from plain values.

        Raises:
            InputError: A key is unknown or missing, or a value is illegal.
        """
        return cls(**_checked(values, cls, "arch"))

    def to_json(self) -> str:
        """One line of JSON with sorted keys: equal specs give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "ArchSpec":
        """Inverse of `to_json`."""
        return cls.from_dict(json.loads(text))

    def __str__(self) -> str:
        return f"{self.num_layers}L d{self.model_dim} f{self.ffn_dim} {self.pattern}"


def _checked(values: Mapping[str, Any], schema: type, key: str) -> Mapping[str, Any]:
    """`values`, of which none is unknown to the dataclass `schema` and none is missing."""
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for name in values:
        if name not in fields:
            raise InputError(f"{key}.{name}: unknown key; {nearest(name, fields)}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"{key}.{name}: missing; give it a value")
    return values


_LETTER = {
    Attention.full_attention: "F",
    Attention.sliding_attention: "S",
    Attention.skip_attention: "-",
}


def parse_pattern(pattern: str) -> tuple[Attention, ...]:
    """Inverse of `ArchSpec.pattern`: `"FF-S"` -> layer kinds.

    Raises:
        InputError: A letter other than `F`, `S`, `-`.
    """
    kinds = {letter: kind for kind, letter in _LETTER.items()}
    for letter in pattern:
        require(letter in kinds, "pattern", pattern, "only the letters F, S and -")
    return tuple(kinds[letter] for letter in pattern)
