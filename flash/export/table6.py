"""Table 6 of the paper with own measurements next to the paper's, both relative to Flash."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from flash.device.measurement import Latency
from flash.device.workload import Phase, Point
from flash.export.random_weights import ShapeResult
from flash.terminal import table, wrap

PHONE = Path(__file__).with_name("phone.yaml")
NONE = "-"

Cells = Mapping[str, tuple[float, float]]
"""Value and standard error by name of the point: TTFT [s], decoding [tokens/s]."""


def table6(results: Sequence[ShapeResult]) -> str:
    """Format a table with one row per model, in the order of the paper's size classes.

    Numbers in brackets are the speedup of the Flash model of the same class, on the device and on
    the paper's phone.

    Args:
        results: Results measured under the same conditions; see `shape_results`.
    """
    if not results:
        return "no shape was measured under these conditions"
    phone = paper_figures()
    order = [name for names in phone["classes"].values() for name in names]
    known = {result.name: result for result in results}
    names = [name for name in order if name in known]
    names += [name for name in known if name not in order]
    points = sorted(
        {Point.parse(name) for result in results for name in result.measurement.latencies},
        key=lambda point: (point.phase is Phase.decode, point.tokens),
    )
    cells = {name: _cells(known[name].measurement.latencies) for name in names}
    header = ["model", "parameters"]
    for point in points:
        header += [_title(point), phone["device"]]
    lines = [header, *(_row(known[name], cells, points) for name in names)]
    device = known[names[0]].device
    source = f"{_described(device)}; {phone['device']}: {phone['source']}"
    return f"{table(lines)}\n{wrap(source)}"


@cache
def paper_figures() -> dict[str, Any]:
    """Read `phone.yaml`: size classes, and the paper's TTFT [s] and decode speed [tokens/s]."""
    return yaml.safe_load(PHONE.read_text("utf-8"))


def flash_of(name: str) -> str | None:
    """Return the Flash model of the class of `name`; None for itself and outside the classes."""
    for first, *others in paper_figures()["classes"].values():
        if name in others:
            return first
    return None


def _cells(latencies: Mapping[str, Latency]) -> Cells:
    cells: dict[str, tuple[float, float]] = {}
    for name, latency in latencies.items():
        if Point.parse(name).phase is Phase.prefill:
            cells[name] = latency.ms / 1e3, latency.se_ms / 1e3
        else:
            cells[name] = 1e3 / latency.ms, 1e3 * latency.se_ms / latency.ms**2
    return cells


def _row(result: ShapeResult, cells: Mapping[str, Cells], points: Sequence[Point]) -> list[str]:
    row = [result.name, f"{result.parameters / 1e6:.1f}M"]
    flash = flash_of(result.name)
    for point in points:
        text = NONE
        if point.name in cells[result.name]:
            value, error = cells[result.name][point.name]
            digits = 1 if value >= 10 else 2 if value >= 1 else 4
            other = cells.get(flash or "", {}).get(point.name)
            ratio = _ratio(point, value, other[0] if other else None)
            text = f"{value:.{digits}f} +- {error:.{digits}f}{ratio}"
        row += [text, _phone(point, result.name, flash)]
    return row


def _phone(point: Point, name: str, flash: str | None) -> str:
    kind = "ttft_s" if point.phase is Phase.prefill else "decode_tok_s"
    figures: dict[str, dict[int, float]] = paper_figures()[kind]
    value = figures.get(name, {}).get(point.tokens)
    if value is None:
        return NONE
    return f"{value:.2f}{_ratio(point, value, figures.get(flash or '', {}).get(point.tokens))}"


def _ratio(point: Point, value: float, flash: float | None) -> str:
    """Format the speedup of Flash over `value`, in brackets; empty without a Flash value."""
    if flash is None:
        return ""
    times = value / flash if point.phase is Phase.prefill else flash / value
    return f" ({times:.2f}x)"


def _title(point: Point) -> str:
    tokens = f"{point.tokens // 1024}k" if point.tokens % 1024 == 0 else str(point.tokens)
    return f"TTFT {tokens} [s]" if point.phase is Phase.prefill else f"decode {tokens} [tok/s]"


def _described(device: Mapping[str, Any]) -> str:
    return f"{device['device']}: " + ", ".join(
        f"{key} {value}" for key, value in device.items() if key != "device" and value != ""
    )
