"""Figures of layer patterns: the kind of attention by position in the network."""

from collections.abc import Sequence
from itertools import pairwise

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flash.arch import ArchSpec, Attention
from flash.report.data import StudyData
from flash.report.style import KINDS, hover_text, layout


def patterns(data: StudyData) -> go.Figure:
    """Plot the layers of every member of the frontier, the fastest on top."""
    front = data.frontier
    order, depth = list(KINDS), max(trial.spec.num_layers for trial in front)
    figure = go.Figure()
    figure.add_heatmap(
        z=[
            [order.index(kind) for kind in trial.spec.layer_types]
            + [None] * (depth - trial.spec.num_layers)
            for trial in front
        ],
        y=list(range(len(front))),
        text=[[hover_text(trial)] * depth for trial in front],
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        zmin=-0.5,
        zmax=len(order) - 0.5,
        colorscale=[
            [(i + end) / len(order), KINDS[kind][1]]
            for i, kind in enumerate(order)
            for end in (0, 1)
        ],
        showscale=False,
        xgap=2,
        ygap=3,
    )
    used = {kind for trial in front for kind in trial.spec.layer_types}
    for kind in order:
        if kind in used:  # heat maps have no legend
            name, color = KINDS[kind]
            marker = {"symbol": "square", "size": 11, "color": color}
            figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=name)
    layout(figure, "layer, from the input", height=130 + max(4, len(front)) * 22)
    figure.update_xaxes(dtick=1 if depth <= 16 else 4, showgrid=False, zeroline=False)
    return figure.update_yaxes(
        tickvals=list(range(len(front))),
        ticktext=[f"{trial.name}  {trial.loss:.2f}" for trial in front],
        autorange="reversed",
        automargin=True,
        showgrid=False,
        zeroline=False,
    )


def kinds(data: StudyData) -> go.Figure:
    """Plot the share of each kind at each position, on the frontier and among all trials."""
    groups = (
        ("frontier", [trial.spec for trial in data.frontier]),
        ("all trials", [trial.spec for trial in data.trials]),
    )
    places = max(spec.num_layers for _, specs in groups for spec in specs)
    titles = [
        f"{name} ({len(specs)}); adjacent layers differ: {100 * mixed_neighbor_share(specs):.0f} %"
        for name, specs in groups
    ]
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.14
    )
    used = {kind for _, specs in groups for spec in specs for kind in spec.layer_types}
    for row, (_, specs) in enumerate(groups, start=1):
        for kind, shares in kind_shares(specs, places).items():
            if kind in used:
                name, color = KINDS[kind]
                figure.add_bar(
                    x=list(range(places)),
                    y=[100 * share for share in shares],
                    name=name,
                    marker_color=color,
                    legendgroup=name,
                    showlegend=row == 1,
                    row=row,
                    col=1,
                )
    layout(figure)
    figure.update_layout(barmode="stack", bargap=0.1, margin_t=90)
    figure.update_layout(legend_y=1.1)
    figure.update_annotations(font_size=13, x=0, xanchor="left")
    figure.update_yaxes(
        range=[0, 100], tickvals=[0, 50, 100], ticktext=["0 %", "50 %", "100 %"], title=""
    )
    figure.update_xaxes(dtick=1 if places <= 16 else 4)
    return figure.update_xaxes(title=f"layer (all patterns stretched to {places} layers)", row=2)


def kind_shares(specs: Sequence[ArchSpec], places: int) -> dict[Attention, list[float]]:
    """Compute the share of specs with each kind at each position.

    Depths differ, so every pattern is stretched to `places` layers first. The first and the last
    layers of all specs coincide, and every spec counts at every position.
    """
    stretched = [
        [spec.layer_types[(2 * i + 1) * spec.num_layers // (2 * places)] for i in range(places)]
        for spec in specs
    ]
    columns = list(zip(*stretched, strict=True))
    return {kind: [column.count(kind) / len(specs) for column in columns] for kind in KINDS}


def mixed_neighbor_share(specs: Sequence[ArchSpec]) -> float:
    """Compute the share of adjacent layers that are of different kinds, over all specs."""
    pairs = [pair for spec in specs for pair in pairwise(spec.layer_types)]
    return sum(a is not b for a, b in pairs) / max(1, len(pairs))
