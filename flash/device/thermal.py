"""Temperature and clock limits of a phone, as far as a shell without root can read them."""

import re
from collections.abc import Collection
from dataclasses import dataclass

# The readable files differ from phone to phone; each part may print nothing.
SCRIPT = (
    "grep -s . /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq "
    "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_max_freq "
    "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq "
    "/sys/class/thermal/thermal_zone*/type /sys/class/thermal/thermal_zone*/temp; "
    "dumpsys thermalservice 2>/dev/null; true"
)
"""Shell script whose output `parse` reads; one round trip prints all values."""

SENSORS = ("skin", "batt", "cpu")
"""Parts of sensors' names, best first: phones throttle by the temperature of their skin."""

_FREQUENCY = re.compile(r"/cpu(\d+)/cpufreq/(\w+):(\d+)$", re.MULTILINE)
_ZONE = re.compile(r"/(thermal_zone\d+)/(type|temp):(.+)$", re.MULTILINE)
_SENSOR = re.compile(r"Temperature\{mValue=([-0-9.]+), mType=\d+, mName=([^,]+),")


@dataclass(frozen=True)
class Thermal:
    """One reading of temperature and clocks.

    Attributes:
        sensor: Kind of sensor that `celsius` comes from, an entry of `SENSORS`; "" if none is
            readable.
        celsius: Temperature of the hottest sensor of that kind [degrees C].
        frequency_khz: Present clock by CPU [kHz].
        cap_khz: Highest clock that the system allows at present, by CPU [kHz].
        max_khz: Highest clock of the hardware, by CPU [kHz].
    """

    sensor: str
    celsius: float | None
    frequency_khz: dict[int, int]
    cap_khz: dict[int, int]
    max_khz: dict[int, int]

    def capped(self, cpus: Collection[int] | None) -> list[int]:
        """List those of `cpus` (None: all) whose clock the system limits below the hardware's."""
        wanted = self.cap_khz if cpus is None else cpus
        return [cpu for cpu in wanted if self.cap_khz.get(cpu, 0) < self.max_khz.get(cpu, 0)]


def parse(text: str) -> Thermal:
    """Parse the output of `SCRIPT`."""
    clocks: dict[str, dict[int, int]] = {}
    for cpu, name, khz in _FREQUENCY.findall(text):
        clocks.setdefault(name, {})[int(cpu)] = int(khz)
    sensor, celsius = _hottest(_from_service(text)) or _hottest(_from_zones(text)) or ("", None)
    return Thermal(
        sensor=sensor,
        celsius=celsius,
        frequency_khz=clocks.get("scaling_cur_freq", {}),
        cap_khz=clocks.get("scaling_max_freq", {}),
        max_khz=clocks.get("cpuinfo_max_freq", {}),
    )


def _from_service(text: str) -> list[tuple[str, float]]:
    """Names and temperatures of the thermal service's current readings, not its cached ones."""
    _, _, current = text.partition("Current temperatures from HAL:")
    return [(name, float(value)) for value, name in _SENSOR.findall(current)]


def _from_zones(text: str) -> list[tuple[str, float]]:
    """Names and temperatures of the kernel's thermal zones."""
    zones: dict[str, dict[str, str]] = {}
    for zone, field, value in _ZONE.findall(text):
        zones.setdefault(zone, {})[field] = value.strip()
    return [
        (zone["type"], int(zone["temp"]) / 1000)
        for zone in zones.values()
        if "type" in zone and re.fullmatch(r"-?\d+", zone.get("temp", ""))
    ]


def _hottest(readings: list[tuple[str, float]]) -> tuple[str, float] | None:
    """Kind and temperature of the hottest sensor of the best kind that has a reading."""
    for sensor in SENSORS:
        values = [value for name, value in readings if sensor in name.lower()]
        if values:
            return sensor, max(values)
    return None
