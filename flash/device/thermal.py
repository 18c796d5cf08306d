"""How warm a phone is and how fast its cores may run, as a shell without root can see it."""

import re
from collections.abc import Collection
from dataclasses import dataclass

# What is readable differs from phone to phone; each part may print nothing.
SCRIPT = (
    "grep -s . /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq "
    "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_max_freq "
    "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq "
    "/sys/class/thermal/thermal_zone*/type /sys/class/thermal/thermal_zone*/temp; "
    "dumpsys thermalservice 2>/dev/null; true"
)
"""Prints what `parse` reads, in one round trip."""

SENSORS = ("skin", "batt", "cpu")
"""Parts of sensors' names, best first: the skin's temperature is what phones throttle by."""

_FREQUENCY = re.compile(r"/cpu(\d+)/cpufreq/(\w+):(\d+)$", re.MULTILINE)
_ZONE = re.compile(r"/(thermal_zone\d+)/(type|temp):(.+)$", re.MULTILINE)
_SENSOR = re.compile(r"Temperature\{mValue=([-0-9.]+), mType=\d+, mName=([^,]+),")


@dataclass(frozen=True)
class Thermal:
    """One reading.

    Attributes:
        sensor: Which kind of sensor `celsius` is from, "" where none is readable.
        celsius: The hottest sensor of that kind [degrees C].
        frequency_khz: Present clock by CPU.
        cap_khz: Highest clock that the system allows at present, by CPU.
        max_khz: Highest clock of the hardware, by CPU.
    """

    sensor: str
    celsius: float | None
    frequency_khz: dict[int, int]
    cap_khz: dict[int, int]
    max_khz: dict[int, int]

    def capped(self, cpus: Collection[int] | None) -> list[int]:
        """Those of the CPUs (None: all) whose clock the system holds below the hardware's."""
        wanted = self.cap_khz if cpus is None else cpus
        return [cpu for cpu in wanted if self.cap_khz.get(cpu, 0) < self.max_khz.get(cpu, 0)]


def parse(text: str) -> Thermal:
    """The reading that `SCRIPT` printed."""
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
    """Names and values in the service's current readings; its cache is older."""
    _, _, current = text.partition("Current temperatures from HAL:")
    return [(name, float(value)) for value, name in _SENSOR.findall(current)]


def _from_zones(text: str) -> list[tuple[str, float]]:
    zones: dict[str, dict[str, str]] = {}
    for zone, field, value in _ZONE.findall(text):
        zones.setdefault(zone, {})[field] = value.strip()
    return [
        (zone["type"], int(zone["temp"]) / 1000)
        for zone in zones.values()
        if "type" in zone and re.fullmatch(r"-?\d+", zone.get("temp", ""))
    ]


def _hottest(readings: list[tuple[str, float]]) -> tuple[str, float] | None:
    for sensor in SENSORS:
        values = [value for name, value in readings if sensor in name.lower()]
        if values:
            return sensor, max(values)
    return None
