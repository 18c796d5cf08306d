"""The picture of the README: the loop, a frontier, and how well latency is predicted.

`python benchmarks/readme_figure.py` draws docs/figures/overview.svg from committed data (by
kaleido, which needs Chrome or Chromium):

- the frontier: all 512 members of the small space of `benchmarks/tabular.py`, each pruned out of
  the tiny backbone and trained for 12,288 tokens; their latency is counted work at nominal rates;
- the inset: 25 whole models of the paper's space, measured on a CPU (`benchmarks/flash_space.py`),
  each predicted with its 90 % interval by a fit to the other 24.
"""

import flash_space
import numpy as np
import plotly.graph_objects as go
import tabular
from record import Recorder, output

import conf
from flash.arch import ArchSpec
from flash.device.workload import Point
from flash.latency.analytical import AnalyticalPredictor
from flash.latency.drift import comparable
from flash.latency.prediction import Prediction, cross_predict, score
from flash.latency.store import MeasurementStore, StoredLatency, SubjectKind
from flash.report.style import BLUE, GRAY, INK, ORANGE, layout
from flash.search.pareto import non_dominated

FIGURE = output(conf.ROOT / "docs" / "figures") / "overview.svg"
WIDTH, HEIGHT = 1000, 560
PLOT_TOP = 0.73
"""Height at which the loop begins, as a share of the plotting area."""
STEPS = (
    ("pretrained<br>backbone", GRAY),
    ("measure<br>the device", ORANGE),
    ("search: prune,<br>train briefly", BLUE),
    ("frontier of loss<br>and latency", BLUE),
    ("train<br>the winners", BLUE),
    ("lower to .pte,<br>prove parity", BLUE),
    ("measure<br>the program", ORANGE),
)


def candidates() -> tuple[np.ndarray, np.ndarray]:
    """Latency [ms] and held-out loss [nats] of every member of the tabular space."""
    rows = [row for row in tabular.read() if row["seed"] == 0 and row["loss"] is not None]
    return np.array([r["prefill_ms"] for r in rows]), np.array([r["loss"] for r in rows])


def predicted() -> tuple[np.ndarray, Prediction]:
    """Measured prefill latencies at 2048 tokens [ms], and what a fit to the others says."""
    point = Point.parse("prefill_2048")
    attempts: dict[str, list[StoredLatency]] = {}
    for row in MeasurementStore(flash_space.STORE):
        if row.kind is SubjectKind.model and row.conditions.point["tokens"] == point.tokens:
            attempts.setdefault(row.key, []).append(row)
    models = [ArchSpec.from_dict(rows[0].subject) for rows in attempts.values()]
    values, errors = comparable(list(attempts.values()), point.phase)

    def make() -> AnalyticalPredictor:
        return AnalyticalPredictor(point, flash_space.PROGRAMS)

    return values, cross_predict(make, models, values, errors, folds=len(models))


def draw_frontier(figure: go.Figure) -> None:
    """Every candidate, and the ones that no other beats."""
    latency, loss = candidates()
    front = non_dominated(np.stack([latency, loss], axis=1))
    order = np.argsort(latency[front])
    figure.add_scatter(
        x=latency[~front], y=loss[~front], mode="markers", name="candidates, each trained",
        marker={"color": GRAY, "size": 5, "opacity": 0.6},
    )  # fmt: skip
    figure.add_scatter(
        x=latency[front][order], y=loss[front][order], mode="lines+markers", name="frontier",
        line={"shape": "hv", "color": BLUE, "width": 2}, marker={"color": BLUE, "size": 7},
    )  # fmt: skip


