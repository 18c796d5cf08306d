"""The pictures that explain the method, drawn from committed data.

`python benchmarks/method_figures.py [NAME ...]` draws docs/figures/NAME.svg (by kaleido, which
needs Chrome or Chromium); without names it draws all:

- `stages`: the two stages of a search.
- `hypervolume`: reference point, frontier and winners of a search on the tabular truth
  (`benchmarks/tabular.py`).
- `improvement`: what one candidate would add to the hypervolume, for one draw of the losses.
- `surrogate`: losses predicted for candidates that were never trained, after 24 and 48 trials.
- `samplers`: the kept results of `benchmarks/samplers.py`.
- `stopping`: training curves of `benchmarks/principles.py`, and the prediction that ends a trial.
- `blocks`: measured blocks of the paper's space, their interpolation, and their sum against whole
  models (`benchmarks/flash_space.py`).
- `rounding`: two groups of weights of the tiny backbone in 4 bits.
- `case_frontier`, `case_patterns`: figures of the report on the study of SmolLM2-135M, whose files
  are in benchmarks/data/smollm2.
"""

import json
import sys
from collections.abc import Callable, Sequence

import flash_space
import numpy as np
import plotly.graph_objects as go
import stopping
from optuna.trial import TrialState
from readme_figure import note
from record import RESULTS, SMOKE, Recorder, output
from samplers import Table
from scipy import stats

import conf
from flash.arch import GROUP, ArchSpec
from flash.device.workload import Point
from flash.latency.blocks import BlockPredictor
from flash.latency.composition import FFN, BlockTable
from flash.latency.drift import comparable
from flash.latency.fit import grid_subjects, make_grid
from flash.latency.programs import Subject
from flash.latency.settings import LatencySettings
from flash.model.checkpoint import load
from flash.paths import Runs
from flash.report.data import StudyData
from flash.report.pattern_figures import patterns
from flash.report.reading import read_study
from flash.report.search_figures import frontier as report_frontier
from flash.report.style import BLUE, GRAY, GREEN, INK, ORANGE, layout
from flash.rounding.grid import round_to_grid
from flash.rounding.settings import LINEAR_BITS
from flash.search.loop import frontier
from flash.search.pareto import choose_winners
from flash.search.pruner import LossPrediction
from flash.search.settings import Sampler
from flash.search.surrogate import Observations, draw_values
from flash.search.trial import Trial

FIGURES = output(conf.ROOT / "docs" / "figures")
TRIALS = (18, 20) if SMOKE else (24, 48)
"""Numbers of trials after which the model of losses is shown; the search ends with the latter."""
LATENCY, LOSS = "TTFT at 2048 tokens, counted [ms]", "held-out loss [nats/token]"
LIGHT = "rgba(47, 111, 222, 0.12)"


def trials_of(table: Table, specs: Sequence[ArchSpec]) -> list[Trial]:
    """Return these members of the table as complete trials."""
    return [
        Trial(
            number=number,
            spec=spec,
            costs={"prefill_ms": table.prefill_ms[spec]},
            state=TrialState.COMPLETE,
            loss=table.loss[spec],
            batch=(0, 1),
        )
        for number, spec in enumerate(specs)
    ]


def panels(figure: go.Figure, titles: tuple[str, str], axes: tuple[str, str]) -> None:
    """Split the figure into two panels; `axes` are the titles of the second one's axes."""
    figure.update_layout(
        width=1000, height=380, margin={"t": 50},
        xaxis_domain=[0, 0.45], xaxis2={"domain": [0.56, 1], "anchor": "y2", "title": axes[0]},
        yaxis2={"anchor": "x2", "title": axes[1]},
    )  # fmt: skip
    for left, title in zip((0, 0.56), titles, strict=True):
        note(figure, left, 1.1, title, 13, xanchor="left", yanchor="top")


