"""Creation of a device from its settings.

Devices behind ssh and adb are imported only where one is used.
"""

from flash.device.base import Device
from flash.device.host import HostDevice
from flash.device.settings import DeviceKind, DeviceSettings


def open_device(device_settings: DeviceSettings) -> Device:
    """Create the device that the settings describe.

    Raises:
        InputError: Connection settings that cannot be used, or a file of them that is missing.
    """
    match device_settings.kind:
        case DeviceKind.host:
            return HostDevice(device_settings)
        case DeviceKind.ssh:
            from flash.device.ssh import SshDevice

            return SshDevice(device_settings)
        case DeviceKind.android:
            from flash.device.android import AndroidDevice

            return AndroidDevice(device_settings)


def text_device(device: Device) -> Device:
    """Return a device that continues and scores texts: this one if it can, else this host.

    The file is the same, so a phone's program is judged here.
    """
    return device if device.runs_texts else HostDevice(DeviceSettings(name="host"))
