"""Figures of training: learning curves, longer training of the best trials, recovery."""

from collections.abc import Sequence

import plotly.graph_objects as go

from flash.report.data import StudyData, TrialPoint
from flash.report.outliers import show_most, spread
from flash.report.style import BLUE, GRAY, GREEN, ORANGE, hover_text, layout


def learning_curves(data: StudyData) -> go.Figure:
    """Plot the training loss along every trial, and mark the ends of stopped trials."""
    groups = (
        ("trials", GRAY, 1, [trial for trial in data.trials if not trial.frontier]),
        ("stopped early", ORANGE, 1, data.stopped),
        ("frontier", BLUE, 2, data.frontier),
    )
    figure = go.Figure()
    for name, color, width, trials in groups:
        kept = [trial for trial in trials if trial.curve]
        if not kept:
            continue
        x, y, text = _joined_curves(kept)
        figure.add_scatter(
            x=x,
            y=y,
            text=text,
            hovertemplate="%{text}<br>%{x:,} tokens: training loss %{y:.3f}<extra></extra>",
            name=name,
            mode="lines",
            line={"color": color, "width": width},
        )
    ends = [(trial, *trial.curve[-1]) for trial in data.stopped if trial.curve]
    if ends:
        figure.add_scatter(
            x=[tokens for _, tokens, _ in ends],
            y=[loss for _, _, loss in ends],
            text=[f"{hover_text(trial)}<br>{trial.reason}" for trial, _, _ in ends],
            hovertemplate="%{text}<extra></extra>",
            name="stopping point",
            mode="markers",
            marker={"color": ORANGE, "size": 8, "symbol": "x"},
        )
    layout(figure, "tokens", "training loss [nats/token]")
    # A log scale: the first steps after pruning lie far above the range of interest.
    figure.update_yaxes(type="log")
    curves = [
        (tokens, loss, hover_text(trial))
        for trial in [*data.trials, *data.stopped]
        for tokens, loss in trial.curve
        if loss > 0
    ]
    show_most(figure, [("", curves)], log_y=True)
    return figure


def _joined_curves(
    trials: Sequence[TrialPoint],
) -> tuple[list[float | None], list[float | None], list[str]]:
    """Join all curves into one trace with gaps, since hundreds of traces would be slow."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for trial in trials:
        x += [*(tokens for tokens, _ in trial.curve), None]
        y += [*(loss for _, loss in trial.curve), None]
        text += [trial.name] * (len(trial.curve) + 1)
    return x, y, text


def promotion(data: StudyData) -> go.Figure:
    """Plot the losses of promoted trials after the short and the longer training."""
    promoted = data.promotion
    assert promoted is not None
    # Each side has its own scale, since the longer training brings all losses close together.
    ends = (
        _normalize([trial.loss for trial, _ in promoted.losses]),
        _normalize([loss for _, loss in promoted.losses]),
    )
    figure = go.Figure()
    for (trial, loss), places in zip(promoted.losses, zip(*ends, strict=True), strict=True):
        turned = any(
            (trial.loss - other.loss) * (loss - other_loss) < 0
            for other, other_loss in promoted.losses
        )
        figure.add_scatter(
            x=[0, 1],
            y=places,
            mode="lines+markers",
            line={"color": ORANGE if turned else BLUE},
            text=hover_text(trial),
            hovertemplate=f"%{{text}}, then {loss:.3f}<extra></extra>",
            showlegend=False,
        )
    layout(figure)
    names = [f"{trial.name}  {trial.loss:.3f}" for trial, _ in promoted.losses]
    _annotate(figure, 0, ends[0], names)
    _annotate(figure, 1, ends[1], [f"{loss:.3f}" for _, loss in promoted.losses])
    tau = promoted.kendall_tau
    held = "too few to rank" if tau is None else f"Kendall tau {tau:.2f}"
    figure.update_layout(
        title={
            "text": f"{held}, {promoted.swapped} of {promoted.pairs} pairs swapped",
            "font_size": 14,
            "x": 0.02,
        }
    )
    before = data.search.settings.recipe.tokens
    figure.update_xaxes(
        range=[-0.7, 1.3],
        tickvals=[0, 1],
        ticktext=[f"after {before:,} tokens", f"after {promoted.tokens:,}"],
        showgrid=False,
        zeroline=False,
    )
    return figure.update_yaxes(visible=False)


def _normalize(values: Sequence[float]) -> list[float]:
    """Scale values linearly so that the lowest is 0 and the highest 1; outliers are at the ends."""
    low, high = spread(values)
    scaled = [(value - low) / (high - low) if high > low else 0.5 for value in values]
    return [min(max(value, 0.0), 1.0) for value in scaled]


_LINE_HEIGHT = 0.065
"""Height of a line of text in the plot, as a share of the y range 0..1."""


def _annotate(figure: go.Figure, x: int, places: Sequence[float], texts: Sequence[str]) -> None:
    """Add labels left of x = 0 or right of x = 1, near their places and without overlap."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    heights: list[float] = []
    for i in order:
        heights.append(max(places[i], heights[-1] + _LINE_HEIGHT) if heights else places[i])
    ceiling = max(1.0, _LINE_HEIGHT * (len(order) - 1))
    for k in reversed(range(len(order))):
        heights[k] = min(heights[k], ceiling)
        ceiling = heights[k] - _LINE_HEIGHT
    for i, height in zip(order, heights, strict=True):
        figure.add_annotation(
            x=x,
            y=height,
            text=texts[i],
            showarrow=False,
            xanchor="right" if x == 0 else "left",
            xshift=-10 if x == 0 else 10,
        )


def recovery(data: StudyData) -> go.Figure:
    """Plot the held-out loss of each winner: pruned, after its trial, after final training."""
    winners = [model for model in data.models[1:] if model.trained is not None]
    by_name = {trial.name: trial for trial in [*data.trials, *data.stopped]}
    figure = go.Figure()
    series = (
        ("pruned", GRAY, [m.trained.before.loss for m in winners if m.trained]),
        ("after the search trial", BLUE, [by_name[m.name].loss for m in winners]),
        ("after final training", ORANGE, [m.trained.after.loss for m in winners if m.trained]),
    )
    for name, color, values in series:
        figure.add_bar(x=[m.name for m in winners], y=values, name=name, marker_color=color)
    assert data.backbone.backbone_quality is not None
    figure.add_scatter(
        x=[m.name for m in winners],
        y=[data.backbone.backbone_quality["loss"]] * len(winners),
        name="backbone",
        mode="lines+markers",
        line={"dash": "dot", "color": GREEN},
        marker={"symbol": "diamond", "size": 9},
    )
    return layout(figure, "", "held-out loss [nats/token]")
