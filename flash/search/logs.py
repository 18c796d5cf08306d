"""Logging of a search: each trial as it ends, the best so far, tables and figures at the end."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from flash.arch import ArchSpec, Attention, count_parameters
from flash.search.devices import device_table
from flash.search.loop import frontier, hypervolume_history
from flash.search.objectives import Objective, Problem
from flash.search.study import Study
from flash.search.trial import Trial
from flash.tracking.tracker import Tracker

Draw = Callable[[], Mapping[str, Any]]
"""Function that draws the plotly figures of a written study, by name."""

SHARES_PCT = (25, 50, 75, 100)
"""Shares of the backbone's latency at which the summary of a search states the best loss [%]."""


class SearchLog:
    """Log of one worker: its own trials, and the state of the whole study after each.

    Args:
        tracker: Tracker of the worker.
        problem: Objectives, limits and reference point.
        backbone_ms: Headline latency of the backbone [ms].
    """

    def __init__(self, tracker: Tracker, problem: Problem, backbone_ms: float) -> None:
        self._tracker, self._problem, self._backbone_ms = tracker, problem, backbone_ms
        self._front: list[int] = []

    def log_trial(self, trial: Trial, trials: Sequence[Trial]) -> None:
        """Log a finished trial of this worker, with its number as the step.

        Args:
            trial: Trial that is complete, stopped early or failed.
            trials: All trials of the study.
        """
        front = frontier(trials, self._problem)
        hypervolume = hypervolume_history(trials, self._problem)[-1]
        numbers = [each.number for each in front]
        state = {
            "search/hypervolume": hypervolume,
            "search/frontier_size": len(front),
            "search/on_frontier": int(trial.number in numbers),
        }
        self._tracker.log({**_metrics(trial, self._problem), **state}, trial.number)
        if numbers != self._front:
            self._front = numbers
            columns, rows = frontier_table(front, self._problem)
            self._tracker.log_table("search/frontier", columns, rows)
        self._tracker.summarize(summary(trials, self._problem, self._backbone_ms, hypervolume))


def _metrics(trial: Trial, problem: Problem) -> dict[str, Any]:
    losses = {"search/loss": trial.loss}
    if trial.stopped:
        losses = {"search/estimated_loss": trial.expected_loss}
    spec, seconds = trial.spec, trial.extra.get("seconds")
    values = {
        **losses,
        "search/state": trial.state.name.lower(),
        "search/seconds": seconds,
        "search/latency_ms": trial.costs[problem.headline],
        **{_metric_name(key): value for key, value in trial.costs.items()},
        **{_metric_name(key): error.pct for key, error in trial.errors.items()},
        "search/parameters": count_parameters(spec).total,
        "search/model_dim": spec.model_dim,
        "search/ffn_dim": spec.mean_ffn_dim,
        "search/num_heads": spec.num_heads,
        "search/num_kv_heads": spec.num_kv_heads,
        "search/vocab_size": spec.vocab_size,
        "search/num_layers": spec.num_layers,
    }
    return {name: value for name, value in values.items() if value is not None}


def _metric_name(key: str) -> str:
    """Return the name of an objective in logs.

    `search/prefill_ms`; of a device `search/board/prefill_ms`, of a task `search/cloze/error_pct`.
    """
    quantity, at, place = key.replace(":", "@").partition("@")
    return f"search/{place}/{quantity}" if at else f"search/{key}"