def draw_area(figure: go.Figure, points: np.ndarray, reference: tuple[float, float]) -> None:
    """Draw the frontier `(latency, loss)` as steps, and the area up to the reference point."""
    worst_loss, worst_ms = reference
    x = np.repeat(points[:, 0], 2)
    y = np.repeat(points[:, 1], 2)
    x, y = [x[0], *x[1:], worst_ms], [worst_loss, *y[:-1], y[-1]]
    figure.add_scatter(x=[*x, worst_ms], y=[*y, worst_loss], mode="none", fill="toself",
                       fillcolor=LIGHT, name="hypervolume")  # fmt: skip
    figure.add_scatter(x=x, y=y, mode="lines", line={"color": BLUE, "width": 2}, name="frontier")


def hypervolume() -> go.Figure:
    table = Table()
    trials = trials_of(table, table.run(Sampler.flash, TRIALS[-1], 0))
    front = frontier(trials, table.problem)
    points = np.array([[t.costs["prefill_ms"], t.loss] for t in front])
    reference = table.problem.reference
    chosen = choose_winners(points[:, [1, 0]], reference, 3)
    figure = go.Figure()
    draw_area(figure, points[points[:, 1] < reference[0]], (reference[0], reference[1]))
    figure.add_scatter(
        x=[t.costs["prefill_ms"] for t in trials], y=[t.loss for t in trials], mode="markers",
        marker={"color": GRAY, "size": 6}, name="trials",
    )  # fmt: skip
    figure.add_scatter(x=[reference[1]], y=[reference[0]], mode="markers", name="reference point",
                       marker={"color": INK, "symbol": "x", "size": 10})  # fmt: skip
    figure.add_scatter(
        x=points[chosen, 0], y=points[chosen, 1], mode="markers+text", name="winners",
        text=["first", "second", "third"], textposition="bottom left",
        marker={"color": ORANGE, "size": 11},
    )  # fmt: skip
    layout(figure, LATENCY, LOSS)
    return figure.update_layout(width=760, height=430, yaxis_range=[2.0, reference[0] + 0.35])


def improvement() -> go.Figure:
    """A drawing with round numbers: four known points and one candidate."""
    reference, known = (3.0, 60.0), np.array([[18, 2.75], [27, 2.45], [38, 2.2], [52, 2.1]])
    figure = go.Figure()
    draw_area(figure, known, reference)
    cost, loss = 32.0, 2.12
    figure.add_scatter(
        x=[cost, cost, 38, 38, 52, 52], y=[loss, 2.45, 2.45, 2.2, 2.2, loss], mode="none",
        fill="toself", fillcolor="rgba(232, 116, 59, 0.45)", name="improvement",
    )  # fmt: skip
    figure.add_scatter(x=known[:, 0], y=known[:, 1], mode="markers", name="trials",
                       marker={"color": BLUE, "size": 9})  # fmt: skip
    figure.add_scatter(x=[cost], y=[loss], mode="markers", name="candidate",
                       marker={"color": ORANGE, "size": 11})  # fmt: skip
    figure.add_scatter(x=[reference[1]], y=[reference[0]], mode="markers", name="reference point",
                       marker={"color": INK, "symbol": "x", "size": 10})  # fmt: skip
    layout(figure, "cost c", "loss, one draw of the posterior")
    return figure.update_layout(width=760, height=400)


def surrogate() -> go.Figure:
    table = Table()
    tried = table.run(Sampler.flash, TRIALS[-1], 0)
    figure = go.Figure()
    layout(figure, "loss after training", "predicted loss, 90 %")
    first, second = (f"after {count} trials" for count in TRIALS)
    panels(figure, (first, second), ("loss after training", ""))
    for panel, count in zip(("", "2"), TRIALS, strict=True):
        known = tried[:count]
        rest = [spec for spec in table.loss if spec not in set(known)][::4]
        losses = Observations(np.array([table.loss[spec] for spec in known]))
        draws = draw_values(table.space, known, [losses], rest, 0)[0][:, count:]
        low, middle, high = np.quantile(draws, [0.05, 0.5, 0.95], axis=0)
        truth = np.array([table.loss[spec] for spec in rest])
        figure.add_scatter(
            x=truth, y=middle, mode="markers", xaxis=f"x{panel}", yaxis=f"y{panel}",
            marker={"color": BLUE, "size": 5}, showlegend=False,
            error_y={"array": high - middle, "arrayminus": middle - low, "thickness": 0.7,
                     "width": 0, "color": GRAY},
        )  # fmt: skip
        ends = [truth.min() - 0.1, truth.max() + 0.1]
        figure.add_scatter(x=ends, y=ends, mode="lines", xaxis=f"x{panel}", yaxis=f"y{panel}",
                           line={"color": ORANGE, "width": 1}, showlegend=False)  # fmt: skip
        tau = stats.kendalltau(middle, truth)[0]
        error = float(np.abs(middle - truth).mean())
        inside = float(((low <= truth) & (truth <= high)).mean())
        quality = f"error {error:.3f}, tau {tau:.2f}, inside {inside:.2f}"
        print(f"surrogate, {count} trials: {quality}", file=sys.stderr)
    return figure


