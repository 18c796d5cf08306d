"""What a search minimises and what it may not exceed.

Held-out loss has to be found by training; everything else is a function of the architecture that is
known before: latency from stage 1, bytes from counting. So limits are obeyed by construction, and
new limits or another device need no training again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from flash.arch import ArchSpec


class Objective(Enum):
    """Something to be minimised; the value is the key of its figures, unit included."""

    quality = "loss"
    """Held-out loss after the short training [nats a token]."""
    prefill = "prefill_ms"
    """Predicted time to first token at the device's first prompt length."""
    decode = "decode_ms"
    """Predicted time of a generated token at the device's first context."""
    memory = "memory_mib"
    """Weights and the keys and values of a full context (arch.counts)."""
    size = "size_mib"
    """Weights as the lowering packs them, so nearly all of the .pte (arch.counts)."""

    @property
    def unit(self) -> str:
        """Unit for people."""
        return {"loss": "nats"}.get(self.value, self.value.rpartition("_")[2].replace("mib", "MiB"))


Costs = Callable[[Sequence[ArchSpec]], Mapping[str, NDArray[np.float64]]]
"""Architectures -> known figures of each, by the keys of `Objective` other than loss; of latencies,
which are predicted, the upper ends of the 90 % intervals too, by `high`."""

Figure = TypeVar("Figure")


def high(key: str) -> str:
    """Key of the upper end of a latency's interval: `prefill_ms` -> `prefill_high_ms`."""
    return f"{key.removesuffix('_ms')}_high_ms"


def limited(costs: Mapping[str, Figure], key: str) -> Figure:
    """What a limit holds for: the upper end where there is an interval, else the figure itself."""
    return costs.get(high(key), costs[key])


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Objectives, limits and the reference point of one search.

    Attributes:
        costs: The known figures.
        objectives: What is minimised; quality comes first.
        reference: The worst acceptable value of each objective; hypervolume is counted from here.
        limits: Most that a known figure may be, by key; for latencies see `limited`.
        headline: Key of the latency that tables and figures show.
    """

    costs: Costs
    objectives: tuple[Objective, ...]
    reference: tuple[float, ...]
    limits: Mapping[str, float]
    headline: str = Objective.prefill.value

    @property
    def known_keys(self) -> list[str]:
        """Keys of the objectives other than quality."""
        return [objective.value for objective in self.objectives[1:]]

    def known(self, specs: Sequence[ArchSpec]) -> NDArray[np.float64]:
        """Values of the objectives other than quality, shape `(specs, objectives - 1)`."""
        costs = self.costs(specs) if self.known_keys else {}
        columns = [np.asarray(costs[key], dtype=float) for key in self.known_keys]
        return np.stack(columns, axis=1) if columns else np.zeros((len(specs), 0))

    def excess(self, specs: Sequence[ArchSpec]) -> NDArray[np.float64]:
        """The worst breach of a limit as a share of that limit, for each spec; 0 means feasible."""
        worst = np.zeros(len(specs))
        if self.limits and specs:
            costs = self.costs(specs)
            for key, limit in self.limits.items():
                worst = np.maximum(worst, np.asarray(limited(costs, key)) / limit - 1)
        return worst

    def allows(self, costs: Mapping[str, float]) -> bool:
        """Whether figures obey all limits."""
        return all(limited(costs, key) <= limit for key, limit in self.limits.items())
