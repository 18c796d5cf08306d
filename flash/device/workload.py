"""Latencies to time: prompts of some lengths, and single decode steps at some contexts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from flash.errors import InputError, require


class Phase(Enum):
    """The two latencies of a language model on a device."""

    prefill = "prefill"
    """Time to first token: from an empty cache to the first token's logits."""
    decode = "decode"
    """Time of one generated token."""


@dataclass(frozen=True)
class Point:
    """One latency that is timed and predicted; its name is `prefill_512` or `decode_2048`.

    Attributes:
        phase: Prefill or decode.
        tokens: Length of the prompt, or position in the cache of the decoded token.
    """

    phase: Phase
    tokens: int

    @classmethod
    def parse(cls, name: str) -> "Point":
        """The point of that name; another text is an InputError."""
        match = re.fullmatch(r"(prefill|decode)_(\d+)", name)
        if match is None:
            raise InputError(f"point={name}: expected prefill_N or decode_N, N a number of tokens")
        return cls(Phase(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        return f"{self.phase.value}_{self.tokens}"

    def __str__(self) -> str:
        return self.name


@dataclass(kw_only=True)  # not frozen: omegaconf would refuse overrides
class Workload:
    """Latencies of a measurement. The first prompt and the first context are the headline.

    TTFT is the time from an empty cache to the first token's logits, the prompt fed in chunks.
    Decode is the time of one token at a cache position; the cache's content does not change it.
    """

    prompts: list[int] = field(default_factory=lambda: [512])
    """Prompt lengths whose TTFT is timed; the search works on the first [tokens]."""
    contexts: list[int] = field(default_factory=lambda: [512])
    """Cache positions at which decoding is timed; the search works on the first [tokens]."""
    decode_tokens: int = 16
    """Timed decode steps of one run."""

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("contexts", 0)):
            values = getattr(self, name)
            legal = all(type(value) is int and value >= least for value in values)
            require(
                legal and len(set(values)) == len(values),
                name,
                list(values),
                f"different integers of at least {least}",
            )
        require(bool(self.prompts or self.contexts), "prompts", "[]", "something to time")
        require(
            type(self.decode_tokens) is int and self.decode_tokens > 0,
            "decode_tokens",
            self.decode_tokens,
            "a positive integer",
        )

    @property
    def points(self) -> tuple[Point, ...]:
        """Every latency of this workload, prompts first."""
        return (
            *(Point(Phase.prefill, tokens) for tokens in self.prompts),
            *(Point(Phase.decode, tokens) for tokens in self.contexts),
        )

    def first(self, phase: Phase) -> Point:
        """The headline point of a phase."""
        return next(point for point in self.points if point.phase is phase)

    @property
    def context(self) -> int:
        """Cache slots that a program needs to run this workload [tokens]."""
        decoded = (tokens + self.decode_tokens for tokens in self.contexts)
        return max((*self.prompts, *decoded))

    def only(self, points: Sequence[Point]) -> "Workload":
        """The same with some of its points."""
        prompts = [p.tokens for p in points if p.phase is Phase.prefill]
        contexts = [p.tokens for p in points if p.phase is Phase.decode]
        return replace(self, prompts=prompts, contexts=contexts)
