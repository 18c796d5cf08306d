"""All figures of one study, shown on the HTML page and in Weights & Biases."""

from collections.abc import Sequence
from itertools import cycle

import plotly.graph_objects as go

from flash.paths import Runs
from flash.report.data import StudyData
from flash.report.outliers import show_most
from flash.report.pattern_figures import kinds, patterns
from flash.report.reading import read_study
from flash.report.search_figures import (
    comparison,
    devices,
    frontier,
    hypervolume,
    parallel_coordinates,
)
from flash.report.style import GRAY, ORANGE, SERIES, latency_name, layout
from flash.report.training_figures import learning_curves, promotion, recovery


def predicted_against_measured(data: StudyData) -> go.Figure:
    """Plot predicted against measured latency of calibration models and exported models."""
    figure = go.Figure()
    objective = data.search.objective
    measured = data.search.latency_points[objective]
    fitted = data.search.latency_fitted[objective]
    figure.add_scatter(
        x=measured,
        y=fitted,
        name="calibration models (left out of their fit)",
        mode="markers",
        marker={"color": GRAY, "size": 9},
    )
    by_device = _exported_points(data)
    for (device, shown), color in zip(by_device.items(), cycle((ORANGE, *SERIES[2:]))):
        on = f" on {device}" if len(by_device) > 1 else ""
        figure.add_scatter(
            x=[value for _, value, _ in shown],
            y=[predicted["mean_ms"] for _, _, predicted in shown],
            error_y={
                "array": [p["high_ms"] - p["mean_ms"] for _, _, p in shown],
                "arrayminus": [p["mean_ms"] - p["low_ms"] for _, _, p in shown],
            },
            text=[name for name, _, _ in shown],
            textposition="bottom right",
            name=f"exported models{on}",
            mode="markers+text",
            marker={"color": color, "size": 11},
        )
    points = [point for shown in by_device.values() for point in shown]
    ends = [*measured, *fitted, *(value for _, value, _ in points)]
    low, high = 0.9 * min(ends, default=0.0), 1.1 * max(ends, default=1.0)
    figure.add_scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        name="equal",
        line={"color": GRAY, "dash": "dot"},
    )
    name = latency_name(data)
    layout(figure, f"measured {name} [ms]", f"predicted {name} [ms]")
    pairs = [
        *((x, y, "calibration model") for x, y in zip(measured, fitted, strict=True)),
        *((x, p["mean_ms"], model) for model, x, p in points),
    ]
    show_most(figure, [("", pairs)])
    return figure


def _exported_points(
    data: StudyData,
) -> dict[str, list[tuple[str, float, dict[str, float]]]]:
    """Return name, measured and predicted headline latency of exported models, by device."""
    objective, first = data.search.objective, data.search.device_name
    names = [first, *(name for name in data.search.devices if name != first)]
    found: dict[str, list[tuple[str, float, dict[str, float]]]] = {name: [] for name in names}
    for model in data.models:
        for name, exported in ({first: model.exported} | model.elsewhere).items():
            predicted = model.predicted if name == first else exported and exported.predicted
            if exported is None or not predicted:
                continue
            latency = exported.measurement.latencies.get(objective)
            if latency is not None and objective in predicted:
                found[name].append((model.name, latency.ms, predicted[objective]))
    return found


def all_figures(data: StudyData) -> dict[str, go.Figure]:
    """Draw every figure whose data exist, by name and in the order of the page."""
    drawn = {
        "frontier": (frontier, True),
        "devices": (devices, bool(data.search.devices) and bool(data.trials)),
        "hypervolume": (hypervolume, True),
        "parallel_coordinates": (parallel_coordinates, bool(data.trials)),
        "patterns": (patterns, bool(data.frontier)),
        "kinds": (kinds, bool(data.frontier)),
        "learning_curves": (
            learning_curves,
            any(trial.curve for trial in [*data.trials, *data.stopped]),
        ),
        "promotion": (promotion, data.promotion is not None),
        "predicted_against_measured": (predicted_against_measured, True),
        "recovery": (recovery, any(model.trained is not None for model in data.models)),
    }
    return {name: draw(data) for name, (draw, there) in drawn.items() if there}


def comparison_figures(studies: Sequence[StudyData]) -> dict[str, go.Figure]:
    """Draw the figures that compare studies; none for a single study."""
    return {"comparison": comparison(studies)} if len(studies) > 1 else {}


def study_figures(runs: Runs, study: str) -> dict[str, go.Figure]:
    """Draw all figures of a study in the `runs` folder, for the W&B run of its search."""
    return all_figures(read_study(runs, study))
