"""Early stopping of trials that will not reach the frontier, with a bounded error probability.

All trials see the same batches in the same order, so training losses at the same point of a run are
comparable between architectures. The final held-out loss of a running trial is predicted from its
training loss so far by a linear regression in logarithms, fitted to the complete trials. A trial is
pruned when its final loss is unlikely to be lower than that of some complete trial with no higher
costs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from flash.search.objectives import Problem
from flash.search.trial import Trial
from flash.training.loss_curve import Curve

RUNGS = (0.25, 0.5, 0.75)
"""Shares of a training after which a trial may be pruned."""
MIN_TRIALS = 8
"""Number of complete trials that the regression needs."""


class TrialPruned(Exception):
    """Raised to end a trial that is unlikely to reach the frontier.

    Attributes:
        estimate: Predicted final loss [nats a token].
        chance: Probability that the trial would have reached the frontier.
        info: Further facts that the evaluation adds, as plain JSON values.
    """

    def __init__(self, estimate: float, chance: float, curve: Curve) -> None:
        super().__init__(
            f"after {len(curve.losses) / curve.parts:.0%} its final loss is predicted at "
            f"{estimate:.3f}; its chance of reaching the frontier is {chance:.2g}"
        )
        self.estimate, self.chance = estimate, chance
        self.info: dict[str, Any] = {}


@dataclass(frozen=True)
class LossPrediction:
    """Student's t distribution of the logarithm of a final loss.

    Attributes:
        mean: Location of the distribution.
        scale: Scale of the distribution.
        dof: Degrees of freedom.
    """

    mean: float
    scale: float
    dof: int

    @classmethod
    def of(cls, partial: Sequence[float], final: Sequence[float], now: float) -> "LossPrediction":
        """Fit a least-squares line in logarithms and predict one trial.

        Args:
            partial: Training losses of complete trials at this point [nats a token].
            final: Final held-out losses of the same trials [nats a token].
            now: Training loss of the running trial at this point [nats a token].
        """
        x, y = np.log(partial), np.log(final)
        spread = float(((x - x.mean()) ** 2).sum())
        slope = float((x - x.mean()) @ y) / spread if spread > 0 else 0.0
        away = math.log(now) - float(x.mean())
        residuals = y - y.mean() - slope * (x - x.mean())
        dof = len(x) - 2
        variance = float(residuals @ residuals) / dof
        further = away**2 / spread if spread > 0 else 0.0
        scale = math.sqrt(variance * (1 + 1 / len(x) + further))
        return cls(float(y.mean()) + slope * away, scale, dof)

    def probability_below(self, loss: float) -> float:
        """Return the probability that the final loss is lower than `loss`."""
        if self.scale == 0:
            return float(self.mean < math.log(loss))
        return float(stats.t.cdf((math.log(loss) - self.mean) / self.scale, self.dof))


def at_rung(curve: Curve) -> bool:
    """Return True at those parts of a training after which a trial may be pruned."""
    return len(curve.losses) in {round(rung * curve.parts) for rung in RUNGS} - {curve.parts}


def maybe_prune(
    trial: Trial, curve: Curve, trials: Sequence[Trial], problem: Problem, error: float
) -> None:
    """Prune a running trial that is unlikely to reach the frontier.

    Args:
        trial: Running trial.
        curve: Training loss of the trial so far.
        trials: All trials of the study.
        problem: Objectives and reference point.
        error: Greatest probability of pruning a trial that would have reached the frontier, over
            all `RUNGS` together; 0 disables pruning.

    Raises:
        TrialPruned: The probability of reaching the frontier is too low.
    """
    if error <= 0 or not at_rung(curve):
        return
    done = len(curve.losses)
    known = [
        (t.curve[done - 1], t.loss)
        for t in trials
        if t.loss is not None and len(t.curve) == curve.parts
    ]
    if len(known) < MIN_TRIALS:
        return
    partial, final = zip(*known, strict=True)
    prediction = LossPrediction.of(partial, final, curve.losses[-1])
    keys = problem.known_keys
    rivals = [
        t.loss
        for t in trials
        if t.loss is not None
        and problem.is_feasible(t.costs)
        and all(t.costs[key] <= trial.costs[key] for key in keys)
    ]
    chance = prediction.probability_below(min([problem.reference[0], *rivals]))
    if chance < error / len(RUNGS):
        raise TrialPruned(math.exp(prediction.mean), chance, curve)
