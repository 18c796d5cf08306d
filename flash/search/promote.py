"""Longer training of the best trials, to check that the ranking of the short training holds."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

from scipy import stats

from flash.arch import ArchSpec
from flash.errors import InputError
from flash.search.frontier import shortlist
from flash.search.loop import EvaluationError, frontier
from flash.search.objectives import Problem
from flash.search.quality import Quality
from flash.search.study import Study
from flash.search.trial import Trial

_log = logging.getLogger(__name__)


def promote(
    study: Study,
    problem: Problem,
    k: int,
    evaluate: Callable[[ArchSpec, int], Quality],
    tokens: int,
) -> dict[str, Any]:
    """Train the k best trials longer and compare their two rankings.

    With the schedule `wsd` each training continues from the checkpoint that its trial left, so only
    the further tokens cost time; the result is that of the longer training from the start. Any
    other schedule has ended and cannot be continued, so the training starts from the pruned
    weights. Finished results are stored with the study; a call after a kill continues with the next
    trial.

    Args:
        study: Storage of the trials and the results.
        problem: Objectives and reference point, which define the best trials.
        k: Number of trials to train.
        evaluate: Function (architecture, trial number) -> quality; trains for `tokens`.
        tokens: Length of the training [tokens]; part of the key of stored results.

    Returns:
        `trials` with both losses, their `kendall_tau` (None with fewer than two results), and the
        number of `pairs` and of those `swapped`, whose order changed.

    Raises:
        InputError: The study has no frontier yet.
    """
    front = frontier(study.trials(), problem)
    best = shortlist(front, problem, k)
    if not best:
        raise InputError(
            f"search.study={study.name}: expected trials within the reference point to promote; "
            "search first"
        )
    rows = [_result(study, trial, evaluate, tokens) for trial in best]
    return {"tokens": tokens, "trials": rows, **compare(rows)}


def compare(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute the rank correlation of `loss` and `long_loss`, and count the discordant pairs."""
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
