"""Objectives and limits of a search.

The held-out loss and the errors in tasks are found by training. Every other objective is a known
function of the architecture: latency is predicted by stage 1, sizes are counted. Limits are
therefore met by construction, and new limits or another device need no further training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from flash.arch import ArchSpec
from flash.errors import InputError, nearest


class Quantity(Enum):
    """Quantity that a search knows; the enum value is its key in `Costs`, unit included."""

    quality = "loss"
    """Held-out loss after the short training [nats a token]."""
    task = "error_pct"
    """Share of the questions of a task that are answered wrong after the short training [%]."""
    prefill = "prefill_ms"
    """Predicted time to first token at the device's first prompt length."""
    decode = "decode_ms"
    """Predicted time of one decode step at the device's first context length."""
    memory = "memory_mib"
    """Size of the weights and of the key-value cache of a full context (arch.counts)."""
    size = "size_mib"
    """Size of the weights as packed by the lowering, nearly that of the .pte (arch.counts)."""


@dataclass(frozen=True)
class Objective:
    """Quantity to minimize: over all devices, or on one of several; or the error in a task.

    Settings name it as `prefill`, that of one device as `prefill@NAME`, and the error in a task as
    `task:NAME`.
    """

    quantity: Quantity
    """Quantity to minimize."""
    device: str | None = None
    """Name of the device; None: all of them together (flash.search.devices)."""
    task: str | None = None
    """Name of the task of `Quantity.task`, else None."""

    quality: ClassVar["Objective"]
    prefill: ClassVar["Objective"]
    decode: ClassVar["Objective"]
    memory: ClassVar["Objective"]
    size: ClassVar["Objective"]

    @classmethod
    def parse(cls, name: str) -> "Objective":
        """Return the objective that settings call `name`.

        Raises:
            InputError: There is no such quantity, quality has a device, or a task has no name.
        """
        quantity, colon, task = name.partition(":")
        if quantity == Quantity.task.name:
            if not task:
                raise InputError(f"objective {name}: expected task:NAME, a task of the suite")
            return cls(Quantity.task, task=task)
        quantity, at, device = name.partition("@")
        if quantity not in Quantity.__members__:
            known = [*(n for n in Quantity.__members__ if n != Quantity.task.name), "task:NAME"]
            raise InputError(f"unknown objective {name}; {nearest(quantity, known)}")
        found = cls(Quantity[quantity], device if at else None)
        if device == "" and at:
            raise InputError(f"objective {name}: expected the name of a device after the @")
        if at and found.quantity is Quantity.quality:
            raise InputError(f"objective {name}: expected quality, which depends on no device")
        return found

    @classmethod
    def of_key(cls, key: str) -> "Objective":
        """Return the objective whose key is `key`.

        Raises:
            ValueError: There is none.
        """
        quantity, _, task = key.partition(":")
        if task:
            found = cls(Quantity(quantity), task=task)
        else:
            quantity, at, device = key.partition("@")
            found = cls(Quantity(quantity), device if at else None)
        of_task = found.quantity is Quantity.task
        if of_task != bool(task) or (found.learned and found.device is not None):
            raise ValueError(f"{key!r} is no key of an objective")
        return found

    @property
    def learned(self) -> bool:
        """True if training decides it, so that a search learns it from its trials."""
        return self.quantity in {Quantity.quality, Quantity.task}

    @property
    def name(self) -> str:
        """Name in settings."""
        return self._of(self.quantity.name)

    @property
    def key(self) -> str:
        """Key in `Costs`, in the costs of trials or in their errors."""
        return self._of(self.quantity.value)

    @property
    def unit(self) -> str:
        """Unit in figures and tables, such as `ms` or `MiB`."""
        unit = self.quantity.value.rpartition("_")[2].replace("mib", "MiB").replace("pct", "%")
        return "nats" if self.quantity is Quantity.quality else unit

    def _of(self, name: str) -> str:
        if self.task is not None:
            return f"{name}:{self.task}"
        return name if self.device is None else f"{name}@{self.device}"


for _quantity in Quantity:
    if _quantity is not Quantity.task:
        setattr(Objective, _quantity.name, Objective(_quantity))


Costs = Callable[[Sequence[ArchSpec]], Mapping[str, NDArray[np.float64]]]
"""Function from architectures to their known objectives, arrays of shape `(specs,)` by key of
`Objective`, of each device too where there are several. Latencies are predicted, so the upper ends
of their 90 % intervals are there too, under the keys of `high`."""

Value = TypeVar("Value")


def high(key: str) -> str:
    """Return the key of the upper end of an interval: `prefill_ms` -> `prefill_high_ms`."""
    quantity, at, device = key.partition("@")
    return f"{quantity.removesuffix('_ms')}_high_ms{at}{device}"


def limit_name(key: str) -> str:
    """Return the settings that a limit on a cost comes from, for errors."""
    quantity, at, device = key.partition("@")
    if not at:
        return f"search.limits.{key}"
    name = Objective.of_key(key).name
    return f"search.limits.{quantity} on {device}, or search.device_limits.{name}"


def limited_value(costs: Mapping[str, Value], key: str) -> Value:
    """Return the value to which a limit applies: the upper end of the interval, if there is one."""
    return costs.get(high(key), costs[key])


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Objectives, limits and the reference point of one search.

    Attributes:
        costs: Function that computes the known objectives.
        objectives: Objectives to minimize: those that training decides, then the known ones.
        reference: Worst acceptable value of each objective; the hypervolume is measured from here.
        limits: Upper limits of known objectives by key; for latencies see `limited_value`.
        headline: Key of the latency that tables and figures show.
    """

    costs: Costs
    objectives: tuple[Objective, ...]
    reference: tuple[float, ...]
    limits: Mapping[str, float]
    headline: str = Objective.prefill.key

    @property
    def learned(self) -> tuple[Objective, ...]:
        """Objectives that training decides."""
        return tuple(objective for objective in self.objectives if objective.learned)

    @property
    def known_keys(self) -> list[str]:
        """Keys of the objectives that are known before any training."""
        return [objective.key for objective in self.objectives if not objective.learned]

    def known(self, specs: Sequence[ArchSpec]) -> NDArray[np.float64]:
        """Compute the objectives that need no training, shape `(specs, known objectives)`."""
        costs = self.costs(specs) if self.known_keys else {}
        columns = [np.asarray(costs[key], dtype=float) for key in self.known_keys]
        return np.stack(columns, axis=1) if columns else np.zeros((len(specs), 0))

    def violation(self, specs: Sequence[ArchSpec]) -> NDArray[np.float64]:
        """Compute the largest relative violation of a limit for each spec; 0 means feasible."""
        worst = np.zeros(len(specs))
        if self.limits and specs:
            costs = self.costs(specs)
            for key, limit in self.limits.items():
                worst = np.maximum(worst, np.asarray(limited_value(costs, key)) / limit - 1)
        return worst

    def is_feasible(self, costs: Mapping[str, float]) -> bool:
        """Return True if the costs of one architecture are within all limits."""
        return all(limited_value(costs, key) <= limit for key, limit in self.limits.items())
