"""What a measurement is: a program, the raw times of its runs, and the two numbers made of them."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Program:
    """A lowered file and the input that it takes.

    Attributes:
        name: Unique within one call of `measure`.
        path: The .pte file.
        vocab_size: Token ids to draw from, for a program that takes tokens.
        model_dim: Width of the activations, for a block that takes those instead.
    """

    name: str
    path: Path
    vocab_size: int | None = None
    model_dim: int | None = None

    def __post_init__(self) -> None:
        assert (self.vocab_size is None) != (self.model_dim is None), "tokens or activations"

    def to_job(self) -> dict[str, Any]:
        """As runner.py wants it."""
        return {
            "name": self.name,
            "path": str(self.path),
            "input": "tokens" if self.model_dim is None else "activations",
            "vocab_size": self.vocab_size,
            "model_dim": self.model_dim,
        }


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Latencies of one program on one device.

    The estimate is the smallest time of all accepted processes: noise only ever adds time.

    Attributes:
        name: The program's.
        ttft_ms: Time to the first token's logits.
        ttft_se_ms: Standard error of it, from the minima of the processes.
        decode_ms: Time of one decode step.
        decode_se_ms: Standard error of it.
        load_ms: Smallest time to load the program, weight packing included.
        peak_rss_mib: Largest resident set of the process that ran all programs of the call,
            Python and torch included.
        model_rss_mib: What loading this program added to the resident set.
        rejected: Processes thrown away as too slow.
        samples: Raw times of every process, rejected ones too.
        conditions: Load, steal and other circumstances of each process.
    """

    name: str
    ttft_ms: float
    ttft_se_ms: float
    decode_ms: float
    decode_se_ms: float
    load_ms: float
    peak_rss_mib: float
    model_rss_mib: float
    rejected: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)
    conditions: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Measurement":
        """Inverse of `to_dict`."""
        return cls(**values)


def standard_error(minima: Sequence[float]) -> float:
    """Standard error of the smallest of several processes' minima.

    The minimum of k draws spreads less than one draw; with so few processes nothing better can be
    said than their standard deviation over the root of their number. One process tells nothing of
    the spread between processes: then 10 % of the value, the upper end of what was seen.
    """
    if len(minima) < 2:
        return 0.1 * minima[0]
    return statistics.stdev(minima) / len(minima) ** 0.5


def accepted(times: Sequence[float], ratio: float) -> list[bool]:
    """Which processes are within `ratio` of the fastest."""
    best = min(times)
    return [value <= ratio * best for value in times]
