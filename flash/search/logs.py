"""Logging of a search: metrics of each trial as it ends, tables and figures at the end."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from flash.arch import ArchSpec, Attention, count_parameters
from flash.search.objectives import Problem
from flash.search.study import Study, Trial

if TYPE_CHECKING:  # Lightning takes seconds to import
    from lightning.pytorch.loggers import Logger

Draw = Callable[[], Mapping[str, Any]]
"""Function that draws the plotly figures of a written study, by name."""


def log_trial(logger: "Logger | None", trial: Trial, problem: Problem) -> None:
    """Log the metrics of a complete trial, with its number as the step."""
    if logger is None or trial.loss is None:
        return
    metrics = {
        "search/loss": trial.loss,
        "search/latency_ms": trial.costs[problem.headline],
        **{f"search/{key}": value for key, value in trial.costs.items()},
        "search/parameters": count_parameters(trial.spec).total,
        "search/model_dim": trial.spec.model_dim,
        "search/ffn_dim": trial.spec.ffn_dim,
        "search/num_layers": trial.spec.num_layers,
    }
    logger.log_metrics(metrics, step=trial.number)


def log_study(logger: "Logger | None", report: Mapping[str, Any], draw: Draw) -> None:
    """Log the final hypervolume; a W&B logger also gets the table of trials and the figures.

    Args:
        logger: Logger of the search, or None.
        report: Content of `frontier.json`.
        draw: Draws the figures; called only if the logger is a `WandbLogger`.
    """
    if logger is None:
        return
    step = len(report["trials"])
    logger.log_metrics({"search/hypervolume": report["hypervolume"][-1]}, step=step)
    from lightning.pytorch.loggers import WandbLogger

    if not isinstance(logger, WandbLogger):
        return
    import wandb

    columns, rows = trial_table(report)
    logger.log_table("search/trials", columns, rows, step=step)
    figures = {f"figures/{name}": wandb.Plotly(figure) for name, figure in draw().items()}
    logger.experiment.log(figures)


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
    return columns, [list(row.values()) for row in rows]


def _row(report: Mapping[str, Any], trial: Mapping[str, Any]) -> dict[str, Any]:
    spec = ArchSpec.from_dict(trial["spec"])
    return {
        "number": trial["number"],
        "state": trial["state"],
        "frontier": trial["number"] in report["frontier"],
        "winner": trial["number"] in report["winners"],
        "pattern": spec.pattern,
        "num_layers": spec.num_layers,
        "model_dim": spec.model_dim,
        "ffn_dim": spec.ffn_dim,
        **{kind.value: spec.layer_types.count(kind) for kind in Attention},
        "longest_efficient_run": spec.longest_efficient_run,
        "parameters": count_parameters(spec).total,
        "loss": trial["loss"],
        **trial["costs"],
        "seconds": trial["extra"].get("seconds"),
        "reason": trial["extra"].get("reason"),
    }