def summary(
    trials: Sequence[Trial], problem: Problem, backbone_ms: float, hypervolume: float
) -> dict[str, float]:
    """Return the summary of a search: its best, and the number of trials by state.

    Args:
        trials: All trials of the study.
        problem: Objectives, limits and reference point.
        backbone_ms: Headline latency of the backbone [ms].
        hypervolume: Hypervolume after all finished trials.
    """
    counts = {
        name: sum(trial.state.name.lower() == state for trial in trials)
        for name, state in (("complete", "complete"), ("pruned", "pruned"), ("failed", "fail"))
    }
    values: dict[str, float] = {f"search/{name}_trials": n for name, n in counts.items()}
    known = [
        (trial.loss, trial)
        for trial in trials
        if trial.loss is not None and problem.is_feasible(trial.costs)
    ]
    for share in SHARES_PCT:
        limit = share / 100 * backbone_ms
        losses = [loss for loss, trial in known if trial.costs[problem.headline] <= limit]
        if losses:
            values[f"search/best_loss_at_{share}pct_latency"] = min(losses)
    if known:
        loss, best = min(known, key=lambda pair: pair[0])
        values |= {
            "search/loss": loss,
            "search/latency_ms": best.costs[problem.headline],
            "search/trial": best.number,
        }
        for key in best.errors:
            least = min(trial.errors[key].pct for _, trial in known)
            values[_metric_name(key)] = least
    return {**values, "search/hypervolume": hypervolume}


def frontier_table(front: Sequence[Trial], problem: Problem) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of the trials on the frontier, fastest first."""
    costs, errors = (list(front[0].costs), list(front[0].errors)) if front else ([], [])
    columns = ["number", "loss", *errors, "latency_ms", *costs, "parameters", "pattern"]
    rows = [
        [
            trial.number,
            trial.loss,
            *(trial.errors[key].pct for key in errors),
            trial.costs[problem.headline],
            *(trial.costs[key] for key in costs),
            count_parameters(trial.spec).total,
            trial.spec.pattern,
        ]
        for trial in front
    ]
    return columns, rows


def log_study(tracker: Tracker, report: Mapping[str, Any], draw: Draw) -> None:
    """Log the table of all trials and the figures of a finished search.

    Args:
        tracker: Tracker of the search.
        report: Content of `frontier.json`.
        draw: Draws the figures; called only by a backend that shows them.
    """
    columns, rows = trial_table(report)
    tracker.log_table("search/trials", columns, rows)
    columns, rows = device_table(report)
    if rows:
        tracker.log_table("search/devices", columns, rows)
    tracker.log_figures(draw)


_MOST_CURVES = 500
"""Most trials whose curves optuna-dashboard shows, which loads a study again every few seconds."""


def show_curves(study: Study, num_trials: int, draw: Draw) -> None:
    """Show the learning curves of a study in optuna-dashboard, if it is installed.

    Its own plot of intermediate values is for studies with one objective; a search has several.
    """
    if find_spec("optuna_dashboard") is None or num_trials > _MOST_CURVES:
        return
    curves = draw().get("learning_curves")
    if curves is not None:
        study.show("learning_curves", curves)


def trial_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of all trials, as for W&B's parallel-coordinates panel."""
    rows = [_row(report, trial) for trial in report["trials"]]
    columns = list(rows[0]) if rows else []
    return columns, [[row.get(column) for column in columns] for row in rows]


def _row(report: Mapping[str, Any], trial: Mapping[str, Any]) -> dict[str, Any]:
    spec = ArchSpec.from_dict(trial["spec"])
    tasks = [key for key in report["objectives"] if Objective.of_key(key).task is not None]
    return {
        "number": trial["number"],
        "state": trial["state"],
        "frontier": trial["number"] in report["frontier"],
        "winner": trial["number"] in report["winners"],
        "pattern": spec.pattern,
        "num_layers": spec.num_layers,
        "model_dim": spec.model_dim,
        "ffn_dim": spec.mean_ffn_dim,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "vocab_size": spec.vocab_size,
        **{kind.value: spec.layer_types.count(kind) for kind in Attention},
        "longest_efficient_run": spec.longest_efficient_run,
        "parameters": count_parameters(spec).total,
        "loss": trial["loss"],
        **{key: trial["errors"].get(key, {}).get("pct") for key in tasks},
        **trial["costs"],
        "seconds": trial["extra"].get("seconds"),
        "reason": trial["extra"].get("reason"),
    }
