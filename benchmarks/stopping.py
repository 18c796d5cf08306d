"""Early stopping of trials (flash.search.pruner) on real curves: savings and error rate.

The benchmark replays the trainings of benchmarks/data/principles.jsonl as searches in random
orders. The pruner decides on each trial at its rungs, given the trials before it; the final loss is
known, since no trial is really stopped. Costs are counted work (benchmarks/tabular.py). Cases are
values of `search.stop_error`. `wrongly_stopped` is the share of trials on the frontier of their
time that the pruner would have stopped (it must not exceed the setting), `tokens_saved` the share
of all training tokens, `stopped` the share of trials. Results are medians over the orders.
"""

import numpy as np
import principles
import rows
import tabular
from optuna.trial import TrialState
from record import SMOKE, Recorder

from flash.search.objectives import Objective, Problem
from flash.search.pruner import TrialPruned, maybe_prune
from flash.search.trial import Trial
from flash.training.loss_curve import Curve

ERRORS = (0.01, 0.05, 0.1, 0.2)
ORDERS = 2 if SMOKE else 200


def trials() -> list[Trial]:
    """Read the complete trials with their curves."""
    return [
        Trial(
            number=0,
            spec=row["spec"],
            costs=tabular.nominal_ms(row["spec"]),
            state=TrialState.COMPLETE,
            loss=row["loss"],
            extra={"curve": [[0, loss] for loss in row["curve"]]},
            batch=(0, 1),
        )
        for row in rows.read(principles.DATA)
        if row["start"] == "pruned" and row["tokens"] == principles.TOKENS
    ]


def ended_after(trial: Trial, before: list[Trial], problem: Problem, error: float) -> int | None:
    """Return the number of parts of the curve after which the pruner stops a trial."""
    parts = len(trial.curve)
    for done in range(1, parts + 1):
        try:
            maybe_prune(trial, Curve(tuple(trial.curve[:done]), parts), before, problem, error)
        except TrialPruned:
            return done
    return None


def replay(order: list[Trial], problem: Problem, error: float) -> tuple[float, float, float]:
    """Return the shares of good trials stopped, of tokens saved, and of trials stopped."""
    good = wrong = stopped = 0
    saved = 0.0
    for i, trial in enumerate(order):
        assert trial.loss is not None
        cost = trial.costs["prefill_ms"]
        rivals = [t.loss for t in order[:i] if t.loss and t.costs["prefill_ms"] <= cost]
        reaches = trial.loss < min([problem.reference[0], *rivals])
        after = ended_after(trial, order[:i], problem, error)
        good, wrong = good + reaches, wrong + (reaches and after is not None)
        if after is not None:
            stopped, saved = stopped + 1, saved + 1 - after / len(trial.curve)
    return wrong / max(good, 1), saved / len(order), stopped / len(order)


def main() -> None:
    record, known = Recorder("stopping"), trials()
    slowest = max(known, key=lambda trial: trial.costs["prefill_ms"])
    problem = Problem(
        costs=lambda specs: {},
        objectives=(Objective.quality, Objective.prefill),
        reference=(min(t.loss for t in known if t.loss) + 1.0, slowest.costs["prefill_ms"]),
        limits={},
    )
    for error in ERRORS:
        rng, results = np.random.default_rng(0), []
        for _ in range(ORDERS):
            order = [known[int(i)] for i in rng.permutation(len(known))]
            results.append(replay(order, problem, error))
        for name, values in zip(
            ("wrongly_stopped", "tokens_saved", "stopped"), zip(*results, strict=True), strict=True
        ):
            record.add(f"stop_error_{error}", name, values, "share")
        mean = [float(np.mean([wrong for wrong, _, _ in results]))]
        record.add(f"stop_error_{error}", "wrongly_stopped_mean", mean, "share")
    record.add("curves", "trials", [len(known)], "trials")
    record.close()


if __name__ == "__main__":
    main()
