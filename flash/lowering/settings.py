"""What the lowering writes: weight format, cache format, lengths."""

from dataclasses import dataclass

from flash.arch import CacheFormat, Quantization
from flash.errors import require

LARGEST_CHUNK = 1024
"""Longest default prefill chunk [tokens]; 1024 beat 512 on the host, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class LoweringSettings:
    """How a decoder becomes a program."""

    quantization: Quantization = Quantization.int8da4w
    """Weight format; int8da4w also packs the embedding in 4 bits."""
    cache: CacheFormat = CacheFormat.fp32
    """Key and value format; the int8 attention kernel is several times slower on x86."""
    max_context: int = 2048
    """Cache slots: the longest prompt and answer together [tokens]."""
    prefill_chunk: int | None = None
    """Most tokens of one call; None becomes max_context, at most 1024; read `chunk` [tokens]."""

    def __post_init__(self) -> None:
        require(
            type(self.max_context) is int and self.max_context >= 2,
            "lowering.max_context",
            self.max_context,
            "an integer of at least 2",
        )
        if self.prefill_chunk is None:
            chunk = min(self.max_context, LARGEST_CHUNK)
            object.__setattr__(self, "prefill_chunk", chunk)
        require(
            type(self.prefill_chunk) is int and 2 <= self.prefill_chunk <= self.max_context,
            "lowering.prefill_chunk",
            self.prefill_chunk,
            f"an integer from 2 to lowering.max_context={self.max_context}",
        )

    @property
    def chunk(self) -> int:
        """`prefill_chunk`, which is a number once this object is made [tokens]."""
        assert self.prefill_chunk is not None
        return self.prefill_chunk
