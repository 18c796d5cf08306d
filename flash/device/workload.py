"""What is timed: one prompt and one stretch of decoding."""

from dataclasses import asdict, dataclass
from typing import Any

from flash.errors import require


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The two latencies of a measurement.

    TTFT is the time from an empty cache to the first token's logits, the prompt fed in chunks.
    Decode is the time of one token whose cache position is `decode_context`; what the cache holds
    does not change it.
    """

    prompt_tokens: int
    """Length of the prompt [tokens]."""
    decode_context: int
    """Cache position of the first timed decode step [tokens]."""
    decode_tokens: int
    """Timed decode steps of one run."""
    prefill_chunk: int
    """Most prompt tokens of one call; at most the program's own chunk [tokens]."""
    threads: int
    """Threads of the runtime's pool."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "decode_tokens", "prefill_chunk", "threads"):
            value = getattr(self, name)
            require(
                type(value) is int and value > 0, f"workload.{name}", value, "a positive integer"
            )
        require(
            type(self.decode_context) is int and self.decode_context >= 0,
            "workload.decode_context",
            self.decode_context,
            "an integer of at least 0",
        )

    @property
    def context(self) -> int:
        """Cache slots that a program needs to run this workload [tokens]."""
        return max(self.prompt_tokens, self.decode_context + self.decode_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
