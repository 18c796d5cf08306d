"""Settings of a lowered program (formats, lengths) and of the gate that proves it."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from flash.arch import (
    GROUP,
    ArchSpec,
    CacheFormat,
    Quantization,
    kv_cache_bytes,
    linear_parts,
    weight_bytes,
)
from flash.errors import require
from flash.rounding.settings import Rounding, WeightFormat


class AttentionForm(Enum):
    """Operators that attend to the cache in prefill.

    A call's last query, the only one in decoding, always goes through `sdpa`, and so do sliding
    layers of the form `ring`.
    """

    sdpa = "sdpa"
    """ExecuTorch's `custom_sdpa`: holds no scores, works on no key that a block of queries does not
    see."""
    matmul = "matmul"
    """Matrix products and a softmax in XNNPACK: holds the scores `[heads, chunk, keys]` of a call,
    works on all keys up to the call's last. ExecuTorch's wheel for x86 builds `custom_sdpa` without
    AVX; XNNPACK picks its kernels on the device."""


LARGEST_CHUNK = {AttentionForm.sdpa: 1024, AttentionForm.matmul: 256}
"""Longest default prefill chunk [tokens]. With `sdpa`, 1024 beat 512 on the host, as in the paper.
With `matmul`, longer chunks work on more keys in vain and hold more scores: of flash_350m's 2k
tokens, 256 and 128 took the same time, 32 took 8 % more."""


class SlidingForm(Enum):
    """Cache and attention of a sliding-window layer."""

    stock = "stock"
    """ExecuTorch's ring buffer: twice the longest of window and chunk, every slot computed and
    masked. Where the context is no longer than that, a full cache with a mask."""
    ring = "ring"
    """As many slots as the window has, and work on little else: no mask for a prompt's first window
    and in decoding, overlapping blocks of queries for the rest of a prompt."""


OF_WEIGHTS = ("rounding", "rotate", "calibration_tokens")
"""Settings that change the weights of a program but not its operators, and so not its latency."""


@dataclass(kw_only=True)  # not frozen: omegaconf would refuse overrides
class LoweringSettings:
    """Formats and lengths of a program."""

    quantization: Quantization = Quantization.int8da4w
    """Weight format."""
    group_size: int = GROUP
    """int8da4w: weights that share a scale; a multiple of 32 that divides every width. The paper
    has 32."""
    embedding_bits: int = 4
    """int8da4w: bits of a weight of the embedding: 4 in groups, or 8 with a scale a row."""
    eight_bit: list[str] = field(default_factory=list)
    """int8da4w: parts of the model whose weights have 8 bits with a scale a row, by name or
    pattern, such as [layers.0.self_attn,"layers.*.mlp",lm_head]; see also `mixed`."""
    rounding: Rounding = Rounding.gptq
    """int8da4w: choice of the integers. Weights that were trained for rounding (`recipe.qat`) stay
    as they are with any of them."""
    rotate: bool | None = None
    """int8da4w: spread outliers over all channels before rounding; the logits in float stay the
    same. Null: as in the training for `recipe.qat`, else with `gptq` only."""
    calibration_tokens: int = 8192
    """Tokens of training text on which `gptq` judges the outputs of a matrix."""
    cache: CacheFormat = CacheFormat.fp32
    """Key and value format. bf16 takes half the memory of fp32; the device decides which of both
    decodes faster. int8 is for phones: on x86 its attention kernel is 5 times slower."""
    attention: AttentionForm = AttentionForm.matmul
    """Operators that attend to the cache in prefill."""
    sliding: SlidingForm = SlidingForm.stock
    """Form of sliding-window layers."""
    prefill_last_only: bool = True
    """Prefill computes, from the last layer with attention on, keys and values of all tokens and
    the rest for the last token alone: the logits are the same, and nothing reads the others."""
    max_context: int = 1024
    """Cache slots: the longest prompt and answer together [tokens]."""
    prefill_chunk: int | None = None
    """Most tokens of one prefill call; null is max_context, at most 256 with `attention: matmul`
    and 1024 with `sdpa` [tokens]."""

    def __post_init__(self) -> None:
        require(
            type(self.group_size) is int and self.group_size > 0 and self.group_size % GROUP == 0,
            "group_size",
            self.group_size,
            f"a multiple of {GROUP}, which XNNPACK's kernels read at a time",
        )
        require(self.embedding_bits in (4, 8), "embedding_bits", self.embedding_bits, "4 or 8")
        require(
            type(self.max_context) is int and self.max_context >= 2,
            "max_context",
            self.max_context,
            "an integer of at least 2",
        )
        require(
            type(self.calibration_tokens) is int and self.calibration_tokens > 0,
            "calibration_tokens",
            self.calibration_tokens,
            "a positive integer",
        )
        chunk = self.prefill_chunk
        require(
            chunk is None or (type(chunk) is int and 2 <= chunk <= self.max_context),
            "prefill_chunk",
            chunk,
            f"null or an integer from 2 to max_context={self.max_context}",
        )

    @property
    def weight_format(self) -> WeightFormat:
        """Integers of int8da4w."""
        return WeightFormat(self.group_size, self.embedding_bits, tuple(self.eight_bit))

    @property
    def chunk(self) -> int:
        """Most tokens of one prefill call [tokens]."""
        if self.prefill_chunk is not None:
            return self.prefill_chunk
        return min(self.max_context, LARGEST_CHUNK[self.attention])

    def identity(self) -> dict[str, Any]:
        """Plain values that decide a program, by the names that measurement stores use.

        Those that only decide the weights are not among them, nor is what came later and is not
        used.
        """
        values = {
            key: value.value if isinstance(value, Enum) else value
            for key, value in dataclasses.asdict(self).items()
            if key not in OF_WEIGHTS and (key != "eight_bit" or value)
        }
        skip_unread = values.pop("prefill_last_only")
        return {**values, "prefill_chunk": self.chunk, "skip_unread": skip_unread}

    def check_fits(self, spec: ArchSpec) -> None:
        """See that a program can be written of `spec`.

        Raises:
            InputError: The context is longer than the architecture's, or a width is no multiple of
                the group size.
        """
        require(
            self.max_context <= spec.max_context,
            "device.lowering.max_context",
            self.max_context,
            f"at most arch.max_context={spec.max_context}",
        )
        if self.quantization is Quantization.fp32:
            return
        widths = (spec.model_dim, *sorted({*spec.ffn_dims}), spec.num_heads * spec.head_dim)
        require(
            all(width % self.group_size == 0 for width in widths),
            "device.lowering.group_size",
            self.group_size,
            f"a divisor of model_dim, ffn_dim and num_heads * head_dim, which are {widths}",
        )
        parts = list(linear_parts(spec))
        for pattern in self.eight_bit:
            require(
                bool(fnmatch.filter(parts, pattern)),
                "device.lowering.eight_bit",
                pattern,
                f"a name or pattern of parts of the model, such as {', '.join(parts[:2])} or "
                "lm_head",
            )

    def weight_bytes(self, spec: ArchSpec) -> int:
        """Bytes of all weights of a program of `spec`."""
        parts = linear_parts(spec)
        wide = {part for pattern in self.eight_bit for part in fnmatch.filter(parts, pattern)}
        return weight_bytes(spec, self.quantization, self.group_size, self.embedding_bits, wide)

    def cache_bytes(self, spec: ArchSpec) -> int:
        """Bytes of all KV caches that a program of `spec` allocates."""
        sliding = self.slots(spec.sliding_window)
        return kv_cache_bytes(spec, self.slots(None), sliding, self.cache)

    def slots(self, window: int | None) -> int:
        """Tokens that one layer's cache holds; `window` None is full attention [tokens]."""
        if window is None:
            return self.max_context
        ring = self.sliding is SlidingForm.ring
        return min(self.max_context, window if ring else 2 * max(window, self.chunk))


