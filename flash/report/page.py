"""Report as one self-contained HTML file, which needs no network and no other file."""

import base64
import gzip
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from flash.arch import ArchSpec, Attention
from flash.commands import command
from flash.evaluation.suites import SuiteResult
from flash.provenance import provenance
from flash.records import plain, write_text
from flash.report.data import ReportData, StudyData
from flash.report.figures import all_figures, comparison_figures
from flash.report.style import DARK
from flash.report.table import (
    COLUMNS,
    NONE,
    QUANTIZATION_COLUMNS,
    measured_rows,
    quantization_rows,
    rows,
)
from flash.report.trial_table import (
    STUDY_COLUMNS,
    shared_rows,
    study_rows,
    trial_table,
)
from flash.search.devices import device_table

CAPTIONS = {
    "frontier": (
        "Frontier",
        "Each point is a candidate: pruned from the backbone and trained briefly. Its cost is "
        "known before the training. Dotted lines: the reference point. Triangles at the border "
        "point to outliers.",
    ),
    "devices": (
        "Devices",
        "The same candidates on each device. The line joins those that a search for that device "
        "alone would keep; how far a winner lies above it is the price of one model for all.",
    ),
    "comparison": (
        "Frontiers",
        "The frontier of each study; a latency is the predicted one on the study's own device, or "
        "over its devices, in ms of the first.",
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
        "Bars are 90 % intervals, predicted before the program was exported, for the speed that "
        "the machine then had: that of the backbone in the same processes.",
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


def _layers(spec: ArchSpec, widest: int, widest_ffn: int) -> list[dict[str, object]]:
    """Describe the layers from input to output, with widths relative to the widest model [%]."""
    return [
        {
            "index": index,
            "kind": _KIND_CLASS[kind],
            "label": kind.value.replace("_", " "),
            "attention_pct": 100 * spec.model_dim / widest,
            "ffn_pct": 100 * ffn_dim / widest_ffn,
        }
        for index, (kind, ffn_dim) in enumerate(zip(spec.layer_types, spec.ffn_dims, strict=True))
    ]


def render(data: ReportData) -> str:
    """Render the page as HTML text."""
    loader = PackageLoader("flash.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, lstrip_blocks=True
    )
    several = len(data.studies) > 1
    drawn = {  # by study and name; those that compare studies have no study
        ("", name): figure for name, figure in comparison_figures(data.studies).items()
    }
    for study in data.studies:
        drawn |= {(study.name, name): figure for name, figure in all_figures(study).items()}
    ids = {key: f"{key[0]}-{key[1]}" if several and key[0] else key[1] for key in drawn}
    described = {key: _described(ids[key], key[1], figure) for key, figure in drawn.items()}
    trial_columns, trials = trial_table(data)
    states = [row[trial_columns.index("state")] for row in trials]
    values: dict[str, Any] = {
        "data": data,
        "title": _title(data),
        "provenance": provenance(),
        "none_text": NONE,
        "columns": COLUMNS,
        "rows": rows(data.models),
        "commands": train_commands(data.studies),
        "compared": [each for (study, _), each in described.items() if not study],
        "study_columns": STUDY_COLUMNS,
        "study_rows": study_rows(data.studies),
        "shared": shared_rows(data.studies) if several else ([], []),
        "per_study": [
            _study_section(
                study, several, [each for key, each in described.items() if key[0] == study.name]
            )
            for study in data.studies
        ],
        "diagrams": _diagrams(data),
        "quantization_columns": QUANTIZATION_COLUMNS,
        "quantization": quantization_rows(data.models),
        "suites": _suites(data.evaluations),
        "score_columns": _SCORE_COLUMNS,
        "scores": [row for study in data.studies for row in _scores(study)],
        "samples": [model for model in data.models if model.exported is not None],
        "trial_columns": trial_columns,
        "trials": trials,
        "trial_states": states,
        "states": list(dict.fromkeys(states)),
        "origins": _provenances(data),
        "any_figures": bool(drawn),
        "plotly_js": _packed(get_plotlyjs()),
        "figures_json": _packed(
            json.dumps({
                "figures": {ids[key]: _plain(figure) for key, figure in drawn.items()},
                "dark": DARK,
            })
        ),
        "css": loader.get_source(environment, "report.css")[0],
        "js": loader.get_source(environment, "report.js")[0],
    }
    values["sections"] = _sections(values)
    return environment.get_template("report.html").render(values)


def _study_section(
    study: StudyData, several: bool, figures: list[dict[str, object]]
) -> dict[str, object]:
    """Return what the section of a study shows; its title has a name if there are several."""
    return {
        "id": f"study-{study.name}",
        "title": f"Study {study.name}" if several else "Search",
        "figures": figures,
        "devices": device_rows(study),
        "measured": measured_rows(study),
    }


def _title(data: ReportData) -> str:
    if not data.studies:
        return "Models"
    names = ", ".join(study.name for study in data.studies)
    return f"Study {names}" if len(data.studies) == 1 else f"Studies {names}"


def _sections(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return identifiers and titles of the sections that the page has, in their order."""
    sections = [
        ("result", "Result", values["rows"]),
        ("commands", "Train the winners", values["commands"]),
        ("comparison-of-studies", "Side by side", values["compared"]),
        *((each["id"], each["title"], True) for each in values["per_study"]),
        ("layers", "Layers", values["diagrams"]),
        ("quantization", "Quantization", values["quantization"]),
        ("benchmarks", "Benchmarks", values["suites"]),
        ("predictors", "Predictors", values["scores"]),
        ("samples", "Samples", values["samples"]),
        ("all-trials", "All trials", values["trials"]),
        ("origins", "Origin", True),
    ]
    return [(key, title) for key, title, there in sections if there]


def _described(key: str, name: str, figure: go.Figure) -> dict[str, object]:
    title, caption = CAPTIONS[name]
    meta = figure.to_dict()["layout"].get("meta", {})
    wide = name in {"parallel_coordinates", "comparison"} or meta.get("panels", 1) > 1
    return {"id": key, "title": title, "caption": caption, "wide": wide}


def _plain(figure: go.Figure) -> dict[str, Any]:
    """Convert a figure to JSON values without the template, which the page replaces."""
    values = json.loads(figure.to_json() or "{}")
    values["layout"].pop("template", None)
    return values


def _packed(text: str) -> str:
    """Compress text for the page's script, which inflates it."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def train_commands(studies: Sequence[StudyData]) -> list[tuple[str, str]]:
    """Return the commands that train winners, with what they train."""
    commands = []
    for study in studies:
        shared = _shared_overrides(str(study.search.provenance.get("command", "")))
        names = [trial.name for trial in study.winners]
        lines = [(f"+arch={name}", f"the command for {name}") for name in names]
        if len(names) > 1:
            several = f"-m +arch={','.join(names)}"
            lines.insert(0, (several, f"the command for all winners of {study.name}"))
        commands += [(" ".join([command("train"), line, *shared]), what) for line, what in lines]
    return commands


def _shared_overrides(line: str) -> list[str]:
    """Return the overrides of a search on which the training of its winners depends, too."""
    try:
        words = shlex.split(line)
    except ValueError:
        return []
    return [shlex.quote(word) for word in words if re.match(r"(backbone|data)[.=]|runs=", word)]


def _diagrams(data: ReportData) -> list[dict[str, object]]:
    """Describe the layers of all models, with widths relative to the widest one."""
    specs = [model.spec for model in data.models]
    widest = max((spec.model_dim for spec in specs), default=1)
    widest_ffn = max((max(spec.ffn_dims) for spec in specs), default=1)
    return [
        {
            "name": model.title,
            "spec": model.spec,
            "parameters": model.parameters,
            "layers": _layers(model.spec, widest, widest_ffn),
        }
        for model in data.models
    ]


def _provenances(data: ReportData) -> list[dict[str, object]]:
    """Describe the provenance of every result: searches, then trainings and exports."""
    listed = [
        _provenance(
            f"search {study.name}",
            study.search.provenance,
            [data.root / "studies" / study.name],
            data.links.get(data.root / "studies" / study.name),
        )
        for study in data.studies
    ]
    for model in data.models:
        exports = [("export", result) for result in model.exports]
        for kind, result in [("training", model.trained), *exports]:
            if result is not None:
                folder = "models" if kind == "training" else "exports"
                paths = [path for path in model.artifacts if path.parts[-3] == folder]
                link = data.links.get(data.root / folder / result.name)
                listed.append(
                    _provenance(f"{kind} of {result.name}", result.provenance, paths, link)
                )
    return listed


def _provenance(
    title: str, about: Mapping[str, Any], paths: Sequence[Path], link: object
) -> dict[str, object]:
    facts = [(key, about[key]) for key in ("date", "commit", "machine") if about.get(key)]
    if about.get("versions"):
        known = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        facts.append(("versions", known))
    safe = isinstance(link, str) and link.startswith("https://")
    return {
        "title": title,
        "command": about.get("command"),
        "facts": facts or [("provenance", "not recorded")],
        "paths": paths,
        "link": link if safe else None,
    }


def device_rows(study: StudyData) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of text of `device_table`; empty for a single device."""
    columns, lines = device_table(plain(study.search))
    digits = {"[ms]": 1, "backbone]": 0, "[nats]": 3, "loss": 3}
    places = [digits.get(column.rpartition(" ")[2]) for column in columns]
    return columns, [
        [
            NONE if value is None else str(value) if count is None else f"{value:.{count}f}"
            for value, count in zip(line, places, strict=True)
        ]
        for line in lines
    ]


_SCORE_COLUMNS = (
    "latency",
    "predictor",
    "R2",
    "MAPE %",
    "Kendall tau",
    "coverage of the 90 % interval",
    "n",
)


def _scores(study: StudyData) -> list[list[str]]:
    """Tabulate the cross-validation scores, a row for each point and predictor."""
    table: dict[tuple[str, str], dict[str, float]] = {}
    several = {name: device.latency_scores for name, device in study.search.devices.items()}
    for device, scores in (several or {study.device_name: study.search.latency_scores}).items():
        for key, value in scores.items():
            _, point, predictor, score = key.split("/")
            table.setdefault((f"{point} on {device}", predictor), {})[score] = value
    return [
        [
            point,
            predictor,
            f"{row['r2']:.3f}",
            f"{row['mape_pct']:.1f}",
            f"{row['kendall_tau']:.2f}",
            f"{row['coverage_90']:.2f}",
            f"{row['n']:.0f}",
        ]
        for (point, predictor), row in table.items()
    ]


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


def write_page(data: ReportData, path: Path) -> None:
    """Render the page and write it atomically."""
    write_text(path, render(data))
