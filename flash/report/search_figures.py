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
    axis_title,
    error_text,
    hover_text,
    layout,
    value_name,
)
from flash.search.devices import key_on, within_limits
from flash.search.objectives import Objective
from flash.search.pareto import non_dominated

_NARROW_AXES = ["depth", "d_ffn", "TTFT [ms]", "weights [MiB]", "loss [nats]", "frontier"]
"""Axes of the parallel coordinates that a narrow screen shows."""


def frontier(data: StudyData) -> go.Figure:
    """Plot the first objective against every other one.

    There are trials, frontier, winners, backbone and reference point.
    """
    keys = data.cost_keys
    figure = make_subplots(rows=1, cols=len(keys), shared_yaxes=True, horizontal_spacing=0.03)
    for column, key in enumerate(keys, start=1):
        _panel(figure, data, key, column)
    layout(figure, y=axis_title(data, data.quality_key))
    panels = []
    for column, key in enumerate(keys, start=1):
        figure.update_xaxes(title=axis_title(data, key), col=column)
        shown = _points([*data.trials, *data.stopped], key, data.quality_key)
        panels.append(("" if column == 1 else str(column), [*shown, _backbone(data, key)]))
    show_most(figure, panels)
    return figure


def _name_places(count: int) -> list[str]:
    """Place names below the frontier, where no points are; the first one would leave the axes."""
    return ["top right", *["bottom left"] * (count - 1)]


def _points(trials: Sequence[TrialPoint], x: str, y: str) -> list[tuple[float, float, str]]:
    """Return two objectives and the hover text of each trial."""
    return [(trial.values[x], trial.values[y], hover_text(trial)) for trial in trials]


def _backbone(data: StudyData, key: str) -> tuple[float, float, str]:
    """Return an objective, the first objective and the hover text of the backbone."""
    values, about = data.backbone_values, data.search.backbone
    lines = [f"backbone {about.name}", str(about.spec), f"loss {values['loss']:.3f}"]
    lines += [error_text(each, error) for each, error in about.errors.items()]
    return values[key], values[data.quality_key], "<br>".join(lines)


def _panel(figure: go.Figure, data: StudyData, key: str, column: int) -> None:
    front = sorted(data.frontier, key=lambda trial: trial.values[key])
    others = [trial for trial in data.trials if not trial.frontier]
    winners = [trial for trial in front if trial.winner]
    # With several costs the frontier is a surface, which steps in one panel would misrepresent.
    steps = "lines+markers" if len(data.cost_keys) == 1 else "markers"
    # Below a panel of two figures of quality, which rise together, there is no room for names.
    named = "markers" if Objective.of_key(key).learned else "markers+text"
    stopped = {"color": GRAY, "size": 7, "symbol": "x-thin", "line": {"width": 1.5, "color": GRAY}}
    for name, trials, mode, marker in (
        ("trials", others, "markers", {"color": GRAY, "size": 8}),
        ("stopped early (predicted loss)", data.stopped, "markers", stopped),
        ("frontier", front, steps, {"color": BLUE, "size": 9}),
        ("winners", winners, named, {"color": ORANGE, "size": 15, "symbol": "star"}),
    ):
        if trials:
            style = {"name": name, "mode": mode, "marker": marker}
            _add_trials(figure, trials, (key, data.quality_key), column, BLUE, style)
    x, y, text = _backbone(data, key)
    figure.add_scatter(
        x=[x],
        y=[y],
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
    worst = reference[data.quality_key]
    figure.add_hline(y=worst, line=dotted, col=column)  # pyright: ignore[reportArgumentType]


def _add_trials(
    figure: go.Figure,
    trials: Sequence[TrialPoint],
    keys: tuple[str, str],
    column: int,
    color: str,
    style: Mapping[str, Any],
) -> None:
    """Add trials to a panel by the keys of its axes, with names where the mode shows text."""
    x, y = keys
    figure.add_scatter(
        x=[trial.values[x] for trial in trials],
        y=[trial.values[y] for trial in trials],
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
    """Plot the first objective against the headline latency on each of several devices.

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
        quality = data.quality_key
        mask = non_dominated([(each.values[quality], each.costs[here]) for each in allowed])
        alone = [trial for trial, keep in zip(allowed, mask, strict=True) if keep]
        for name, trials, mode, marker in (
            ("trials", data.trials, "markers", {"color": GRAY, "size": 8}),
            ("best on this device alone", alone, "lines", {"color": GREEN}),
            ("frontier", data.frontier, "markers", {"color": BLUE, "size": 9}),
            ("winners", data.winners, "markers", {"color": ORANGE, "size": 15, "symbol": "star"}),
        ):
            shown = sorted(trials, key=lambda trial: trial.costs[here])
            style = {"name": name, "mode": mode, "marker": marker}
            _add_trials(figure, shown, (here, quality), column, GREEN, style)
        points = _points(data.trials, here, quality)
        panels.append(("" if column == 1 else str(column), points))
    layout(figure, y=axis_title(data, data.quality_key))
    for column, here in enumerate(keys, start=1):
        figure.update_xaxes(title=axis_title(data, here), col=column)
    show_most(figure, panels)
    return figure


def comparison(studies: Sequence[StudyData]) -> go.Figure:
    """Plot the frontiers of several studies, a panel for each cost that all of them have."""
    first, *others = studies
    keys = [key for key in first.cost_keys if all(key in other.cost_keys for other in others)]
    keys = keys or ["prefill_ms"]
    same = all(study.quality_key == first.quality_key for study in studies)
    quality = first.quality_key if same else Objective.quality.key
    figure = make_subplots(rows=1, cols=len(keys), shared_yaxes=True, horizontal_spacing=0.03)
    panels = []
    for column, key in enumerate(keys, start=1):
        points = []
        for study, color in zip(studies, cycle(SERIES)):
            front = sorted(study.frontier, key=lambda trial: trial.values[key])
            shown = [(x, y, f"{study.name}: {text}") for x, y, text in _points(front, key, quality)]
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
    layout(figure, y=axis_title(first, quality))
    for column, key in enumerate(keys, start=1):
        joint = any(study.search.devices for study in studies)
        title = f"predicted {value_name(key)}" if joint else axis_title(first, key)
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
    shown = dict.fromkeys([data.quality_key, *data.cost_keys])
    for key in (key for key in shown if key != Objective.quality.key):
        name = value_name(key, several=bool(data.search.devices))
        dimensions.append(_axis(name, [trial.values[key] for trial in trials]))
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
