"""Where a program runs and is timed: the host now, boards and phones through the same protocol."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from flash.device.host import DeviceError, HostDevice
from flash.device.measurement import Measurement, Program
from flash.device.settings import DeviceKind, DeviceSettings
from flash.device.workload import Workload


class Device(Protocol):
    """Anything that can run a program and time it."""

    settings: DeviceSettings

    def identity(self) -> dict[str, str | int]: ...

    def measure(
        self,
        programs: Sequence[Program],
        workload: Workload,
        reference: Program | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Measurement]: ...

    def generate(
        self, path: Path, tokens: Sequence[int], new_tokens: int, stop: Sequence[int] = ()
    ) -> list[int]: ...

    def score(
        self, path: Path, tokens: Sequence[int], *, prefill: int = 1, keep_logits: bool = False
    ) -> dict[str, Any]: ...


def open_device(settings: DeviceSettings) -> Device:
    """The device that the settings describe."""
    match settings.kind:
        case DeviceKind.host:
            return HostDevice(settings)


__all__ = [
    "Device",
    "DeviceError",
    "DeviceKind",
    "DeviceSettings",
    "HostDevice",
    "Measurement",
    "Program",
    "Workload",
    "open_device",
]
