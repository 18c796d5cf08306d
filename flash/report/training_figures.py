"""Figures of training: of the trials, of those trained longer, of the winners."""

from collections.abc import Sequence

import plotly.graph_objects as go

from flash.report.data import ReportData, TrialPoint
from flash.report.style import BLUE, GREEN, GREY, ORANGE, about, label, layout


def learning_curves(data: ReportData) -> go.Figure:
    """Training loss along every trial; the end of one that was stopped is marked."""
    groups = (
        ("trials", GREY, 1, [trial for trial in data.trials if trial.name is None]),
        ("stopped early", ORANGE, 1, data.stopped),
        ("frontier", BLUE, 2, data.frontier),
    )
    figure = go.Figure()
    for name, colour, width, trials in groups:
        kept = [trial for trial in trials if trial.curve]
        if not kept:
            continue
        x, y, text = _one_line(kept)
        figure.add_scatter(
            x=x,
            y=y,
            text=text,
            hovertemplate="%{text}<br>%{x:,} tokens: training loss %{y:.3f}<extra></extra>",
            name=name,
            mode="lines",
            line={"color": colour, "width": width},
        )
    ends = [(trial, *trial.curve[-1]) for trial in data.stopped if trial.curve]
    if ends:
        figure.add_scatter(
            x=[tokens for _, tokens, _ in ends],
            y=[loss for _, _, loss in ends],
            text=[f"{about(trial)}<br>{trial.reason}" for trial, _, _ in ends],
            hovertemplate="%{text}<extra></extra>",
            name="where it was stopped",
            mode="markers",
            marker={"color": ORANGE, "size": 8, "symbol": "x"},
        )
    layout(figure, "tokens", "training loss [nats/token]")
    # The first steps after pruning lie far above the rest, where the lines part.
    return figure.update_yaxes(type="log")


def _one_line(
    trials: Sequence[TrialPoint],
) -> tuple[list[float | None], list[float | None], list[str]]:
    """All curves as one trace with gaps: hundreds of traces would be slow and fill the legend."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for trial in trials:
        x += [*(tokens for tokens, _ in trial.curve), None]
        y += [*(loss for _, loss in trial.curve), None]
        text += [about(trial)] * (len(trial.curve) + 1)
    return x, y, text


def promotion(data: ReportData) -> go.Figure:
    """Losses of the promoted trials after the short and the longer training: lines that cross."""
    promoted = data.promotion
    assert promoted is not None
    # Each side has its own scale: the longer training brings all losses close together.
    ends = (
        _places([trial.loss for trial, _ in promoted.losses]),
        _places([loss for _, loss in promoted.losses]),
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
            text=about(trial),
            hovertemplate=f"%{{text}}, then {loss:.3f}<extra></extra>",
            showlegend=False,
        )
    layout(figure)
    names = [f"{label(trial)}  {trial.loss:.3f}" for trial, _ in promoted.losses]
    _write_beside(figure, 0, ends[0], names)
    _write_beside(figure, 1, ends[1], [f"{loss:.3f}" for _, loss in promoted.losses])
    tau = promoted.kendall_tau
    held = "too few to rank" if tau is None else f"Kendall tau {tau:.2f}"
    figure.update_layout(
        title={
            "text": f"{held}, {promoted.swapped} of {promoted.pairs} pairs swapped",
            "font_size": 14,
            "x": 0.02,
        }
    )
    before = data.search["settings"]["recipe"]["tokens"]
    figure.update_xaxes(
        range=[-0.7, 1.3],
        tickvals=[0, 1],
        ticktext=[f"after {before:,} tokens", f"after {promoted.tokens:,}"],
        showgrid=False,
        zeroline=False,
    )
    return figure.update_yaxes(visible=False)


def _places(values: Sequence[float]) -> list[float]:
    """Where each value lies between the lowest, 0, and the highest, 1."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]


_LINE = 0.065
"""Height of a line of text in the plot, as a share of the range of places."""


def _write_beside(figure: go.Figure, x: int, places: Sequence[float], texts: Sequence[str]) -> None:
    """Labels left of x = 0 and right of x = 1, each as near to its place as the others allow."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    heights: list[float] = []
    for i in order:
        heights.append(max(places[i], heights[-1] + _LINE) if heights else places[i])
    ceiling = max(1.0, _LINE * (len(order) - 1))
    for k in reversed(range(len(order))):
        heights[k] = min(heights[k], ceiling)
        ceiling = heights[k] - _LINE
    for i, height in zip(order, heights, strict=True):
        figure.add_annotation(
            x=x,
            y=height,
            text=texts[i],
            showarrow=False,
            xanchor="right" if x == 0 else "left",
            xshift=-10 if x == 0 else 10,
        )


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
    return layout(figure, "", "held-out loss [nats/token]")