@dataclass(kw_only=True)
class GateSettings:
    """Config of the parity gate: lengths of its text, and the largest accepted differences."""

    prefill_tokens: int = 32
    """Prompt length of the comparison of logits; it goes through in two chunks [tokens]."""
    decode_tokens: int = 16
    """Teacher-forced single steps after the prompt."""
    max_perplexity_increase_pct: float | None = None
    """Largest increase of held-out perplexity by rounding, of the decoder and of the .pte [%].
    Null: 15 below 200M parameters, 10 below 1B, else 6, as small models lose more."""
    max_kl_quantized: float = 0.25
    """Rounded decoder against float: mean KL [nats]."""
    min_agreement_quantized: float = 0.6
    """Rounded decoder against float: share of positions with the same likeliest token."""
    max_error_fp32: float = 1e-4
    """Any stage without quantisation of weights or cache: largest difference over largest logit."""
    max_kl_cache: float = 0.1
    """Module with a KV cache against the decoder without one: mean KL [nats]; for int8 caches."""
    max_kl_runtime: float = 0.02
    """Each quantised stage against the one before it: mean KL [nats]. Sums in another order, as in
    XNNPACK and torchao, move single activations by one 8-bit step: 4e-6 was seen on small random
    weights, 0.03 on absurdly large ones."""
    min_agreement_runtime: float = 0.9
    """Each quantised stage against the one before it: share of positions with the same likeliest
    token, less what chance takes from it in so few positions."""

    def __post_init__(self) -> None:
        for name in ("prefill_tokens", "decode_tokens"):
            value = getattr(self, name)
            require(type(value) is int and value >= 2, name, value, "2 or more")
        for name in ("min_agreement_quantized", "min_agreement_runtime"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "a share from 0 to 1")
        for name in ("max_error_fp32", "max_kl_quantized", "max_kl_cache", "max_kl_runtime"):
            value = getattr(self, name)
            require(value > 0, name, value, "a positive number")
        most = self.max_perplexity_increase_pct
        valid = most is None or most > 0
        require(valid, "max_perplexity_increase_pct", most, "a positive number or null")

    @property
    def tokens(self) -> int:
        """Length of the text of the comparison of logits [tokens]."""
        return self.prefill_tokens + self.decode_tokens

    def perplexity_limit(self, parameters: int) -> float:
        """Largest increase of perplexity for a model of so many parameters [%]."""
        if self.max_perplexity_increase_pct is not None:
            return self.max_perplexity_increase_pct
        return 15.0 if parameters < 200e6 else 10.0 if parameters < 1e9 else 6.0

    def check_fits(self, lengths: Mapping[str, int]) -> None:
        """See that the gate can run.

        Args:
            lengths: Settings that limit the length of its text, by key [tokens].

        Raises:
            InputError: One of them is too short.
        """
        for key, length in lengths.items():
            require(
                length >= self.tokens,
                key,
                length,
                f"at least {self.tokens}, which gate.prefill_tokens and gate.decode_tokens take",
            )
