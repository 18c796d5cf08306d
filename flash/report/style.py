"""Common style of all figures: layout, colors and names."""

import re
from collections.abc import Mapping

import plotly.graph_objects as go

from flash.arch import Attention
from flash.device.workload import Phase, Point
from flash.report.data import StudyData, TrialPoint
from flash.search.objectives import Objective
from flash.search.quality import TaskError

INK, GRAY, BLUE, ORANGE, GREEN = "#1f2933", "#7b8794", "#2f6fde", "#d9601f", "#23855a"
SERIES = (BLUE, ORANGE, GREEN, "#8a5bd0", "#b8860b", "#c2417a")
"""Colors of several studies."""
KINDS = {
    Attention.full_attention: ("full attention", BLUE),
    Attention.sliding_attention: ("sliding", "#8fd0c4"),
    Attention.skip_attention: ("skipped", "#e4e7eb"),
}
"""Name and color of each kind of layer, as on the page (templates/report.css)."""
BEST_TO_WORST = ("#123f8c", "#8a6fc0", "#f0a35e")
"""Colors of low, middle and high losses."""
DARK = {
    INK: "#e6eaef",
    GRAY: "#8b97a5",
    BLUE: "#6ea0ff",
    ORANGE: "#f0915e",
    GREEN: "#4cc38a",
    "#8a5bd0": "#b794f6",
    "#b8860b": "#e0b84c",
    "#c2417a": "#f07aa8",
    "#8fd0c4": "#3f8f83",
    "#e4e7eb": "#3a4552",
    "#123f8c": "#7aa7ff",
    "#8a6fc0": "#c3a6f5",
    "#f0a35e": "#ffb870",
}
"""Colors that the page uses on a dark background, by the color on a light one."""
_COSTS = {
    "prefill_ms": "TTFT",
    "decode_ms": "decode step",
    "memory_mib": "memory",
    "size_mib": "weights",
}


def layout(figure: go.Figure, x: str = "", y: str = "", height: int = 420) -> go.Figure:
    """Apply the common layout and the axis titles to a figure."""
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        margin={"l": 60, "r": 20, "t": 70, "b": 50},
        height=height,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis_title=x,
        yaxis_title=y,
    )
    return figure


def value_name(key: str, several: bool = False) -> str:
    """Return the short name of an objective with its unit.

    Args:
        key: Key of the objective.
        several: Whether there are several devices, so that a cost without one is of all.
    """
    objective = Objective.of_key(key)
    if objective.learned:
        name = "loss" if objective.task is None else f"{objective.task} wrong"
        return f"{name} [{objective.unit}]"
    quantity, at, device = key.partition("@")
    on = f" on {device}" if at else ", all devices" if several else ""
    return f"{_COSTS[quantity]}{on} [{objective.unit}]"


def axis_title(data: StudyData, key: str) -> str:
    """Return the axis title of an objective, with workload and unit."""
    workload = data.search.workload
    quantity, at, device = key.partition("@")
    on = f" on {device}" if at else ", all devices" if data.search.devices else ""
    match quantity:
        case "loss":
            return "held-out loss [nats/token]"
        case "prefill_ms":
            return f"predicted TTFT at {workload.prompts[0]} tokens{on} [ms]"
        case "decode_ms":
            return f"predicted decode step at {workload.contexts[0]} tokens{on} [ms]"
        case _ if Objective.of_key(key).learned:
            return f"wrong answers to {Objective.of_key(key).task} [%]"
        case _:
            return value_name(key, bool(data.search.devices))


def latency_name(data: StudyData) -> str:
    """Return the name of the headline latency."""
    point = Point.parse(data.search.objective)
    name = "TTFT" if point.phase is Phase.prefill else "decode step"
    return f"{name} at {point.tokens} tokens"


def cost_text(costs: Mapping[str, float]) -> list[str]:
    """Return known costs as text, such as `TTFT 12.3 ms`."""
    several = [key for key in costs if re.match(r"(prefill|decode)_ms@", key)]
    shown = [*(key for key in _COSTS if key in costs), *several]
    names = [value_name(key, bool(several)).partition(" [")[0] for key in shown]
    return [
        f"{name} {costs[key]:.4g} {Objective.of_key(key).unit}"
        for key, name in zip(shown, names, strict=True)
    ]


def error_text(key: str, error: TaskError) -> str:
    """Return the error in a task as text, such as `cloze: 53.2 +- 1.9 % wrong`."""
    stderr = "" if error.stderr_pct is None else f" +- {error.stderr_pct:.1f}"
    return f"{Objective.of_key(key).task}: {error.pct:.1f}{stderr} % wrong"


def hover_text(trial: TrialPoint) -> str:
    """Return the hover text of a trial: predicted, measured and final values, line by line."""
    loss = f"loss {trial.loss:.3f}"
    lines = [
        trial.name,
        str(trial.spec),
        f"{trial.parameters / 1e6:.2f}M parameters",
        loss if trial.reason is None else f"stopped early; predicted {loss}",
        *(error_text(key, error) for key, error in trial.errors.items()),
        *(f"predicted {text}" for text in cost_text(trial.costs)),
    ]
    if trial.model is not None and trial.model.trained is not None:
        lines.append(f"loss after final training {trial.model.trained.after.loss:.3f}")
    if trial.model is not None and trial.model.exported is not None:
        exported = trial.model.exported
        lines += [
            f"measured TTFT {exported.measurement.prefill.ms:.4g} ms, "
            f"decode step {exported.measurement.decode.ms:.4g} ms",
            f"loss of the .pte {exported.program_quality.change.loss:.3f}, "
            f"{exported.pte_bytes / 2**20:.2f} MiB",
        ]
    return "<br>".join(lines)
