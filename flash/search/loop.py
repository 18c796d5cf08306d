"""Search loop: propose a batch, evaluate it, record each result at once, repeat."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from flash.arch import ArchSpec, SearchSpace
from flash.errors import is_stop
from flash.progress import progress_bar
from flash.search.objectives import Objective, Problem
from flash.search.pareto import hypervolume, non_dominated
from flash.search.pruner import TrialPruned, at_rung, maybe_prune
from flash.search.quality import Quality
from flash.search.sampler import check_limits, propose
from flash.search.settings import SearchSettings
from flash.search.study import Study
from flash.search.trial import Trial
from flash.training.loss_curve import Curve, Watch

_log = logging.getLogger(__name__)

_WAIT_S = 1.0
"""Pause between checks of the trials of other workers [s]."""


class EvaluationError(Exception):
    """Failure of one evaluation, such as divergence: the trial fails and the search continues."""


Evaluate = Callable[[ArchSpec, int, Watch], Quality]
"""Function (architecture, trial number, watch) -> quality. A restarted trial keeps its number. The
function passes the training loss so far to `watch`, which raises `TrialPruned` to end the trial."""


def search(
    study: Study,
    space: SearchSpace,
    evaluate: Evaluate,
    problem: Problem,
    settings: SearchSettings,
    *,
    seed: int,
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Work on the study until `settings.trials` trials are complete, stopped early or failed.

    The call may be interrupted at any point, by an exception or a kill, and repeated: it first
    evaluates the remaining trials of the batch, then makes the proposals of an uninterrupted
    search. Any number of processes may search at once. A worker without work waits for the trials
    of the others, in case one of them dies, so every worker returns with all trials finished.

    Args:
        study: Storage of all state.
        space: Search space.
        evaluate: May raise `EvaluationError`; any other exception stops this worker.
        problem: Objectives, limits and reference point.
        settings: Sampler, number of trials and batch sizes.
        seed: Seed that fixes all proposals.
        on_trial: Called with every trial that this worker finishes.

    Returns:
        All trials of the study in order of their numbers.

    Raises:
        InputError: No member of the space obeys the limits.
    """
    check_limits(space, problem, seed)
    exhausted = set[int]()
    with study.working(), progress_bar("search", settings.trials, unit="trial") as bar:
        while True:
            trial = _next_trial(study, space, problem, settings, seed, exhausted)
            if trial is not None:
                finished = _evaluate(study, trial, evaluate, problem, settings.stop_error)
                if on_trial is not None and finished.finished:  # not given to another worker
                    on_trial(finished)
            trials = study.trials()
            bar.n = sum(trial.finished for trial in trials)
            bar.refresh()
            if trial is None:
                if all(trial.finished for trial in trials):
                    return trials
                time.sleep(_WAIT_S)


def frontier(trials: Sequence[Trial], problem: Problem) -> list[Trial]:
    """Return the non-dominated complete trials within all limits, fastest first."""
    complete = [trial for trial in trials if trial.complete and problem.is_feasible(trial.costs)]
    mask = non_dominated([trial.point(problem.objectives) for trial in complete])
    return sorted(
        (trial for trial, keep in zip(complete, mask, strict=True) if keep),
        key=lambda trial: trial.costs[problem.headline],
    )


def rescore(trials: Sequence[Trial], problem: Problem) -> list[Trial]:
    """Return the trials with their costs recomputed for another problem."""
    specs = [trial.spec for trial in trials]
    costs = problem.costs(specs) if specs else {}
    return [
        replace(trial, costs={key: float(values[i]) for key, values in costs.items()})
        for i, trial in enumerate(trials)
    ]


def hypervolume_history(trials: Sequence[Trial], problem: Problem) -> list[float]:
    """Compute the hypervolume after each finished trial, in order of trial numbers."""
    history: list[float] = []
    reference = np.asarray(problem.reference)
    front, volume = np.empty((0, len(reference))), 0.0
    for trial in trials:
        if trial.complete and problem.is_feasible(trial.costs):
            point = np.asarray(trial.point(problem.objectives))
            beaten = (front <= point).all(axis=1).any()  # most points are, and change nothing
            if (point < reference).all() and not beaten:
                front = np.vstack([front, point])
                front = front[non_dominated(front)]
                volume = hypervolume(front, problem.reference)
        if trial.finished:
            history.append(volume)
    return history


def _next_trial(
    study: Study,
    space: SearchSpace,
    problem: Problem,
    settings: SearchSettings,
    seed: int,
    exhausted: set[int],
) -> Trial | None:
    """Start the first waiting trial; plan a batch if none waits. None if no trial is left.

    Args:
        study: Storage of all state.
        space: Search space.
        problem: Objectives, limits and reference point.
        settings: Sampler, number of trials and batch sizes.
        seed: Seed that fixes all proposals.
        exhausted: Numbers of trials after which no further candidate was found; may grow.
    """
    with study.lock():
        study.recover()
        study.enqueue(space)  # a kill may have followed a plan
        trial = study.start()
        if trial is None and _plan(study, space, problem, settings, seed, exhausted):
            study.enqueue(space)
            trial = study.start()
        return trial


def _plan(
    study: Study,
    space: SearchSpace,
    problem: Problem,
    settings: SearchSettings,
    seed: int,
    exhausted: set[int],
) -> bool:
    """Plan a batch; return False when the budget is spent or the space is exhausted."""
    trials = study.trials()
    wanted = min(
        settings.batch if trials else settings.startup_trials, settings.trials - len(trials)
    )
    if wanted <= 0 or len(trials) in exhausted:
        return False
    specs = propose(space, trials, wanted, problem=problem, settings=settings, seed=seed)
    if not specs:
        _log.warning("the space holds no more architectures; %d trials are all", len(trials))
        exhausted.add(len(trials))
        return False
    costs = {key: [float(v) for v in values] for key, values in problem.costs(specs).items()}
    study.plan(specs, costs, (len(trials), len(specs)))
    return True


def _evaluate(
    study: Study, trial: Trial, evaluate: Evaluate, problem: Problem, stop_error: float
) -> Trial:
    """Evaluate one trial and record its outcome.

    A trial that is stopped from outside returns to the queue. That is no crash of the trial, unlike
    any other exception, or the end of the process without one.
    """
    try:
        return _evaluated(study, trial, evaluate, problem, stop_error)
    except BaseException as error:
        if is_stop(error):
            study.requeue(trial)
        raise


def _evaluated(
    study: Study, trial: Trial, evaluate: Evaluate, problem: Problem, stop_error: float
) -> Trial:
    """Evaluate one trial and record its outcome, unless it raises an unforeseen exception."""

    def watch(curve: Curve) -> None:
        # The training loss tells little of the answers to a task.
        if stop_error > 0 and at_rung(curve) and problem.learned == (Objective.quality,):
            maybe_prune(trial, curve, study.trials(), problem, stop_error)

    try:
        with study.heartbeat(trial):
            quality = evaluate(trial.spec, trial.number, watch)
    except TrialPruned as pruned:
        info = {"estimate": pruned.estimate, "chance": pruned.chance, **pruned.info}
        return study.stop(trial, str(pruned), info)
    except EvaluationError as error:
        _log.warning("trial %d (%s) failed: %s", trial.number, trial.spec, error)
        return study.fail(trial, str(error))
    if not math.isfinite(quality.loss):
        _log.warning("trial %d (%s) failed: its loss is %s", trial.number, trial.spec, quality.loss)
        return study.fail(trial, f"the loss is {quality.loss}")
    return study.complete(trial, quality)