def samplers() -> go.Figure:
    lines = map(json.loads, (RESULTS / "samplers.jsonl").read_text("utf-8").splitlines())
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        if line["metric"].startswith("hypervolume_"):
            budget = int(line["metric"].rpartition("_")[2])
            found.setdefault(line["case"], {})[budget] = line["value"]
    figure = go.Figure()
    colors = {"flash": BLUE, "additive": GREEN, "tpe": ORANGE, "nsga2": INK, "random": GRAY}
    for name, color in colors.items():
        values = found[name]
        figure.add_scatter(x=list(values), y=list(values.values()), name=name,
                           mode="lines+markers", line_color=color)  # fmt: skip
    layout(figure, "trials", "share of the true hypervolume")
    return figure.update_layout(width=760, height=380, xaxis={"type": "log", "tickvals": [25, 50,
                                100, 200]})  # fmt: skip


def stopped() -> go.Figure:
    trials = stopping.trials()
    order = np.random.default_rng(3).permutation(len(trials))
    known = [trials[i] for i in order[:24]]
    now = sorted((trials[i] for i in order[24:40]), key=lambda trial: trial.loss or 0)[11]
    part = len(now.curve) // 2
    partial = [trial.curve[part - 1] for trial in known]
    final = [trial.loss for trial in known if trial.loss is not None]
    prediction = LossPrediction.of(partial, final, now.curve[part - 1])
    half = prediction.scale * stats.t.ppf(0.95, prediction.dof)
    middle, low, high = np.exp([prediction.mean, prediction.mean - half, prediction.mean + half])
    figure = go.Figure()
    layout(figure, "share of the training", "training loss")
    panels(figure, ("complete trials, and a running one", "its final loss, predicted at one half"),
           ("training loss at one half", "final held-out loss"))  # fmt: skip
    for trial in known:
        share = (np.arange(len(trial.curve)) + 1) / len(trial.curve)
        figure.add_scatter(x=share, y=trial.curve, mode="lines", showlegend=False,
                           line={"color": GRAY, "width": 1})  # fmt: skip
    figure.add_scatter(x=(np.arange(part) + 1) / len(now.curve), y=now.curve[:part], mode="lines",
                       line={"color": ORANGE, "width": 3}, showlegend=False)  # fmt: skip
    figure.add_scatter(x=partial, y=final, mode="markers", xaxis="x2", yaxis="y2",
                       marker={"color": GRAY}, showlegend=False)  # fmt: skip
    ends = np.linspace(min([*partial, now.curve[part - 1]]), max(partial), 20)
    line = [np.exp(LossPrediction.of(partial, final, float(x)).mean) for x in ends]
    figure.add_scatter(x=ends, y=line, mode="lines", xaxis="x2", yaxis="y2",
                       line={"color": BLUE}, showlegend=False)  # fmt: skip
    figure.add_scatter(
        x=[now.curve[part - 1]], y=[middle], mode="markers", xaxis="x2", yaxis="y2",
        marker={"color": ORANGE, "size": 10}, showlegend=False,
        error_y={"array": [high - middle], "arrayminus": [middle - low]},
    )  # fmt: skip
    best = min(final)
    figure.add_scatter(x=[ends[0], ends[-1]], y=[best, best], mode="lines", xaxis="x2", yaxis="y2",
                       line={"color": INK, "dash": "dot"}, showlegend=False)  # fmt: skip
    figure.add_annotation(x=ends[-1], y=best, xref="x2", yref="y2", text="to beat", yshift=10,
                          showarrow=False, xanchor="right")  # fmt: skip
    return figure.update_layout(yaxis={"type": "log", "tickvals": [1, 2, 3, 4, 5, 6]})


