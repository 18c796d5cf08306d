"""Ranges of axes that single outliers do not stretch, with marks for what lies beyond them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from flash.report.style import ORANGE

_FAR = 7.5
"""Distance from the median beyond which a value is far, in median distances: five standard
deviations of a normal distribution."""
_FEW = 5
"""Far values are outliers if they are at most one of so many, and as few values have none."""
_STRETCH = 2.0
"""Factor by which outliers would stretch an axis at least; those that stretch it less are shown."""
_MARGIN = 0.06
"""Free space at both ends of an axis, as a share of its range."""


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest value that are no outliers.

    The distances of equal values do not count, so that many equal values leave room for the others.
    """
    array = np.asarray([value for value in values if math.isfinite(value)], dtype=float)
    if array.size == 0:
        return 0.0, 1.0
    distances = np.abs(array - np.median(array))
    apart = distances[distances > 0]
    near = array[distances <= _FAR * np.median(apart)] if apart.size else array
    few = array.size - near.size <= array.size // _FEW
    shown = near if few and np.ptp(array) >= _STRETCH * np.ptp(near) else array
    return float(shown.min()), float(shown.max())


def show_most(
    figure: go.Figure,
    panels: Sequence[tuple[str, Sequence[tuple[float, float, str]]]],
    *,
    log_y: bool = False,
) -> None:
    """Set the axes of panels side by side so that outliers do not stretch them, and mark these.

    The marks are triangles at the border that point to the outliers. In `layout.meta`, for the
    page, `panels` is the number of panels and `all` are the ranges that show all points.

    Args:
        figure: Figure, whose panels share the y axis.
        panels: For each panel the number of its axes (empty for the first), and its points: x, y
            and hover text.
        log_y: True if the y axis is logarithmic.
    """
    ys = [y for _, points in panels for _, y, _ in points]
    y_all, y_most = _ranges([math.log10(y) for y in ys] if log_y else ys)
    everything: dict[str, Any] = {}
    most: dict[str, Any] = {}
    outside = 0
    for axis, points in panels:
        x_all, x_most = _ranges([x for x, _, _ in points])
        everything |= {f"xaxis{axis}.range": x_all, f"yaxis{axis}.range": y_all}
        most |= {f"xaxis{axis}.range": x_most, f"yaxis{axis}.range": y_most}
        outside += _mark(figure, axis, points, x_most, y_most, log_y)
    meta: dict[str, Any] = {"panels": len(panels)}
    if outside:
        for key, ends in most.items():
            figure.layout[key] = ends
        meta["all"] = everything
    figure.update_layout(meta=meta)


def _ranges(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the range of an axis for all values, and the one for those that are no outliers."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    return _widened(min(finite), max(finite)), _widened(*spread(finite))


def _widened(low: float, high: float) -> list[float]:
    margin = _MARGIN * (high - low) or 0.1 * abs(high) or 1.0
    return [low - margin, high + margin]


def _mark(
    figure: go.Figure,
    axis: str,
    points: Sequence[tuple[float, float, str]],
    x_range: Sequence[float],
    y_range: Sequence[float],
    log_y: bool,
) -> int:
    """Mark the points beyond the ranges at the border; return their number."""
    marks = []
    for x, y, text in points:
        scaled = math.log10(y) if log_y else y
        inside_x, inside_y = _clip(x, x_range), _clip(scaled, y_range)
        if (inside_x, inside_y) == (x, scaled):
            continue
        if inside_y != scaled:
            symbol = "triangle-up" if scaled > inside_y else "triangle-down"
        else:
            symbol = "triangle-right" if x > inside_x else "triangle-left"
        marks.append((inside_x, 10**inside_y if log_y else inside_y, text, symbol))
    if marks:
        x, y, texts, symbols = zip(*marks, strict=True)
        figure.add_scatter(
            x=x,
            y=y,
            text=texts,
            hovertemplate="beyond the axes: %{text}<extra></extra>",
            name="beyond the axes",
            mode="markers",
            marker={"symbol": symbols, "size": 12, "color": ORANGE},
            legendgroup="beyond the axes",
            showlegend=not any(trace.name == "beyond the axes" for trace in figure.data),
            meta="beyond",
            cliponaxis=False,
            xaxis=f"x{axis}",
            yaxis=f"y{axis}",
        )
    return len(marks)


def _clip(value: float, ends: Sequence[float]) -> float:
    return min(max(value, ends[0]), ends[1])
