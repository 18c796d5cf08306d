"""Records of a measurement: the program, the raw times of its runs, and latencies from these."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flash.device.workload import Phase, Point


@dataclass(frozen=True, kw_only=True)
class Program:
    """A lowered file and the kind of its input.

    Attributes:
        name: Name, unique within one call of `measure`.
        path: The .pte file.
        vocab_size: Number of token ids to draw from, for a program that takes tokens.
        model_dim: Width of the activations, for a block that takes these instead.
        flush_mib: Memory that is read before each timed call [MiB]. A block measured alone would
            find its weights in the processor's caches; inside a model the other layers have evicted
            them.
    """

    name: str
    path: Path
    vocab_size: int | None = None
    model_dim: int | None = None
    flush_mib: int = 0

    def __post_init__(self) -> None:
        assert (self.vocab_size is None) != (self.model_dim is None), "tokens or activations"

    def to_job(self) -> dict[str, Any]:
        """The program as an object of runner.py's job."""
        return {
            "name": self.name,
            "path": str(self.path),
            "input": "tokens" if self.model_dim is None else "activations",
            "vocab_size": self.vocab_size,
            "model_dim": self.model_dim,
            "flush_mib": self.flush_mib,
        }


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One measured latency.

    Attributes:
        ms: Smallest time of all accepted processes, since noise only ever adds time.
        se_ms: Standard error of `ms`, from the minima of the processes.
    """

    ms: float
    se_ms: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Latencies of one program on one device.

    Attributes:
        name: Name of the program.
        latencies: Latencies by name of their point (`prefill_512`), in the order of the workload.
        load_ms: Smallest time to load the program, including weight packing.
        peak_rss_mib: Largest resident set size of the process that ran all programs of the call,
            including Python and torch.
        model_rss_mib: Growth of the resident set size by loading this program.
        rejected: Number of processes rejected as too slow.
        samples: Raw times of every process, including rejected ones, by name of the point.
        conditions: Load, steal and other circumstances of each process.
    """

    name: str
    latencies: Mapping[str, Latency]
    load_ms: float
    peak_rss_mib: float
    model_rss_mib: float
    rejected: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)
    conditions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def prefill(self) -> Latency:
        """Time to first token of the headline prompt."""
        return self._first(Phase.prefill)

    @property
    def decode(self) -> Latency:
        """Time of one decode step at the headline context."""
        return self._first(Phase.decode)

    @property
    def reference_ms(self) -> dict[str, float]:
        """Latency of the reference in the accepted processes, by name of the point [ms].

        Empty if no reference was timed.
        """
        kept = [
            conditions.get("reference_ms", {})
            for conditions, sample in zip(self.conditions, self.samples, strict=True)
            if sample["accepted"]
        ]
        return {name: min(each[name] for each in kept) for name in kept[0]}

    def _first(self, phase: Phase) -> Latency:
        names = (name for name in self.latencies if Point.parse(name).phase is phase)
        return self.latencies[next(names)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Measurement":
        """Inverse of `to_dict`."""
        latencies = {name: Latency(**each) for name, each in values["latencies"].items()}
        return cls(**{**values, "latencies": latencies})


def standard_error(minima: Sequence[float]) -> float:
    """Standard error of the smallest of several processes' minima.

    The delay that a process adds to the undisturbed time is roughly exponential with mean theta. Of
    k such delays the smallest has mean and standard deviation theta / k, and in expectation
    theta / k = (mean - min) / (k - 1) (order statistics of the exponential distribution). A single
    process gives no information about the spread; its error is taken as 10 % of the value, the
    largest that was observed.
    """
    if len(minima) < 2:
        return 0.1 * minima[0]
    return max(0.0, statistics.fmean(minima) - min(minima)) / (len(minima) - 1)


def accepted(times: Sequence[float], ratio: float) -> list[bool]:
    """Return for each process whether its time is at most `ratio` times the smallest."""
    best = min(times)
    return [value <= ratio * best for value in times]