def blocks() -> go.Figure:
    bench, models = flash_space.recorded(), flash_space.models()
    backbone, point = conf.flash_backbone(), Point.parse("prefill_2048")
    grid = make_grid(conf.space("flash"), backbone, flash_space.SETTINGS)
    parts = grid_subjects(grid, backbone)
    subjects = [*parts, *(Subject(spec=spec) for spec in models)]
    all_ms, _ = comparable([bench.attempts(each, point) for each in subjects], point.phase)
    parts_ms = dict(zip(grid.parts(), all_ms[: len(parts)].tolist(), strict=True))
    measured = all_ms[len(parts) :] / 1e3
    table = BlockTable(point, backbone, grid, parts_ms, bench.lowering)
    few = [*range(LatencySettings().calibration_models), len(models) - 1]
    rest = np.setdiff1d(np.arange(len(models)), few)
    fitted = BlockPredictor(table).fit([models[i] for i in few], 1e3 * measured[few])
    guess = fitted.predict([models[i] for i in rest])
    figure = go.Figure()
    layout(figure, "FFN width", "one FFN at 2048 tokens [ms]")
    panels(figure, ("measured blocks, and lines between them", "calibrated sums of blocks"),
           ("measured TTFT at 2048 tokens [s]", "predicted [s], 90 %"))  # fmt: skip
    for width, color in zip(grid.model_dims, (GREEN, BLUE, ORANGE), strict=True):
        of_width = [p for p in grid.parts() if p.name == FFN and p.model_dim == width]
        figure.add_scatter(
            x=[part.ffn_dim for part in of_width], y=[parts_ms[part] for part in of_width],
            mode="lines+markers", line_color=color, name=f"model width {width}",
        )  # fmt: skip
    figure.add_scatter(
        x=measured[rest], y=guess.mean / 1e3, mode="markers", xaxis="x2", yaxis="y2",
        marker={"color": BLUE, "size": 6}, showlegend=False,
        error_y={"array": (guess.high - guess.mean) / 1e3,
                 "arrayminus": (guess.mean - guess.low) / 1e3, "thickness": 1, "width": 2},
    )  # fmt: skip
    ends = [float(measured.min()), float(measured.max())]
    figure.add_scatter(x=ends, y=ends, mode="lines", xaxis="x2", yaxis="y2", showlegend=False,
                       line={"color": GRAY, "dash": "dot"})  # fmt: skip
    print(f"blocks: {fitted}", file=sys.stderr)
    return figure.update_layout(legend={"x": 0.01, "y": 0.98, "yanchor": "top",
                                        "orientation": "v"})  # fmt: skip


def rounding() -> go.Figure:
    decoder = load(conf.ROOT / "backbones" / "tiny")
    row = decoder.model.layers[2].mlp.gate_proj.weight.detach()[7:8, : 2 * GROUP]
    grid = round_to_grid(row, GROUP, LINEAR_BITS)
    scales = grid.scales.flatten().tolist()
    weights, rounded = row[0].numpy(), grid.weight()[0].numpy()
    figure = go.Figure()
    for group, scale in enumerate(scales):
        x = np.arange(group * GROUP, (group + 1) * GROUP)
        for level in np.arange(-8, 8) * scale:
            figure.add_scatter(x=[x[0] - 0.4, x[-1] + 0.4], y=[level, level], mode="lines",
                               line={"color": GRAY, "width": 0.5}, showlegend=False)  # fmt: skip
        first = group == 0
        figure.add_scatter(x=x, y=weights[x], mode="markers", showlegend=first, name="weight",
                           marker={"color": BLUE, "size": 7})  # fmt: skip
        figure.add_scatter(x=x, y=rounded[x], mode="markers", showlegend=first, name="in 4 bits",
                           marker={"color": ORANGE, "size": 7, "symbol": "line-ew-open",
                                   "line_width": 2})  # fmt: skip
    layout(figure, "weight of one row, in two groups of 32", "value")
    return figure.update_layout(width=900, height=360, xaxis_showgrid=False, yaxis_showgrid=False)


