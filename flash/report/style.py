"""Common style of all figures: layout, colors and names."""

import plotly.graph_objects as go

from flash.arch import Attention
from flash.device.workload import Phase, Point
from flash.report.data import ReportData, TrialPoint
from flash.search.objectives import Objective

INK, GRAY, BLUE, ORANGE, GREEN = "#1f2933", "#9aa5b1", "#2f6fde", "#e8743b", "#2e9e6b"
KINDS = {
    Attention.full_attention: ("full attention", BLUE),
    Attention.sliding_attention: ("sliding", "#8fd0c4"),
    Attention.skip_attention: ("skipped", "#e4e7eb"),
}
"""Name and color of each kind of layer, as on the page (templates/report.html)."""
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


def cost_name(key: str) -> str:
    """Return the short name of a cost with its unit."""
    return f"{_COSTS[key]} [{Objective(key).unit}]"


def cost_axis(data: ReportData, key: str) -> str:
    """Return the axis title of a cost, with workload and unit."""
    workload = data.search["workload"]
    match key:
        case "prefill_ms":
            return f"predicted TTFT at {workload['prompts'][0]} tokens [ms]"
        case "decode_ms":
            return f"predicted decode step at {workload['contexts'][0]} tokens [ms]"
        case _:
            return cost_name(key)


def latency_name(data: ReportData) -> str:
    """Return the name of the headline latency."""
    point = Point.parse(data.search["objective"])
    name = "TTFT" if point.phase is Phase.prefill else "decode step"
    return f"{name} at {point.tokens} tokens"


def trial_label(trial: TrialPoint) -> str:
    """Return the name of a trial: that of its architecture, or its number."""
    return trial.name or f"trial {trial.number}"


def hover_text(trial: TrialPoint) -> str:
    """Return the hover text of a trial."""
    costs = (
        f"{name} {trial.costs[key]:.4g} {Objective(key).unit}"
        for key, name in _COSTS.items()
        if key in trial.costs
    )
    loss = f"loss {trial.loss:.3f}"
    return "<br>".join([
        trial_label(trial),
        str(trial.spec),
        f"{trial.parameters / 1e6:.2f}M parameters",
        loss if trial.reason is None else f"stopped early; predicted {loss}",
        *costs,
    ])
