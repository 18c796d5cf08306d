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

UNITS = {"degrees": 1, "tenths of a degree": 10, "thousandths of a degree": 1000}
"""Units in which sensors report, by name: parts of a degree C. Linux says thousandths, but not all
vendors' drivers keep to it, and the zones of one phone differ."""
_COLDEST, _HOTTEST = 5, 120
"""Range of a phone's temperatures [degrees C]; other readings are those of sensors that are off."""

_FREQUENCY = re.compile(r"/cpu(\d{1,4})/cpufreq/(\w+):(\d{1,9})$", re.MULTILINE)
_ZONE = re.compile(r"/(thermal_zone\d+)/(type|temp):(.+)$", re.MULTILINE)
_SENSOR = re.compile(r"Temperature\{mValue=(-?\d{1,9}(?:\.\d+)?), mType=-?\d+, mName=([^,]+),")


@dataclass(frozen=True)
class Thermal:
    """One reading of temperature and clocks.

    Attributes:
        sensor: Kind of sensor that `celsius` comes from, an entry of `SENSORS`; "" if none is
            readable.
        celsius: Temperature of the hottest sensor of that kind [degrees C].
        unit: Entry of `UNITS` in which the sensor reports, as its reading is plausible in it; "" if
            none is readable.
        frequency_khz: Present clock by CPU [kHz].
        cap_khz: Highest clock that the system allows at present, by CPU [kHz].
        max_khz: Highest clock of the hardware, by CPU [kHz].
    """

    sensor: str
    celsius: float | None
    unit: str
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
    sensor, celsius, unit = (
        _hottest(_from_service(text)) or _hottest(_from_zones(text)) or ("", None, "")
    )
    return Thermal(
        sensor=sensor,
        celsius=celsius,
        unit=unit,
        frequency_khz=clocks.get("scaling_cur_freq", {}),
        cap_khz=clocks.get("scaling_max_freq", {}),
        max_khz=clocks.get("cpuinfo_max_freq", {}),
    )


def _from_service(text: str) -> list[tuple[str, float]]:
    """Names and values of the thermal service's current readings, not its cached ones."""
    _, _, current = text.partition("Current temperatures from HAL:")
    return [(name, float(value)) for value, name in _SENSOR.findall(current)]


def _from_zones(text: str) -> list[tuple[str, float]]:
    """Names and values of the kernel's thermal zones."""
    zones: dict[str, dict[str, str]] = {}
    for zone, field, value in _ZONE.findall(text):
        zones.setdefault(zone, {})[field] = value.strip()
    return [
        (zone["type"], float(zone["temp"]))
        for zone in zones.values()
        if "type" in zone and re.fullmatch(r"-?\d{1,9}", zone.get("temp", ""))
    ]


def in_celsius(value: float) -> tuple[float, str] | None:
    """Temperature of a reading [degrees C] and the name of its unit; None if it is implausible.

    Few values are plausible in two units: 50 to 120 are as many degrees, rather than tenths, since
    a phone that works is seldom below 12 degrees, and a hot one must not pass for a cold one.
    """
    for unit, parts in UNITS.items():
        if _COLDEST <= value / parts <= _HOTTEST:
            return value / parts, unit
    return None


def _hottest(readings: list[tuple[str, float]]) -> tuple[str, float, str] | None:
    """Kind, temperature and unit of the hottest sensor of the best kind with a plausible one."""
    for sensor in SENSORS:
        named = (value for name, value in readings if sensor in name.lower())
        values = [found for found in map(in_celsius, named) if found is not None]
        if values:
            return (sensor, *max(values))
    return None