def case_study() -> StudyData:
    return read_study(Runs(conf.ROOT / "benchmarks" / "data" / "smollm2"), "smollm2")


def case_frontier() -> go.Figure:
    return report_frontier(case_study()).update_layout(width=900, height=440)


def case_patterns() -> go.Figure:
    return patterns(case_study()).update_layout(width=900, height=440)


STAGE_ONE = (
    "choose blocks<br>and models",
    "lower them,<br>random weights",
    "time them<br>on the device",
    "fit: cost c(a)<br>with interval",
)
STAGE_TWO = (
    "fit the loss of<br>the trials so far",
    "draw a pool<br>within limits",
    "take the batch of<br>most improvement",
    "cut, train briefly,<br>held-out loss",
)


def stages() -> go.Figure:
    figure = go.Figure()
    layout(figure)
    hidden = {"visible": False, "range": [0, 1]}
    figure.update_layout(width=900, height=300, xaxis=hidden, yaxis=hidden,
                         margin={"l": 10, "r": 10, "t": 10, "b": 10})  # fmt: skip
    figure.add_scatter(x=[], y=[], showlegend=False)
    wide, gap, left = 0.19, 0.025, 0.14
    for y, title, boxes, color in (
        (0.72, "stage 1:<br>latency", STAGE_ONE, ORANGE),
        (0.2, "stage 2:<br>search", STAGE_TWO, BLUE),
    ):
        note(figure, 0, y + 0.11, title, 14, xanchor="left", yanchor="middle", align="left")
        for i, text in enumerate(boxes):
            x = left + i * (wide + gap)
            figure.add_shape(type="rect", xref="paper", yref="paper", x0=x, x1=x + wide, y0=y,
                             y1=y + 0.22, line={"color": color, "width": 1.5})  # fmt: skip
            note(figure, x + wide / 2, y + 0.11, text, xanchor="center", yanchor="middle")
            if i:
                note(figure, x - gap / 2, y + 0.11, "\u2192", 16, xanchor="center",
                     yanchor="middle")  # fmt: skip
    last, first = left + 3 * (wide + gap) + wide / 2, left + wide / 2
    into = left + 2 * (wide + gap) + wide / 2
    arrows = (
        (f"M {last} 0.2 L {last} 0.06 L {first} 0.06 L {first} 0.2", BLUE, first, 0.2),
        (f"M {last} 0.72 L {last} 0.57 L {into} 0.57 L {into} 0.42", ORANGE, into, 0.42),
    )
    for path, color, x, y in arrows:
        figure.add_shape(type="path", xref="paper", yref="paper", path=path,
                         line={"color": color, "width": 1.5})  # fmt: skip
        head = "\u25b2" if y < 0.3 else "\u25bc"
        note(figure, x, y, head, 10, xanchor="center", yanchor="top" if y < 0.3 else "bottom")
    note(figure, (last + first) / 2, 0.06, "one more batch, until the trials are done",
         xanchor="center", yanchor="middle", bgcolor="white")  # fmt: skip
    return figure


DRAWINGS: dict[str, Callable[[], go.Figure]] = {
    "stages": stages,
    "hypervolume": hypervolume,
    "improvement": improvement,
    "surrogate": surrogate,
    "samplers": samplers,
    "stopping": stopped,
    "blocks": blocks,
    "rounding": rounding,
    "case_frontier": case_frontier,
    "case_patterns": case_patterns,
}


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    record = Recorder("method_figures")
    for name in sys.argv[1:] or DRAWINGS:
        path = FIGURES / f"{name}.svg"
        DRAWINGS[name]().write_image(path)
        record.add(name, "size_kib", [path.stat().st_size / 2**10], "KiB")


if __name__ == "__main__":
    main()
