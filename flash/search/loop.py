"""The search loop: propose a batch, evaluate it, record each result at once, repeat."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flash.arch import ArchSpec, SearchSpace
from flash.progress import progress_bar
from flash.search.pareto import hypervolume, non_dominated
from flash.search.sampler import Latency, propose
from flash.search.settings import SearchSettings
from flash.search.study import Study, Trial

_log = logging.getLogger(__name__)


class EvaluationError(Exception):
    """A candidate cannot be evaluated (it diverged, say): its trial fails, the search goes on."""


@dataclass(frozen=True)
class Quality:
    """What the evaluation of one candidate found."""

    loss: float
    """Held-out loss [nats a token]."""
    info: dict[str, Any] = field(default_factory=dict)
    """Anything worth keeping, as plain JSON values."""


Evaluate = Callable[[ArchSpec, int], Quality]
"""(architecture, trial number) -> quality. The number is the same when a trial starts again."""


def search(
    study: Study,
    space: SearchSpace,
    evaluate: Evaluate,
    latency: Latency,
    settings: SearchSettings,
    *,
    reference: tuple[float, float],
    seed: int,
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Run the study until `settings.trials` candidates are complete or failed.

    May be interrupted at any point, by an exception or by a kill, and called again: the trials
    that remain of a batch come next, then the same proposals as if nothing had happened.

    Args:
        study: Holds all state.
        space: Where candidates come from.
        evaluate: May raise `EvaluationError`; any other exception stops the search.
        latency: Predicted latency [ms].
        settings: Sampler and sizes.
        reference: Worst acceptable (loss, latency in ms), `settings.reference(...)`.
        seed: Fixes all proposals.
        on_trial: Called with every trial that finishes.

    Returns:
        All trials of the study in order of their numbers.
    """
    study.recover()

    def plan(trials: Sequence[Trial], n: int) -> list[ArchSpec]:
        return propose(
            space, trials, n, latency=latency, reference=reference, settings=settings, seed=seed
        )

    with progress_bar("search", settings.trials, unit="trial") as bar:
        bar.initial = bar.n = sum(trial.finished for trial in study.trials())
        while _fill_queue(study, space, plan, latency, settings):
            trial = study.start()
            if trial is None:
                break
            finished = _evaluate(study, trial, evaluate)
            bar.update()
            if on_trial is not None:
                on_trial(finished)
    return study.trials()


def frontier(trials: Sequence[Trial]) -> list[Trial]:
    """The complete trials that no other beats in both loss and latency, fastest first."""
    complete = [trial for trial in trials if trial.complete]
    mask = non_dominated([trial.point for trial in complete])
    return sorted(
        (trial for trial, keep in zip(complete, mask, strict=True) if keep),
        key=lambda trial: trial.latency_ms,
    )


def hypervolume_history(trials: Sequence[Trial], reference: tuple[float, float]) -> list[float]:
    """Hypervolume [nats x ms] after each finished trial, in order of the trials' numbers."""
    history: list[float] = []
    points: list[tuple[float, float]] = []
    for trial in trials:
        if trial.complete:
            points.append(trial.point)
        if trial.finished:
            history.append(hypervolume(points, reference))
    return history


def _fill_queue(
    study: Study,
    space: SearchSpace,
    plan: Callable[[Sequence[Trial], int], list[ArchSpec]],
    latency: Latency,
    settings: SearchSettings,
) -> bool:
    """Make sure that the queue holds a trial; False when the search is over."""
    trials = study.trials()
    if trials:
        first, size = trials[-1].batch
        if first + size > len(trials):
            # Killed while it was queueing a batch: the same proposal again holds the missing rest.
            specs = plan(trials[:first], size)[len(trials) - first :]
            study.enqueue(space, specs, latency(specs), (first, size))
            return True
    if not all(trial.finished for trial in trials):
        return True
    wanted = min(
        settings.batch if trials else settings.startup_trials, settings.trials - len(trials)
    )
    if wanted <= 0:
        return False
    specs = plan(trials, wanted)
    if not specs:
        _log.warning("the space holds no more architectures; %d trials are all", len(trials))
        return False
    study.enqueue(space, specs, latency(specs), (len(trials), len(specs)))
    return True


def _evaluate(study: Study, trial: Trial, evaluate: Evaluate) -> Trial:
    """Evaluate one trial and record the outcome.

    Raises:
        KeyboardInterrupt: As it came; the trial is back in the queue.
    """
    try:
        quality = evaluate(trial.spec, trial.number)
    except EvaluationError as error:
        _log.warning("trial %d (%s) failed: %s", trial.number, trial.spec, error)
        return study.fail(trial, str(error))
    except KeyboardInterrupt:
        study.requeue(trial)  # asked for, so it is no crash of the trial's
        raise
    if not math.isfinite(quality.loss):
        _log.warning("trial %d (%s) failed: its loss is %s", trial.number, trial.spec, quality.loss)
        return study.fail(trial, f"the loss is {quality.loss}")
    return study.complete(trial, quality.loss, quality.info)
