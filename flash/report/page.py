"""Report as one self-contained HTML file, which needs no network and no other file."""

from pathlib import Path

import plotly.graph_objects as go
import plotly.io
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from flash.arch import ArchSpec, Attention
from flash.evaluation.suites import SuiteResult
from flash.records import write_text
from flash.report.data import Model, ReportData
from flash.report.figures import all_figures
from flash.report.table import COLUMNS, NONE, QUANTIZATION_COLUMNS, quantization_rows, rows

CAPTIONS = {
    "frontier": (
        "Frontier",
        "Each point is a candidate: pruned from the backbone and trained briefly. Its cost is "
        "known before the training. Dotted lines: the reference point.",
    ),
    "hypervolume": (
        "Progress of the search",
        "Area between the frontier and the reference point, after each trial.",
    ),
    "parallel_coordinates": (
        "All trials",
        "One line for each trial, the frontier colored by loss; drag along an axis to select "
        "others, double-click it to select all (longest run: consecutive layers without full "
        "attention; axes on which all trials agree are left out).",
    ),
    "patterns": (
        "Patterns of the frontier",
        "One row for each member with its loss, the fastest on top.",
    ),
    "kinds": (
        "Layer kinds by position",
        "Share of each kind at each position from input to output, and of adjacent layers of "
        "different kinds. A difference between the frontier and all trials is a preference that "
        "the search found.",
    ),
    "learning_curves": (
        "Learning curves",
        "Training loss along each trial; all see the same text in the same order.",
    ),
    "promotion": (
        "Ranking after longer training",
        "Held-out loss of the best trials after the short and after a longer training, each on its "
        "own scale, the lowest at the bottom. Lines cross where the longer training changed the "
        "ranking.",
    ),
    "predicted_against_measured": (
        "Predicted against measured latency",
        "Bars are 90 % intervals, predicted before the program was exported.",
    ),
    "recovery": (
        "Recovery of the winners",
        "Held-out loss of each winner at three stages of its training.",
    ),
}
_KIND_CLASS = {
    Attention.full_attention: "full",
    Attention.sliding_attention: "sliding",
    Attention.skip_attention: "skip",
}


def _diagram(spec: ArchSpec, widest: ArchSpec) -> list[dict[str, object]]:
    """Describe the layers from input to output, with widths relative to the widest model [%]."""
    return [
        {
            "index": index,
            "kind": _KIND_CLASS[kind],
            "label": kind.value.replace("_", " "),
            "attention_pct": 100 * spec.model_dim / widest.model_dim,
            "ffn_pct": 100 * spec.ffn_dim / widest.ffn_dim,
        }
        for index, kind in enumerate(spec.layer_types)
    ]


def render(data: ReportData) -> str:
    """Render the page as HTML text."""
    environment = Environment(
        loader=PackageLoader("flash.report"), autoescape=True, undefined=StrictUndefined
    )
    figures = [
        {
            "title": CAPTIONS[name][0],
            "caption": CAPTIONS[name][1],
            "wide": name == "parallel_coordinates" or _panels(figure) > 1,
            "html": plotly.io.to_html(
                figure,
                include_plotlyjs=False,
                full_html=False,
                div_id=name,
                config={"displayModeBar": False, "responsive": True},
            ),
        }
        for name, figure in all_figures(data).items()
    ]
    return environment.get_template("report.html").render(
        data=data,
        search=data.search,
        columns=COLUMNS,
        rows=rows(data.models),
        figures=figures,
        diagrams=[
            {"model": model, "layers": _diagram(model.spec, data.backbone.spec)}
            for model in data.models
        ],
        exported=[model for model in data.models if model.exported is not None],
        suites=_suites(data.evaluations),
        quantization_columns=QUANTIZATION_COLUMNS,
        quantization=quantization_rows(data.models),
        scores=_scores(data),
        machine=_machine(data.models, data.search["device"]),
        plotly_js=get_plotlyjs(),
    )


def _panels(figure: go.Figure) -> int:
    """Count the plots that a figure shows side by side."""
    return len({axis.domain for axis in figure.select_xaxes()})


def _scores(data: ReportData) -> list[dict[str, object]]:
    """Tabulate the cross-validation scores, a row for each point and predictor."""
    table: dict[tuple[str, str], dict[str, object]] = {}
    for key, value in data.search["latency_scores"].items():
        _, point, predictor, score = key.split("/")
        row = table.setdefault((point, predictor), {"point": point, "predictor": predictor})
        row[score] = value
    return list(table.values())


def _suites(results: list[SuiteResult]) -> list[dict[str, object]]:
    """Build a table for each suite and limit of questions: our models, then the paper's."""
    together: dict[tuple[str, int | None], list[SuiteResult]] = {}
    for result in results:
        together.setdefault((result.suite, result.limit), []).append(result)
    return [_suite(*group, members) for group, members in together.items()]


def _suite(suite: str, limit: int | None, results: list[SuiteResult]) -> dict[str, object]:
    tasks = {row.task: row for result in results for row in result.figures}
    lines = []
    for result in results:
        found = {row.task: row for row in result.figures}
        cells = [_figure(found[task].value, found[task].stderr) if task in found else NONE
                 for task in tasks]  # fmt: skip
        lines.append([f"{result.name} ({result.form})", *cells, _figure(result.average)])
    for name in dict.fromkeys(name for row in tasks.values() for name in row.paper):
        values = [row.paper.get(name) for row in tasks.values()]
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if len(known) == len(values) > 1 else None
        lines.append([f"{name}, paper", *map(_figure, [*values, mean])])
    return {
        "name": suite if limit is None else f"{suite}, first {limit} questions of each task",
        "columns": ["model", *(row.title for row in tasks.values()), "average"],
        "rows": lines,
    }


def _figure(value: float | None, stderr: float | None = None) -> str:
    if value is None:
        return NONE
    return f"{value:.1f}" if stderr is None else f"{value:.1f} +- {stderr:.1f}"


def _machine(models: list[Model], device: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in device.items())


def write_page(data: ReportData, path: Path) -> None:
    """Render the page and write it atomically."""
    write_text(path, render(data))
