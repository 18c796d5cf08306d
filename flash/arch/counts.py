"""Exact parameter counts, FLOPs and bytes of an architecture, computed without building a model."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from flash.arch.spec import GROUP, ArchSpec, Attention


class Quantization(Enum):
    """Weight formats that the lowering writes."""

    fp32 = "fp32"
    int8da4w = "8da4w"
    """4-bit weights and embedding in groups of 32, 8-bit dynamic activations (Sec. 4.1)."""


class CacheFormat(Enum):
    """KV-cache formats that the lowering writes."""

    fp32 = "fp32"
    bf16 = "bf16"
    """float32 rounded to 8 significant bits."""
    int8 = "int8"
    """One scale and zero point per token and head, as in ExecuTorch's quantized cache."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, by the part of it that they belong to."""

    embedding: int
    head: int
    attention: int
    ffn: int
    vectors: int
    """Gains of norms, and biases. No format quantizes them."""

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.attention + self.ffn + self.vectors


def count_parameters(spec: ArchSpec) -> ParameterCount:
    """Parameters of `spec`. Tied weights count once.

    A layer that skips its attention has neither attention weights nor the norm in front of them.
    """
    attention_layers = len(spec.attention_layers)
    q_dim, kv_dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    per_attention = spec.model_dim * (2 * q_dim + 2 * kv_dim)
    vectors = 2 * spec.head_dim if spec.qk_norm else 0
    if spec.qkv_bias:
        vectors += q_dim + 2 * kv_dim
    table = spec.vocab_size * spec.model_dim
    return ParameterCount(
        embedding=table,
        head=0 if spec.tie_embeddings else table,
        attention=attention_layers * per_attention,
        ffn=3 * spec.model_dim * sum(spec.ffn_dims),
        vectors=(spec.num_layers + 1) * spec.model_dim
        + attention_layers * (spec.model_dim + vectors),
    )


def _pairs(spec: ArchSpec, kind: Attention, positions: int) -> int:
    """Query-key pairs of one layer whose queries stand at the first `positions` positions."""
    window = positions if kind is Attention.full_attention else spec.sliding_window
    growing = min(positions, window)
    return growing * (growing + 1) // 2 + (positions - growing) * window


def _attention_flops(spec: ArchSpec, first: int, last: int) -> int:
    """FLOPs of scores and weighted sums for queries at positions first..last-1."""
    pairs = sum(
        spec.layer_types.count(kind) * (_pairs(spec, kind, last) - _pairs(spec, kind, first))
        for kind in (Attention.full_attention, Attention.sliding_attention)
    )
    # Scores and weighted sums: 2 multiply-adds, so 4 FLOPs, per pair, head and head channel.
    return 4 * pairs * spec.num_heads * spec.head_dim


def _linear_flops_per_token(spec: ArchSpec) -> int:
    counts = count_parameters(spec)
    return 2 * (counts.attention + counts.ffn)


def prefill_flops(spec: ArchSpec, prompt_tokens: int) -> int:
    """FLOPs of a prompt, from an empty cache to the logits of the first new token.

    The output head runs on the last position only.
    """
    head = 2 * spec.vocab_size * spec.model_dim
    linear = prompt_tokens * _linear_flops_per_token(spec)
    return linear + head + _attention_flops(spec, 0, prompt_tokens)


def decode_flops(spec: ArchSpec, context: int) -> int:
    """FLOPs of decoding one token with a cache that holds `context` tokens."""
    head = 2 * spec.vocab_size * spec.model_dim
    return _linear_flops_per_token(spec) + head + _attention_flops(spec, context, context + 1)


def training_flops_per_token(spec: ArchSpec, seq_len: int) -> float:
    """FLOPs of training per token of a sequence; the backward pass counts as two forward passes."""
    head = 2 * spec.vocab_size * spec.model_dim
    attention = _attention_flops(spec, 0, seq_len) / seq_len
    return 3 * (_linear_flops_per_token(spec) + head + attention)


def linear_parts(spec: ArchSpec) -> dict[str, tuple[int, int]]:
    """Weights and rows of the matrices of each part of a decoder, the embedding left out.

    A part is an attention half (`layers.0.self_attn`), an FFN half (`layers.0.mlp`) or `lm_head`.
    """
    q_dim, kv_dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    width = spec.model_dim
    attention = (width * (2 * q_dim + 2 * kv_dim), q_dim + 2 * kv_dim + width)
    parts = {}
    for i, (kind, hidden) in enumerate(zip(spec.layer_types, spec.ffn_dims, strict=True)):
        if kind.attends:
            parts[f"layers.{i}.self_attn"] = attention
        parts[f"layers.{i}.mlp"] = (3 * width * hidden, 2 * hidden + width)
    return {**parts, "lm_head": (spec.vocab_size * width, spec.vocab_size)}


def weight_bytes(
    spec: ArchSpec,
    quantization: Quantization,
    group_size: int = GROUP,
    embedding_bits: int = 4,
    eight_bit: Collection[str] = (),
) -> int:
    """Bytes of all weights as the lowering stores them.

    A tied embedding counts twice: the embedding table and the output head are different
    operators, each with a packed copy of its own in the .pte (seen in ExecuTorch 1.5).

    With 8da4w, a weight of a linear takes half a byte, and each group adds a bf16 scale; XNNPACK
    stores no zero points. In 8 bits it takes one byte, and each row adds a float32 scale. A weight
    of the embedding takes half a byte, and each group adds a float32 scale and an int8 zero point.
    With `embedding_bits=8` it takes one byte, and each row adds these two instead.

    Args:
        spec: Architecture of the weights.
        quantization: Format of the weights.
        group_size: Weights that share a scale in 8da4w.
        embedding_bits: Bits per weight of the embedding in 8da4w, 4 or 8.
        eight_bit: Names of the `linear_parts` with 8 bits in 8da4w.
    """
    counts = count_parameters(spec)
    table = spec.vocab_size * spec.model_dim
    if quantization is Quantization.fp32:
        return 4 * (counts.attention + counts.ffn + 2 * table + counts.vectors)
    packed = 4 * counts.vectors
    for name, (weights, rows) in linear_parts(spec).items():
        wide = name in eight_bit
        packed += weights + 4 * rows if wide else weights // 2 + weights // group_size * 2
    if embedding_bits == 4:
        return packed + table // 2 + table // group_size * 5
    return packed + table + spec.vocab_size * 5


def kv_cache_bytes(spec: ArchSpec, full_slots: int, sliding_slots: int, cache: CacheFormat) -> int:
    """Bytes of the keys and values of all layers.

    The format int8 adds a float32 scale and an int8 zero point per token and head.

    Args:
        spec: Architecture of the layers.
        full_slots: Tokens that the cache of a layer with full attention holds.
        sliding_slots: Tokens that the cache of a sliding layer holds.
        cache: Format of keys and values.
    """
    per_head = {
        CacheFormat.fp32: 4 * spec.head_dim,
        CacheFormat.bf16: 2 * spec.head_dim,
        CacheFormat.int8: spec.head_dim + 4 + 1,
    }[cache]
    count = spec.layer_types.count
    slots = (
        count(Attention.full_attention) * full_slots
        + count(Attention.sliding_attention) * sliding_slots
    )
    return 2 * slots * spec.num_kv_heads * per_head
