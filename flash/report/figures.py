"""All figures of one study, made once and shown both on the page and in Weights & Biases."""

import plotly.graph_objects as go

from flash.paths import Runs
from flash.report.data import ReportData, read
from flash.report.pattern_figures import kinds, patterns
from flash.report.search_figures import frontier, hypervolume, parallel_coordinates
from flash.report.style import GREY, ORANGE, latency_name, layout
from flash.report.training_figures import learning_curves, promotion, recovery


def predicted_against_measured(data: ReportData) -> go.Figure:
    """Stage 1's calibration models, and winners with the interval that was promised for them."""
    figure = go.Figure()
    objective = data.search["objective"]
    measured = data.search["latency_points"][objective]
    fitted = data.search["latency_fitted"][objective]
    figure.add_scatter(
        x=measured,
        y=fitted,
        name="calibration models (left out of their own fit)",
        mode="markers",
        marker={"color": GREY, "size": 9},
    )
    points = [
        (model, model.exported.measurement.latencies[objective].ms, model.predicted[objective])
        for model in data.models
        if model.exported is not None and objective in model.exported.measurement.latencies
    ]
    figure.add_scatter(
        x=[value for _, value, _ in points],
        y=[predicted["mean_ms"] for _, _, predicted in points],
        error_y={
            "array": [p["high_ms"] - p["mean_ms"] for _, _, p in points],
            "arrayminus": [p["mean_ms"] - p["low_ms"] for _, _, p in points],
        },
        text=[model.name for model, _, _ in points],
        textposition="bottom right",
        name="exported models, predicted before they were measured",
        mode="markers+text",
        marker={"color": ORANGE, "size": 11},
    )
    ends = [*measured, *fitted, *(value for _, value, _ in points)]
    low, high = 0.9 * min(ends), 1.1 * max(ends)
    figure.add_scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        name="equal",
        line={"color": GREY, "dash": "dot"},
    )
    name = latency_name(data)
    return layout(figure, f"measured {name} [ms]", f"predicted {name} [ms]")


def all_figures(data: ReportData) -> dict[str, go.Figure]:
    """Every figure by name, in the order of the page; each only where there is what it shows."""
    drawn = {
        "frontier": (frontier, True),
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


def study_figures(runs: Runs, study: str) -> dict[str, go.Figure]:
    """All figures of a study that is in the `runs` folder, for the search's own W&B run."""
    return all_figures(read(runs, study))
