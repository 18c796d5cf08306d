"""Settings of the search (config group `search`)."""

import re
from dataclasses import dataclass
from enum import Enum

from flash.errors import require


class Sampler(Enum):
    """How the next candidates are proposed."""

    flash = "flash"
    """Model-based: stage 2 of the paper (Sec. 3.5)."""
    random = "random"
    """Stratified random draws, the baseline that a model must beat."""


@dataclass(kw_only=True)
class SearchSettings:
    """Config group `search`: stage 2, multi-objective search of (held-out loss, latency)."""

    study: str
    """Name of the study; the same name again resumes it."""
    sampler: Sampler = Sampler.flash
    trials: int = 200
    """Candidates to evaluate, failed ones included."""
    batch: int = 8
    """Candidates that are proposed together."""
    startup_trials: int = 32
    """Stratified random candidates before the model takes over."""
    pool_size: int = 2048
    """Architectures that compete for the places in a batch."""
    max_loss_increase: float = 0.6
    """Reference point: the worst acceptable loss, above the backbone's [nats a token]."""
    max_latency_ratio: float = 1.0
    """Reference point: the worst acceptable latency, as a multiple of the backbone's."""
    winners: int = 3
    """Candidates of the frontier that go on to final training, at most."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.study) is not None,
            "search.study",
            self.study,
            "letters, digits, '_' and '-', as it becomes part of file names",
        )
        for name in ("trials", "batch", "startup_trials", "pool_size", "winners"):
            value = getattr(self, name)
            require(value > 0, f"search.{name}", value, "a positive integer")
        require(
            self.pool_size >= self.batch,
            "search.pool_size",
            self.pool_size,
            f"at least search.batch={self.batch}",
        )
        for name in ("max_loss_increase", "max_latency_ratio"):
            value = getattr(self, name)
            require(value > 0, f"search.{name}", value, "a positive number")

    def reference(self, backbone_loss: float, backbone_latency_ms: float) -> tuple[float, float]:
        """The worst acceptable (loss, latency in ms); hypervolume is counted from here."""
        return (
            backbone_loss + self.max_loss_increase,
            backbone_latency_ms * self.max_latency_ratio,
        )
