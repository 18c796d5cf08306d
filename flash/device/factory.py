"""`open_device`: the device that settings describe."""

from flash.device.base import Device
from flash.device.host import HostDevice
from flash.device.settings import DeviceKind, DeviceSettings


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
