"""Ending trials that will not reach the frontier, with a stated chance of being wrong.

All trials see the same batches in the same order, so that training losses at the same point of a
run compare well between architectures. The final held-out loss of a running trial is predicted from
its training loss so far by a line in logarithms, fitted to the complete trials. Where even the best
that the prediction allows for is worse than what some complete trial has at no higher costs, the
trial is hopeless.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from flash.search.objectives import Problem
from flash.search.study import Trial
from flash.training.loss_curve import Curve

RUNGS = (0.25, 0.5, 0.75)
"""Shares of a run after which it is judged."""
LEAST = 8
"""Complete trials from which the line can be fitted."""


class TrialPruned(Exception):
    """A trial is not worth its further training.

    Attributes:
        estimate: Predicted final loss [nats a token].
        chance: That it would have reached the frontier all the same.
        info: What the evaluation adds, as plain JSON values.
    """

    def __init__(self, estimate: float, chance: float, curve: Curve) -> None:
        super().__init__(
            f"after {len(curve.losses) / curve.parts:.0%} its final loss is predicted at "
            f"{estimate:.3f}; its chance of reaching the frontier is {chance:.2g}"
        )
        self.estimate, self.chance = estimate, chance
        self.info: dict[str, Any] = {}


@dataclass(frozen=True)
class Forecast:
    """A prediction of the logarithm of a final loss: Student's t.

    Attributes:
        mean: Centre.
        scale: Scale.
        dof: Degrees of freedom.
    """

    mean: float
    scale: float
    dof: int

    @classmethod
    def of(cls, partial: Sequence[float], final: Sequence[float], now: float) -> "Forecast":
        """By least squares in logarithms.

        Args:
            partial: Training losses of complete trials at this point of their runs.
            final: Their held-out losses.
            now: Training loss of the trial in question.
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

    def chance_below(self, loss: float) -> float:
        """Probability that the final loss is lower than this one."""
        if self.scale == 0:
            return float(self.mean < math.log(loss))
        return float(stats.t.cdf((math.log(loss) - self.mean) / self.scale, self.dof))


def judge(
    trial: Trial, curve: Curve, trials: Sequence[Trial], problem: Problem, error: float
) -> None:
    """End a trial that is hopeless.

    Args:
        trial: The running one.
        curve: Its training loss so far.
        trials: All of the study.
        problem: Objectives and reference point.
        error: The greatest chance at which a trial that would have reached the frontier may be
            ended, over all the times that it is judged; 0 ends none.

    Raises:
        Hopeless: It is.
    """
    done = len(curve.losses)
    if error <= 0 or done not in {round(rung * curve.parts) for rung in RUNGS} - {curve.parts}:
        return
    known = [
        (t.curve[done - 1], t.loss)
        for t in trials
        if t.loss is not None and len(t.curve) == curve.parts
    ]
    if len(known) < LEAST:
        return
    partial, final = zip(*known, strict=True)
    forecast = Forecast.of(partial, final, curve.losses[-1])
    keys = problem.known_keys
    rivals = [
        t.loss
        for t in trials
        if t.loss is not None and all(t.costs[key] <= trial.costs[key] for key in keys)
    ]
    chance = forecast.chance_below(min([problem.reference[0], *rivals]))
    if chance < error / len(RUNGS):
        raise TrialPruned(math.exp(forecast.mean), chance, curve)