def draw_inset(figure: go.Figure, record: Recorder) -> None:
    """Predicted against measured seconds, with the intervals that were promised."""
    measured, guess = predicted()
    figure.add_scatter(
        x=measured / 1e3, y=guess.mean / 1e3, xaxis="x2", yaxis="y2", mode="markers",
        error_y={"array": (guess.high - guess.mean) / 1e3, "thickness": 1, "width": 2,
                 "arrayminus": (guess.mean - guess.low) / 1e3},
        marker={"color": ORANGE, "size": 6}, showlegend=False,
    )  # fmt: skip
    ends = [0.9 * measured.min() / 1e3, 1.08 * measured.max() / 1e3]
    figure.add_scatter(
        x=ends, y=ends, xaxis="x2", yaxis="y2", mode="lines", showlegend=False,
        line={"color": GRAY, "dash": "dot", "width": 1},
    )  # fmt: skip
    quality = score(guess, measured)
    record.add("inset", "mape_pct", [quality.mape_pct], "%")
    record.add("inset", "r2", [quality.r2], "ratio")
    small = {"title_font_size": 11, "tickfont_size": 10, "nticks": 5, "range": ends}
    figure.update_layout(
        xaxis2={"domain": [0.7, 1], "anchor": "y2", "title": "measured TTFT [s]", **small},
        yaxis2={"domain": [0.22, 0.56], "anchor": "x2", "title": "predicted [s]", **small},
    )
    text = (
        f"{len(measured)} models never seen by the fit:<br>"
        f"mean error {quality.mape_pct:.1f} %, R<sup>2</sup> {quality.r2:.3f}"
    )
    note(figure, 0.71, 0.555, text, size=11, xanchor="left", yanchor="top", align="left")


def note(figure: go.Figure, x: float, y: float, text: str, size: int = 12, **more: object) -> None:
    """Text at a place given as shares of the plotting area."""
    figure.add_annotation(
        x=x, y=y, xref="paper", yref="paper", text=text, showarrow=False,
        font={"size": size, "color": INK}, **more,
    )  # fmt: skip


def draw_loop(figure: go.Figure) -> None:
    """Boxes from the backbone to the measured program, and the way back to the measurements."""
    gap, low, high = 0.022, 0.87, 1.0
    wide = (1 - gap * (len(STEPS) - 1)) / len(STEPS)
    for i, (text, color) in enumerate(STEPS):
        left = i * (wide + gap)
        figure.add_shape(
            type="rect", xref="paper", yref="paper", x0=left, x1=left + wide, y0=low, y1=high,
            line={"color": color, "width": 1.5}, fillcolor="white",
        )  # fmt: skip
        note(figure, left + wide / 2, (low + high) / 2, text, xanchor="center", yanchor="middle")
        if i:
            note(figure, left - gap / 2, (low + high) / 2, "\u2192", 16, xanchor="center",
                 yanchor="middle")  # fmt: skip
    back, first, last = 0.805, wide + gap + wide / 2, 1 - wide / 2
    path = f"M {last} {low} L {last} {back} L {first} {back} L {first} {low}"
    figure.add_shape(type="path", xref="paper", yref="paper", path=path,
                     line={"color": ORANGE, "width": 1.5})  # fmt: skip
    note(figure, first, low, "\u25b2", 10, xanchor="center", yanchor="top")
    note(figure, (first + last) / 2, back, "every measurement is kept",
         xanchor="center", yanchor="middle", bgcolor="white")  # fmt: skip


def main() -> None:
    figure = go.Figure()
    layout(
        figure, "TTFT at 2048 tokens, counted at nominal rates [ms]", "held-out loss [nats/token]"
    )
    draw_frontier(figure)
    draw_inset(figure, Recorder("readme_figure"))
    draw_loop(figure)
    figure.update_layout(
        width=WIDTH, height=HEIGHT, yaxis_domain=[0, PLOT_TOP],
        xaxis_range=[205, 860],
        xaxis_tickvals=list(range(250, 700, 50)),
        margin={"l": 60, "r": 15, "t": 12, "b": 50},
        legend={"x": 0.66, "y": PLOT_TOP, "xanchor": "left", "yanchor": "top", "orientation": "v"},
    )  # fmt: skip
    FIGURE.parent.mkdir(exist_ok=True)
    figure.write_image(FIGURE)


if __name__ == "__main__":
    main()
