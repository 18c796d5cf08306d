"""What a search tells its logger: every trial as it ends, all of them when the search is over."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from flash.arch import ArchSpec, Attention, count_parameters
from flash.search.objectives import Problem
from flash.search.study import Trial

Draw = Callable[[], Mapping[str, Any]]
"""Makes plotly figures by name, of what the search has written."""


def log_trial(logger: Logger | None, trial: Trial, problem: Problem) -> None:
    """The figures of a complete trial, under its number."""
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


def log_study(logger: Logger | None, report: Mapping[str, Any], draw: Draw) -> None:
    """The hypervolume and, where the logger can show them, the table of trials and the figures.

    Args:
        logger: Of the search.
        report: What `frontier.json` holds.
        draw: Called only if the logger is W&B's.
    """
    if logger is None:
        return
    step = len(report["trials"])
    logger.log_metrics({"search/hypervolume": report["hypervolume"][-1]}, step=step)
    if not isinstance(logger, WandbLogger):
        return
    import wandb

    columns, rows = trial_table(report)
    logger.log_table("search/trials", columns, rows, step=step)
    figures = {f"figures/{name}": wandb.Plotly(figure) for name, figure in draw().items()}
    logger.experiment.log(figures)


def trial_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of all trials, for panels such as W&B's own parallel coordinates."""
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
