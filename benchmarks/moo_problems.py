"""Sampler of flash.search compared with BoTorch's published loop, on BoTorch's test problems.

A problem is a fixed set of 1,024 scrambled Sobol points, all of which compete in every proposal.
One objective is the unknown loss, the other is known beforehand, as latency is in a search:

- `branin`: BraninCurrin with Branin unknown and Currin known; `currin`: the reverse.
- `dtlz2`: DTLZ2 of 6 variables and 2 objectives, the first unknown.
- `..._noisy`: the unknown objective is observed with Gaussian noise of 5 % of its range.

Reference points are those of BoTorch. Our model takes logarithms, so the unknown objective is
shifted to make the greatest value of the set three times the least, similar to losses; only noise
of ten standard deviations would make an observation negative. (BoTorch's models standardize, so the
shift does not affect them.) All methods of a seed see the same noise, start from the same 2 (d + 1)
members and add batches of 4. Methods:

- `flash`: the surrogate and the acquisition function of flash.search.
- `botorch`: the loop of BoTorch's tutorial "Noisy, parallel, multi-objective BO": a Gaussian
  process with known noise for each objective, and qNEHVI maximized greedily over the set.
- `botorch_known`: the same with the knowledge of our sampler: the second objective is known, the
  noise is not.
- `random`: random draws from the set.

Metrics:

- `hypervolume_share_16`, `_24` and `_32`: hypervolume after that many evaluations, by values
  without noise, as a share of that of the whole set (medians over 20 seeds; the spread is the
  interquartile range). After 48 evaluations it is 99 % everywhere.
- `ask_s`: seconds of a proposal.
- `lead_16`, `_24` and `_32`, for `flash` only: its share minus that of `botorch_known` with the
  same seed.

`python benchmarks/moo_problems.py [CASE ...]` prints the results; without cases it also keeps them.
A case is `<problem>/<method>`.
"""

import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from botorch.acquisition.multi_objective.monte_carlo import qNoisyExpectedHypervolumeImprovement
from botorch.exceptions.warnings import NumericsWarning, OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelList, ModelListGP, SingleTaskGP
from botorch.models.deterministic import GenericDeterministicModel
from botorch.optim import optimize_acqf_discrete
from botorch.sampling import ListSampler, MCSampler, SobolQMCNormalSampler
from botorch.sampling.index_sampler import IndexSampler
from botorch.test_functions.base import MultiObjectiveTestProblem
from botorch.test_functions.multi_objective import DTLZ2, BraninCurrin
from botorch.utils.sampling import draw_sobol_samples, manual_seed
from gpytorch.mlls import ExactMarginalLogLikelihood, SumMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning
from numpy.typing import NDArray
from record import SMOKE, Recorder

from flash.progress import progress
from flash.search.acquisition import greedy_batch
from flash.search.pareto import hypervolume
from flash.search.surrogate import Observations, draw

SEEDS, POINTS, BATCH, BUDGETS = (1, 64, 16, (15, 16)) if SMOKE else (20, 1024, 4, (16, 24, 32))
NOISE = 0.05
"""Standard deviation of the noise, as a share of the range."""
NO_NOISE = 1e-3
"""Noise level given to BoTorch for problems without noise, as a share of the range, which keeps
matrices regular."""
MC_SAMPLES = 16 if SMOKE else 128
"""Draws of qNEHVI, as in BoTorch's tutorial."""


class Problem:
    """Test problem on a fixed set; columns are the unknown, then the known objective."""

    def __init__(
        self, function: MultiObjectiveTestProblem, unknown: int = 0, noise: float = 0.0
    ) -> None:
        self.function, self.order = function, [unknown, 1 - unknown]
        self.points = draw_sobol_samples(function.bounds, n=POINTS, q=1, seed=0).squeeze(1)
        values = function(self.points)[:, self.order].numpy()
        sizes = np.ptp(values, axis=0)
        shift = np.array([sizes[0] / 2 - values[:, 0].min(), 0.0])
        self.values: NDArray[np.float64] = values + shift
        self.reference = tuple((function.ref_point[self.order].numpy() + shift).tolist())
        self.noises = sizes * [noise, 0.0]
        self.noises_told = sizes * [max(noise, NO_NOISE), NO_NOISE]
        self.volume = self.hypervolume(list(range(POINTS)))

    def known(self, points: torch.Tensor) -> torch.Tensor:
        """Compute the known objective of any points, shape `(..., 1)`."""
        return self.function(points)[..., self.order[1:]]

    def observations(self, seed: int) -> NDArray[np.float64]:
        """Draw the noisy observation of every point for one seed."""
        rng = np.random.default_rng((seed, 1))
        return self.values + rng.normal(size=self.values.shape) * self.noises

    def hypervolume(self, members: list[int]) -> float:
        return hypervolume(self.values[members], self.reference)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "branin": lambda: Problem(BraninCurrin()),
    "branin_noisy": lambda: Problem(BraninCurrin(), noise=NOISE),
    "currin": lambda: Problem(BraninCurrin(), unknown=1),
    "dtlz2": lambda: Problem(DTLZ2(dim=6, num_objectives=2)),
    "dtlz2_noisy": lambda: Problem(DTLZ2(dim=6, num_objectives=2), noise=NOISE),
}

