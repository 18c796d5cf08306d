"""Sections of the dashboards: the panels of a project, with the metrics that flash logs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wandb_workspaces.reports.v2 import interface as wr

from flash.device.workload import Point

_TOKENS = "train/tokens"
_DEVICE = wr.Config("device.name")


@dataclass(frozen=True)
class Section:
    """Group of panels of the workspace, and heading of the report.

    Attributes:
        name: Title.
        text: Explanation, for the report.
        runs: Filter of the runs that the report's panels show, as wandb-workspaces writes it.
        panels: Panels, first to last.
    """

    name: str
    text: str
    runs: str
    panels: list[wr.PanelTypes]


def sections(points: Sequence[Point]) -> list[Section]:
    """Return all sections.

    Args:
        points: Latencies to show; the first is the latency axis of the winners.
    """
    return [
        _frontier(),
        _predictions(points),
        _devices(points),
        _training(),
        _winners(points[0]),
        _failures(),
    ]


def _figure(name: str, title: str) -> wr.PanelTypes:
    """Panel of a figure that a search logs at its end."""
    return wr.MediaBrowser(title=title, media_keys=[f"figures/{name}"], num_columns=1)


def _scatter(title: str, query: dict[str, Any], x: str, y: str) -> wr.PanelTypes:
    """Scatter chart of many dots a run; a scatter plot of W&B has one, the summary."""
    return wr.CustomChart(
        query=query,
        chart_name="wandb/scatter/v0",
        chart_fields={"x": x, "y": y},
        chart_strings={"title": title},
    )


def _frontier() -> Section:
    latency, loss = "search/latency_ms", "search/loss"
    trials = {"history": {"keys": [latency, loss]}}  # each step of a search is a trial
    frontier = {"summaryTable": {"tableKey": "search/frontier"}}
    return Section(
        name="Frontier",
        text="Trials of searches: held-out loss after the short training, and predicted latency. "
        "Lower and further left is better.",
        runs="JobType = 'search'",
        panels=[
            _scatter("All trials: loss against latency [ms]", trials, latency, loss),
            _scatter("Frontier: loss against latency [ms]", frontier, "latency_ms", "loss"),
            wr.LinePlot(title="Hypervolume", x="search/trial", y=["search/hypervolume"]),
            _figure("frontier", "Frontier of a finished search"),
            _figure("parallel_coordinates", "Architectures and objectives"),
        ],
    )


def _predictions(points: Sequence[Point]) -> Section:
    panels: list[wr.PanelTypes] = []
    for point in points:
        measured, predicted = f"export/{point}_ms", f"export/{point}_predicted_ms"
        low, high = (f"export/{point}_predicted_{end}_ms" for end in ("low", "high"))
        panels += [
            wr.ScatterPlot(
                title=f"{point}: measured against predicted [ms]",
                x=wr.SummaryMetric(predicted),
                y=wr.SummaryMetric(measured),
            ),
            wr.BarPlot(
                title=f"{point}: interval of the prediction, and measurement [ms]",
                metrics=[low, predicted, high, measured],
            ),
        ]
    return Section(
        name="Predicted against measured",
        text="Latency of exported models, predicted by the search before they were measured; "
        "in the figure, models that calibrated the predictor.",
        runs="JobType in ['search', 'export']",
        panels=[*panels, _figure("predicted_against_measured", "Calibration of the predictor")],
    )


def _devices(points: Sequence[Point]) -> Section:
    metrics = [f"export/{point}_ms" for point in points]
    bars: list[wr.PanelTypes] = [
        wr.BarPlot(
            title=f"{metric.removeprefix('export/').removesuffix('_ms')} by device [ms]",
            metrics=[metric],
            groupby=_DEVICE,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        )
        for metric in metrics
    ]
    summaries = [wr.SummaryMetric(metric) for metric in [*metrics, "export/pte_mib"]]
    columns = [wr.ParallelCoordinatesPlotColumn(each) for each in [_DEVICE, *summaries]]
    return Section(
        name="Devices",
        text="Measured latency on each device. Bars are means of all models that were exported for "
        "it, their ends the fastest and the slowest; the lines below are single models.",
        runs="JobType = 'export'",
        panels=[*bars, wr.ParallelCoordinatesPlot(title="Models and devices", columns=columns)],
    )


def _training() -> Section:
    return Section(
        name="Training",
        text="Losses over the tokens that were seen, and over the time that steps took.",
        runs="JobType = 'train'",
        panels=[
            wr.LinePlot(title="Held-out loss over tokens", x=_TOKENS, y=["val/loss"]),
            wr.LinePlot(title="Training loss over tokens", x=_TOKENS, y=["train/loss"]),
            wr.LinePlot(title="Training loss over seconds", x="train/seconds", y=["train/loss"]),
            wr.LinePlot(title="Learning rate", x=_TOKENS, y=["train/lr"]),
            wr.LinePlot(title="Gradient norm", x=_TOKENS, y=["train/grad_norm"], log_y=True),
        ],
    )


def _winners(point: Point) -> Section:
    return Section(
        name="Winners",
        text="Trained and exported models, their benchmarks, and the result table of a study.",
        runs="JobType in ['train', 'export', 'evaluate', 'report']",
        panels=[
            wr.ScatterPlot(
                title=f"Held-out loss against measured {point} [ms]",
                x=wr.SummaryMetric(f"export/{point}_ms"),
                y=wr.SummaryMetric("export/val_loss"),
            ),
            wr.BarPlot(
                title="Held-out loss before and after training",
                metrics=["val/loss_before", "val/loss_after"],
            ),
            wr.BarPlot(title="Mean score of the benchmarks", metrics=["eval/average"]),
            wr.BarPlot(
                title="Change of perplexity by quantization [%]",
                metrics=["export/perplexity_change_pct"],
            ),
            wr.BarPlot(title="Size of the program [MiB]", metrics=["export/pte_mib"]),
            wr.WeavePanelSummaryTable(table_name="result"),
        ],
    )


def _failures() -> Section:
    return Section(
        name="Failures",
        text="State of every trial, with the reason of those that failed or were stopped early, "
        "and runs that did not finish.",
        runs="JobType = 'search' or State in ['failed', 'crashed', 'killed']",
        panels=[
            wr.BarPlot(
                title="Trials by state",
                metrics=[f"search/{state}_trials" for state in ("complete", "pruned", "failed")],
            ),
            wr.WeavePanelSummaryTable(table_name="search/trials"),
            wr.BarPlot(
                title="Duration of runs by state [s]",
                metrics=["Runtime"],
                groupby="State",
                groupby_aggfunc="sum",
            ),
            wr.LinePlot(title="Skipped steps", x=_TOKENS, y=["train/skipped_steps"]),
        ],
    )
