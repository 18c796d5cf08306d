"""Figures of one study, made once and shown both on the page and in Weights & Biases."""

import plotly.graph_objects as go

from flash.device import Phase, Point
from flash.report.data import ReportData, TrialPoint

INK, GREY, BLUE, ORANGE, GREEN = "#1f2933", "#9aa5b1", "#2f6fde", "#e8743b", "#2e9e6b"


def _layout(figure: go.Figure, x: str, y: str) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        margin={"l": 60, "r": 20, "t": 70, "b": 50},
        height=420,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis_title=x,
        yaxis_title=y,
    )
    return figure


def _hover(trial: TrialPoint) -> str:
    return (
        f"{trial.name or f'trial {trial.number}'}<br>{trial.spec}<br>{trial.parameters / 1e6:.2f}M"
    )


def _objective(data: ReportData) -> str:
    point = Point.parse(data.search["objective"])
    name = "TTFT" if point.phase is Phase.prefill else "decode step"
    return f"{name} at {point.tokens} tokens"


def frontier(data: ReportData) -> go.Figure:
    """All trials, the frontier, the winners, the backbone and the reference point."""
    front = [trial for trial in data.trials if trial.name is not None]
    front.sort(key=lambda trial: trial.latency_ms)
    others = [trial for trial in data.trials if trial.name is None]
    winners = [trial for trial in front if trial.winner]
    figure = go.Figure()
    for name, trials, mode, marker in (
        ("trials", others, "markers", {"color": GREY, "size": 8}),
        ("frontier", front, "lines+markers", {"color": BLUE, "size": 9}),
        ("winners", winners, "markers", {"color": ORANGE, "size": 15, "symbol": "star"}),
    ):
        figure.add_scatter(
            x=[trial.latency_ms for trial in trials],
            y=[trial.loss for trial in trials],
            text=[_hover(trial) for trial in trials],
            hovertemplate="%{text}<br>%{x:.1f} ms, loss %{y:.3f}<extra></extra>",
            name=name,
            mode=mode,
            marker=marker,
            line={"shape": "hv", "color": BLUE},
        )
    objective = data.search["objective"]
    assert data.backbone.backbone_quality is not None
    figure.add_scatter(
        x=[data.backbone.predicted[objective]["mean_ms"]],
        y=[data.backbone.backbone_quality["loss"]],
        name="backbone",
        mode="markers",
        marker={"color": GREEN, "size": 13, "symbol": "diamond"},
    )
    reference = data.search["reference"]
    if reference["latency_ms"] is not None:
        figure.add_vline(x=reference["latency_ms"], line={"dash": "dot", "color": GREY})
    figure.add_hline(y=reference["loss"], line={"dash": "dot", "color": GREY})
    return _layout(
        figure,
        f"predicted {_objective(data)} [ms]",
        "held-out loss after the short training [nats/token]",
    )


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
    name = _objective(data)
    return _layout(figure, f"measured {name} [ms]", f"predicted {name} [ms]")


def hypervolume(data: ReportData) -> go.Figure:
    """Hypervolume after each finished trial."""
    values = data.search["hypervolume"]
    figure = go.Figure()
    figure.add_scatter(
        x=list(range(1, len(values) + 1)),
        y=values,
        mode="lines",
        line={"shape": "hv", "color": BLUE},
        name="hypervolume",
    )
    startup = data.search["settings"]["search"]["startup_trials"]
    figure.add_vline(
        x=startup + 0.5,
        line={"dash": "dot", "color": GREY},
        annotation_text="model-based from here",
    )
    names = " x ".join(data.search["objectives"])
    return _layout(figure, "finished trials", f"hypervolume [{names}]")


def recovery(data: ReportData) -> go.Figure:
    """Held-out loss of each winner: just pruned, after the search's training, after the last."""
    winners = [model for model in data.models[1:] if model.trained is not None]
    by_name = {trial.name: trial for trial in data.trials if trial.name is not None}
    figure = go.Figure()
    series = (
        ("pruned", GREY, [m.trained.before.loss for m in winners if m.trained]),
        ("after the search's training", BLUE, [by_name[m.name].loss for m in winners]),
        ("after final training", ORANGE, [m.trained.after.loss for m in winners if m.trained]),
    )
    for name, colour, values in series:
        figure.add_bar(x=[m.name for m in winners], y=values, name=name, marker_color=colour)
    assert data.backbone.backbone_quality is not None
    figure.add_hline(
        y=data.backbone.backbone_quality["loss"],
        line={"dash": "dot", "color": GREEN},
        annotation_text="backbone",
    )
    return _layout(figure, "", "held-out loss [nats/token]")


def all_figures(data: ReportData) -> dict[str, go.Figure]:
    """Every figure by name; those that need trained winners only once there are some."""
    figures = {
        "frontier": frontier(data),
        "predicted_against_measured": predicted_against_measured(data),
        "hypervolume": hypervolume(data),
    }
    if any(model.trained is not None for model in data.models):
        figures["recovery"] = recovery(data)
    return figures
