"""How all figures look, and how they name things."""

import plotly.graph_objects as go

from flash.arch import Attention
from flash.device.workload import Phase, Point
from flash.report.data import ReportData, TrialPoint
from flash.search.objectives import Objective

INK, GREY, BLUE, ORANGE, GREEN = "#1f2933", "#9aa5b1", "#2f6fde", "#e8743b", "#2e9e6b"
KINDS = {
    Attention.full_attention: ("full attention", BLUE),
    Attention.sliding_attention: ("sliding", "#8fd0c4"),
    Attention.skip_attention: ("skipped", "#e4e7eb"),
}
"""Name and colour of each kind of layer, as on the page (templates/report.html)."""
_COSTS = {
    "prefill_ms": "TTFT",
    "decode_ms": "decode step",
    "memory_mib": "memory",
    "size_mib": "weights",
}


def layout(figure: go.Figure, x: str = "", y: str = "", height: int = 420) -> go.Figure:
    """Give a figure the common look and the titles of its axes."""
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
    """A cost in short, with its unit."""
    return f"{_COSTS[key]} [{Objective(key).unit}]"


def cost_axis(data: ReportData, key: str) -> str:
    """A cost with all that says what it is of."""
    workload = data.search["workload"]
    match key:
        case "prefill_ms":
            return f"predicted TTFT at {workload['prompts'][0]} tokens [ms]"
        case "decode_ms":
            return f"predicted decode step at {workload['contexts'][0]} tokens [ms]"
        case _:
            return cost_name(key)


def latency_name(data: ReportData) -> str:
    """The headline latency."""
    point = Point.parse(data.search["objective"])
    name = "TTFT" if point.phase is Phase.prefill else "decode step"
    return f"{name} at {point.tokens} tokens"


def label(trial: TrialPoint) -> str:
    """What people call a trial."""
    return trial.name or f"trial {trial.number}"


def about(trial: TrialPoint) -> str:
    """What appears beside the pointer."""
    costs = (
        f"{name} {trial.costs[key]:.4g} {Objective(key).unit}"
        for key, name in _COSTS.items()
        if key in trial.costs
    )
    loss = f"loss {trial.loss:.3f}"
    return "<br>".join([
        label(trial),
        str(trial.spec),
        f"{trial.parameters / 1e6:.2f}M parameters",
        loss if trial.reason is None else f"stopped early; predicted {loss}",
        *costs,
    ])
