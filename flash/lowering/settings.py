"""What the lowering writes: weight format, cache format, lengths."""

from dataclasses import dataclass
from enum import Enum

from flash.arch import CacheFormat, Quantization
from flash.errors import require

LARGEST_CHUNK = 1024
"""Longest default prefill chunk [tokens]; 1024 beat 512 on the host, as in the paper."""


class SlidingForm(Enum):
    """How a sliding-window layer keeps its keys and attends to them."""

    stock = "stock"
    """ExecuTorch's ring buffer: twice the longest of window and chunk, every slot computed and
    masked. Where the context is no longer than that, a full cache with a mask."""
    ring = "ring"
    """As many slots as the window has, and work on little else: no mask for a prompt's first window
    and in decoding, overlapping blocks of queries for the rest of a prompt."""


@dataclass(frozen=True, kw_only=True)
class LoweringSettings:
    """How a decoder becomes a program."""

    quantization: Quantization = Quantization.int8da4w
    """Weight format; int8da4w also packs the embedding in 4 bits."""
    cache: CacheFormat = CacheFormat.fp32
    """Key and value format; the int8 attention kernel is several times slower on x86."""
    sliding: SlidingForm = SlidingForm.stock
    """Form of sliding-window layers."""
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

    def slots(self, window: int | None) -> int:
        """Tokens that one layer's cache holds; `window` None is full attention [tokens]."""
        if window is None:
            return self.max_context
        ring = self.sliding is SlidingForm.ring
        return min(self.max_context, window if ring else 2 * max(window, self.chunk))
