"""Do the ranks of the short training last? The best trials, trained longer."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

from scipy import stats

from flash.arch import ArchSpec
from flash.errors import InputError
from flash.search.loop import EvaluationError, Quality, frontier
from flash.search.objectives import Problem
from flash.search.pareto import choose_winners
from flash.search.study import Study, Trial

_log = logging.getLogger(__name__)


def promote(
    study: Study,
    problem: Problem,
    k: int,
    evaluate: Callable[[ArchSpec, int], Quality],
    tokens: int,
) -> dict[str, Any]:
    """Train the k trials that make most of the frontier longer, and compare the orders.

    With schedule `wsd` each goes on from the checkpoint that its trial left, so that only the
    further tokens cost time; the result is that of the longer training from the start. Another
    schedule has ended and cannot be continued, so those start from the pruned weights.
    Finished ones are kept with the study; a killed call goes on with the next.

    Args:
        study: Holds the trials and the results.
        problem: Decides which trials are the best.
        k: How many.
        evaluate: Trains for `tokens`.
        tokens: Part of the key under which results are kept.

    Returns:
        `trials` with both losses, `kendall_tau` of the two, and `swapped` of `pairs` whose order
        turned; tau is null with less than two results.

    Raises:
        InputError: The study has no frontier yet.
    """
    front = frontier(study.trials(), problem)
    points = [trial.point(problem.objectives) for trial in front]
    best = [front[i] for i in choose_winners(points, problem.reference, k)]
    if not best:
        raise InputError(
            f"search.study={study.name}: expected trials within the reference point to promote; "
            "search first"
        )
    rows = [_result(study, trial, evaluate, tokens) for trial in best]
    return {"tokens": tokens, "trials": rows, **compare(rows)}


def compare(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation of `loss` and `long_loss`, and the pairs whose order turned."""
    done = [row for row in rows if row["long_loss"] is not None]
    pairs = [(a, b) for i, a in enumerate(done) for b in done[i + 1 :]]
    swapped = sum((a["loss"] - b["loss"]) * (a["long_loss"] - b["long_loss"]) < 0 for a, b in pairs)
    tau = None
    if pairs:
        columns = [[row[key] for row in done] for key in ("loss", "long_loss")]
        tau = cast(float, stats.kendalltau(*columns)[0])
    return {"kendall_tau": tau, "swapped": swapped, "pairs": len(pairs)}


def _result(
    study: Study, trial: Trial, evaluate: Callable[[ArchSpec, int], Quality], tokens: int
) -> dict[str, Any]:
    key = f"promoted_{tokens}_{trial.number}"
    kept = study.recall(key)
    if kept is not None:
        return kept
    row = {
        "number": trial.number,
        "spec": trial.spec.to_dict(),
        "costs": dict(trial.costs),
        "loss": trial.loss,
        "long_loss": None,
    }
    try:
        quality = evaluate(trial.spec, trial.number)
        row |= {"long_loss": quality.loss, "info": quality.info}
    except EvaluationError as error:
        _log.warning("trial %d (%s) failed when promoted: %s", trial.number, trial.spec, error)
        row["reason"] = str(error)
    return study.remember(key, lambda: row)
