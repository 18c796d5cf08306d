"""Workload of a measurement: the prompt lengths and cache positions whose latency is timed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from flash.errors import InputError, require


class Phase(Enum):
    """Phases of text generation, whose latencies are timed separately."""

    prefill = "prefill"
    """Reading of the prompt; its latency is the time to first token (TTFT)."""
    decode = "decode"
    """Generation of one token."""


@dataclass(frozen=True)
class Point:
    """Latency that is timed and predicted, such as `prefill_512` or `decode_2048`."""

    phase: Phase
    """Phase whose latency is timed."""
    tokens: int
    """Length of the prompt, or cache position of the decoded token [tokens]."""

    @classmethod
    def parse(cls, name: str) -> "Point":
        """Convert a name such as `prefill_512` to a point.

        Raises:
            InputError: The name has another form.
        """
        match = re.fullmatch(r"(prefill|decode)_(\d+)", name)
        if match is None:
            raise InputError(f"point={name}: expected prefill_N or decode_N, N a number of tokens")
        return cls(Phase(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        """Name of the point: the phase and the number of tokens."""
        return f"{self.phase.value}_{self.tokens}"

    def __str__(self) -> str:
        return self.name


@dataclass(kw_only=True)  # not frozen: omegaconf would refuse overrides
class Workload:
    """Latencies to time; those of the first prompt and the first context are the headline.

    TTFT is the time from an empty cache to the logits of the first token; the prompt is fed in
    chunks. Decode is the time of one token at a cache position; it does not depend on the content
    of the cache.
    """

    prompts: list[int] = field(default_factory=lambda: [512])
    """Prompt lengths whose TTFT is timed [tokens]; the search uses the first."""
    contexts: list[int] = field(default_factory=lambda: [512])
    """Cache positions at which decoding is timed [tokens]; the search uses the first."""
    decode_tokens: int = 16
    """Number of decode steps that are timed in one run."""

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
        """All points of the workload, prompts first."""
        return (
            *(Point(Phase.prefill, tokens) for tokens in self.prompts),
            *(Point(Phase.decode, tokens) for tokens in self.contexts),
        )

    def first(self, phase: Phase) -> Point:
        """Return the headline point of a phase."""
        return next(point for point in self.points if point.phase is phase)

    @property
    def context(self) -> int:
        """Size of the cache that a program needs to run the workload [tokens]."""
        decoded = (tokens + self.decode_tokens for tokens in self.contexts)
        return max((*self.prompts, *decoded))

    def only(self, points: Sequence[Point]) -> "Workload":
        """Return the workload with only these points."""
        prompts = [p.tokens for p in points if p.phase is Phase.prefill]
        contexts = [p.tokens for p in points if p.phase is Phase.decode]
        return replace(self, prompts=prompts, contexts=contexts)
