"""Where a program runs and is timed: this machine, boards and phones, by one protocol."""

from flash.device.base import Device, DeviceError
from flash.device.host import HostDevice
from flash.device.links import AndroidSettings, SshSettings
from flash.device.measurement import Latency, Measurement, Program
from flash.device.settings import DeviceKind, DeviceSettings
from flash.device.workload import Phase, Point, Workload


def open_device(settings: DeviceSettings) -> Device:
    """The device that the settings describe."""
    match settings.kind:
        case DeviceKind.host:
            return HostDevice(settings)
        case DeviceKind.ssh:
            from flash.device.ssh import SshDevice

            return SshDevice(settings)
        case DeviceKind.android:
            from flash.device.android import AndroidDevice

            return AndroidDevice(settings)


__all__ = [
    "AndroidSettings",
    "Device",
    "DeviceError",
    "DeviceKind",
    "DeviceSettings",
    "HostDevice",
    "Latency",
    "Measurement",
    "Phase",
    "Point",
    "Program",
    "SshSettings",
    "Workload",
    "open_device",
]
