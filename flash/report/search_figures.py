"""Figures of the search: frontier, hypervolume and all trials."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flash.arch import Attention
from flash.device.workload import Point
from flash.report.data import StudyData, TrialPoint
from flash.report.outliers import show_most, spread
from flash.report.style import (
    BEST_TO_WORST,
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    SERIES,
    cost_axis,
    cost_name,
    hover_text,
    layout,
)
from flash.search.devices import key_on, within_limits
from flash.search.objectives import Objective
from flash.search.pareto import non_dominated

_NARROW_AXES = ["depth", "d_ffn", "TTFT [ms]", "weights [MiB]", "loss [nats]", "frontier"]
"""Axes of the parallel coordinates that a narrow screen shows."""


def frontier(data: StudyData) -> go.Figure:
    """Plot loss against every cost: trials, frontier, winners, backbone and reference point."""
    keys = data.cost_keys
    figure = make_subplots(rows=1, cols=len(keys), shared_yaxes=True, horizontal_spacing=0.03)
    for column, key in enumerate(keys, start=1):
        _panel(figure, data, key, column)
    layout(figure, y="held-out loss [nats/token]")
    panels = []
    for column, key in enumerate(keys, start=1):
        figure.update_xaxes(title=cost_axis(data, key), col=column)
        shown = [(t.costs[key], t.loss, hover_text(t)) for t in [*data.trials, *data.stopped]]
        panels.append(("" if column == 1 else str(column), [*shown, _backbone(data, key)]))
    show_most(figure, panels)
    return figure


def _name_places(count: int) -> list[str]:
    """Place names below the frontier, where no points are; the first one would leave the axes."""
    return ["top right", *["bottom left"] * (count - 1)]


def _backbone(data: StudyData, key: str) -> tuple[float, float, str]:
    """Return cost, loss and hover text of the backbone."""
    assert data.backbone.backbone_quality is not None
    cost, loss = data.search.backbone.costs[key], data.backbone.backbone_quality["loss"]
    return cost, loss, f"backbone {data.backbone.name}<br>{data.backbone.spec}<br>loss {loss:.3f}"


def _panel(figure: go.Figure, data: StudyData, key: str, column: int) -> None:
    front = sorted(data.frontier, key=lambda trial: trial.costs[key])
    others = [trial for trial in data.trials if not trial.frontier]
    winners = [trial for trial in front if trial.winner]
    # With several costs the frontier is a surface, which steps in one panel would misrepresent.
    steps = "lines+markers" if len(data.cost_keys) == 1 else "markers"
    stopped = {"color": GRAY, "size": 7, "symbol": "x-thin", "line": {"width": 1.5, "color": GRAY}}
    for name, trials, mode, marker in (
        ("trials", others, "markers", {"color": GRAY, "size": 8}),
        ("stopped early (predicted loss)", data.stopped, "markers", stopped),
        ("frontier", front, steps, {"color": BLUE, "size": 9}),
        ("winners", winners, "markers+text", {"color": ORANGE, "size": 15, "symbol": "star"}),
    ):
        if trials:
            style = {"name": name, "mode": mode, "marker": marker}
            _add_trials(figure, trials, key, column, BLUE, style)
    cost, loss, text = _backbone(data, key)
    figure.add_scatter(
        x=[cost],
        y=[loss],
        text=[text],
        hovertemplate="%{text}<extra></extra>",
        name="backbone",
        mode="markers",
        marker={"color": GREEN, "size": 13, "symbol": "diamond"},
        legendgroup="backbone",
        showlegend=column == 1,
        row=1,
        col=column,
    )
    reference, dotted = data.search.reference, {"dash": "dot", "color": GRAY}
    # plotly annotates columns by their default, "all".
    if key in reference:
        figure.add_vline(x=reference[key], line=dotted, col=column)  # pyright: ignore[reportArgumentType]
    figure.add_hline(y=reference["loss"], line=dotted, col=column)  # pyright: ignore[reportArgumentType]


def _add_trials(
    figure: go.Figure,
    trials: Sequence[TrialPoint],
    key: str,
    column: int,
    color: str,
    style: Mapping[str, Any],
) -> None:
    """Add trials to the panel of a cost, with their names where the mode shows text."""
    figure.add_scatter(
        x=[trial.costs[key] for trial in trials],
        y=[trial.loss for trial in trials],
        text=[trial.name for trial in trials],
        textposition=_name_places(len(trials)) if trials else None,
        hovertext=[hover_text(trial) for trial in trials],
        hovertemplate="%{hovertext}<extra></extra>",
        line={"shape": "hv", "color": color},
        legendgroup=style["name"],
        showlegend=column == 1,
        row=1,
        col=column,
        **style,
    )


def devices(data: StudyData) -> go.Figure:
    """Plot loss against the headline latency on each of several devices.

    A line joins the candidates that are best on that device alone.
    """
    names = [*data.search.devices]
    key = f"{Point.parse(data.search.objective).phase.value}_ms"
    keys = [key_on(key, name) for name in names]
    figure = make_subplots(rows=1, cols=len(keys), shared_yaxes=True, horizontal_spacing=0.03)
    panels = []
    for column, here in enumerate(keys, start=1):
        device, limits = here.partition("@")[2], data.search.limits
        allowed = [trial for trial in data.trials if within_limits(trial.costs, limits, device)]
        mask = non_dominated([(trial.loss, trial.costs[here]) for trial in allowed])
        alone = [trial for trial, keep in zip(allowed, mask, strict=True) if keep]
        for name, trials, mode, marker in (
            ("trials", data.trials, "markers", {"color": GRAY, "size": 8}),
            ("best on this device alone", alone, "lines", {"color": GREEN}),
            ("frontier", data.frontier, "markers", {"color": BLUE, "size": 9}),
            ("winners", data.winners, "markers", {"color": ORANGE, "size": 15, "symbol": "star"}),
        ):
            shown = sorted(trials, key=lambda trial: trial.costs[here])
            style = {"name": name, "mode": mode, "marker": marker}
            _add_trials(figure, shown, here, column, GREEN, style)
        points = [(trial.costs[here], trial.loss, hover_text(trial)) for trial in data.trials]
        panels.append(("" if column == 1 else str(column), points))
    layout(figure, y="held-out loss [nats/token]")
    for column, here in enumerate(keys, start=1):
        figure.update_xaxes(title=cost_axis(data, here), col=column)
    show_most(figure, panels)
    return figure


def comparison(studies: Sequence[StudyData]) -> go.Figure:
    """Plot the frontiers of several studies, a panel for each cost that all of them have."""
    first, *others = studies
    keys = [key for key in first.cost_keys if all(key in other.cost_keys for other in others)]
    keys = keys or ["prefill_ms"]
    figure = make_subplots(rows=1, cols=len(keys), shared_yaxes=True, horizontal_spacing=0.03)
    panels = []
    for column, key in enumerate(keys, start=1):
        points = []
        for study, color in zip(studies, cycle(SERIES)):
            front = sorted(study.frontier, key=lambda trial: trial.costs[key])
            shown = [(t.costs[key], t.loss, f"{study.name}: {hover_text(t)}") for t in front]
            points += shown
            figure.add_scatter(
                x=[x for x, _, _ in shown],
                y=[y for _, y, _ in shown],
                text=[text for _, _, text in shown],
                hovertemplate="%{text}<extra></extra>",
                name=f"{study.name} on {study.device_names}",
                mode="lines+markers" if len(study.cost_keys) == 1 else "markers",
                marker={"color": color, "size": 9},
                line={"shape": "hv", "color": color},
                legendgroup=study.name,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        panels.append(("" if column == 1 else str(column), points))
    layout(figure, y="held-out loss [nats/token]")
    for column, key in enumerate(keys, start=1):
        joint = any(study.search.devices for study in studies)
        title = f"predicted {cost_name(key)}" if joint else cost_axis(first, key)
        figure.update_xaxes(title=title, col=column)
    show_most(figure, panels)
    return figure


def hypervolume(data: StudyData) -> go.Figure:
    """Plot the hypervolume after each finished trial."""
    values = data.search.hypervolume
    figure = go.Figure()
    figure.add_scatter(
        x=list(range(1, len(values) + 1)),
        y=values,
        mode="lines",
        line={"shape": "hv", "color": BLUE},
        name="hypervolume",
    )
    startup = data.search.settings.search.startup_trials
    if startup < len(values):
        figure.add_vline(
            x=startup + 0.5,
            line={"dash": "dot", "color": GRAY},
            annotation_text="model-based from here",
            annotation_position="bottom right",
        )
    units = " x ".join(Objective.of_key(key).unit for key in data.search.objectives)
    layout(figure, "finished trials", f"hypervolume [{units}]")
    return figure.update_layout(margin_t=20)  # it has no legend


def parallel_coordinates(data: StudyData) -> go.Figure:
    """Plot every trial as a line over its sizes, layer counts, costs and loss.

    The last axis starts with its upper end selected, so the frontier is colored and the rest is
    gray.
    """
    trials = data.trials
    losses = [trial.loss for trial in trials]
    dimensions = [
        dimension
        for name, values in _spec_columns(trials)
        if (dimension := _integer_axis(name, values))
    ]
    for key in data.cost_keys:
        several = bool(data.search.devices)
        dimensions.append(_axis(cost_name(key, several), [trial.costs[key] for trial in trials]))
    dimensions.append(_axis("loss [nats]", losses))
    dimensions.append({
        "label": "frontier",
        "values": [int(trial.frontier) for trial in trials],
        "range": [0, 1],
        "tickvals": [0, 1],
        "ticktext": ["no", "yes"],
        "constraintrange": [0.9, 1],
    })
    figure = go.Figure(
        go.Parcoords(
            dimensions=dimensions,
            line={
                "color": losses,
                "colorscale": list(zip((0.0, 0.5, 1.0), BEST_TO_WORST, strict=True)),
                "cmin": min(losses),
                # A few outliers with high losses would otherwise take up most of the color scale.
                "cmax": float(np.quantile(losses, 0.9)),
                "colorbar": {"title": "loss", "thickness": 12},
            },
            unselected={"line": {"color": GRAY, "opacity": 0.25}},
        )
    )
    layout(figure, height=440)
    meta: dict[str, Any] = {"narrow": _NARROW_AXES}
    if any("range" in dimension for dimension in dimensions[:-1]):
        meta["all"] = {}
    figure.update_layout(meta=meta)
    return figure.update_layout(margin={"l": 50, "r": 20, "t": 60, "b": 30})


def _axis(name: str, values: list[float]) -> dict[str, Any]:
    """Build an axis of real numbers, which outliers do not stretch."""
    dimension: dict[str, Any] = {"label": name, "values": values}
    low, high = spread(values)
    if (low, high) != (min(values), max(values)):
        dimension["range"] = [low, high]
    return dimension


def _spec_columns(trials: Sequence[TrialPoint]) -> list[tuple[str, list[int]]]:
    """Tabulate the properties of architectures that the search varies, by axis name."""
    specs = [trial.spec for trial in trials]
    kinds = (
        ("full", Attention.full_attention),
        ("sliding", Attention.sliding_attention),
        ("skipped", Attention.skip_attention),
    )
    return [
        ("depth", [spec.num_layers for spec in specs]),
        ("d_model", [spec.model_dim for spec in specs]),
        ("d_ffn", [round(spec.mean_ffn_dim) for spec in specs]),
        ("heads", [spec.num_heads for spec in specs]),
        ("key heads", [spec.num_kv_heads for spec in specs]),
        ("tokens", [spec.vocab_size for spec in specs]),
        *((name, [spec.layer_types.count(kind) for spec in specs]) for name, kind in kinds),
        ("longest run", [spec.longest_efficient_run for spec in specs]),
    ]


def _integer_axis(name: str, values: list[int]) -> dict[str, Any] | None:
    """Build an axis of integers; None if all trials have the same value."""
    different = sorted(set(values))
    if len(different) == 1:
        return None
    dimension: dict[str, Any] = {"label": name, "values": values}
    if len(different) <= 12:  # more ticks would overlap
        dimension["tickvals"] = different
    return dimension