Ask = Callable[[Problem, NDArray[np.float64], list[int], int, int], list[int]]
"""Function (problem, observations, evaluated members, n, seed) -> n further members of the set. It
may read the unknown objective of evaluated members only."""


def ask_flash(
    problem: Problem, seen: NDArray[np.float64], done: list[int], n: int, seed: int
) -> list[int]:
    order = np.concatenate([done, _left(done)])
    points = problem.points.numpy()[order]
    draws = draw(points[: len(done)], Observations(seen[done, 0]), points[len(done) :], seed)
    chosen = greedy_batch(draws[None], problem.values[order, 1:], len(done), n, problem.reference)
    return order[chosen].tolist()


def ask_botorch(
    problem: Problem, seen: NDArray[np.float64], done: list[int], n: int, seed: int
) -> list[int]:
    targets = -torch.from_numpy(seen[done])  # BoTorch maximizes
    noises = torch.from_numpy(problem.noises_told**2).expand_as(targets)
    model = ModelListGP(*[
        SingleTaskGP(problem.points[done], targets[:, [i]], noises[:, [i]]) for i in (0, 1)
    ])
    fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
    sampler = SobolQMCNormalSampler(torch.Size([MC_SAMPLES]), seed=seed)
    return _greatest_nehvi(model, sampler, problem, done, n)


def ask_botorch_known(
    problem: Problem, seen: NDArray[np.float64], done: list[int], n: int, seed: int
) -> list[int]:
    model = SingleTaskGP(problem.points[done], -torch.from_numpy(seen[done, :1]))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    known = GenericDeterministicModel(lambda points: -problem.known(points))
    shape = torch.Size([MC_SAMPLES])
    sampler = ListSampler(SobolQMCNormalSampler(shape, seed=seed), IndexSampler(shape, seed=seed))
    return _greatest_nehvi(ModelList(model, known), sampler, problem, done, n)


def _greatest_nehvi(
    model: ModelList, sampler: MCSampler, problem: Problem, done: list[int], n: int
) -> list[int]:
    # Not qLogNEHVI: its smoothed logarithm serves gradients, of which a finite set has
    # no use, and it compiles C++ on first use.
    acquisition = qNoisyExpectedHypervolumeImprovement(
        model=model,
        ref_point=[-value for value in problem.reference],
        X_baseline=problem.points[done],
        sampler=sampler,
        prune_baseline=True,
    )
    chosen, _ = optimize_acqf_discrete(acquisition, n, problem.points[_left(done)])
    return [int((problem.points == point).all(dim=1).nonzero()) for point in chosen]


def ask_random(
    problem: Problem, seen: NDArray[np.float64], done: list[int], n: int, seed: int
) -> list[int]:
    rng = np.random.default_rng((seed, 2, len(done)))
    return rng.choice(_left(done), n, replace=False).tolist()


METHODS: dict[str, Ask] = {
    "flash": ask_flash,
    "botorch": ask_botorch,
    "botorch_known": ask_botorch_known,
    "random": ask_random,
}


def _left(done: list[int]) -> NDArray[np.int64]:
    return np.setdiff1d(np.arange(POINTS), done)


def run(problem: Problem, ask: Ask, seed: int) -> tuple[list[int], list[float]]:
    """Run a method; return the evaluated members in order and the time of each proposal [s]."""
    seen = problem.observations(seed)
    start = 2 * (problem.function.dim + 1)
    done = np.random.default_rng((seed, 0)).choice(POINTS, start, replace=False).tolist()
    times = []
    while len(done) < BUDGETS[-1]:
        began = time.perf_counter()
        with manual_seed(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericsWarning)  # advises qLogNEHVI
            warnings.simplefilter("ignore", NumericalWarning)
            warnings.simplefilter("ignore", OptimizationWarning)
            done += ask(problem, seen, done, min(BATCH, BUDGETS[-1] - len(done)), seed)
        times.append(time.perf_counter() - began)
    return done, times


def main() -> None:
    every = [f"{problem}/{method}" for problem in PROBLEMS for method in METHODS]
    cases = sys.argv[1:] or every
    record = Recorder("moo_problems")
    shares: dict[tuple[str, int], NDArray[np.float64]] = {}
    for case in cases:
        name, method = case.split("/")
        problem = PROBLEMS[name]()
        runs = [run(problem, METHODS[method], seed) for seed in progress(range(SEEDS), case)]
        for budget in BUDGETS:
            volumes = [problem.hypervolume(done[:budget]) for done, _ in runs]
            shares[case, budget] = np.array(volumes) / problem.volume
            record.add(case, f"hypervolume_share_{budget}", shares[case, budget].tolist(), "share")
        record.add(case, "ask_s", [seconds for _, times in runs for seconds in times], "s")
    for name in PROBLEMS:
        ours, theirs = f"{name}/flash", f"{name}/botorch_known"
        if ours in cases and theirs in cases:
            for budget in BUDGETS:
                lead = shares[ours, budget] - shares[theirs, budget]
                record.add(ours, f"lead_{budget}", lead.tolist(), "share")
    if cases == every:
        record.close()


if __name__ == "__main__":
    main()
