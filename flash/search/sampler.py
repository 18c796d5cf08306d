"""Stage 2 of the search: propose the candidates that should widen the frontier most.

Quality is learned by a Gaussian process from the trials so far; latency is the known function that
stage 1 left behind, so it is never modelled again. The acquisition is NEHVI (Sec. 3.5).
Candidates are only ever chosen from a pool of members of the space: nothing is rounded or repaired.

A proposal is a pure function of (seed, trials so far, settings); hence a resumed search proposes
what an undisturbed one would.
"""

import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from botorch.exceptions.errors import ModelFittingError
from botorch.exceptions.warnings import OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from botorch.sampling import SobolQMCNormalSampler
from botorch.utils.sampling import manual_seed
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from numpy.typing import NDArray

from flash.arch import ArchSpec, Attention, SearchSpace
from flash.search.pareto import non_dominated
from flash.search.settings import Sampler, SearchSettings
from flash.search.study import Trial

_log = logging.getLogger(__name__)

Latency = Callable[[Sequence[ArchSpec]], NDArray[np.float64]]
"""Stage 1: architectures -> mean predicted latency of each [ms]."""

DEPTH_BINS = 4
"""Resolution at which the model sees where in the network a layer kind sits."""
FIT_TOLERANCE = 1e-6
"""Relative gain of the likelihood at which fitting stops; SciPy's default is ten times slower."""
MC_SAMPLES = 64
"""Draws of the loss surface that the expected improvement averages over."""


def propose(
    space: SearchSpace,
    trials: Sequence[Trial],
    n: int,
    *,
    latency: Latency,
    reference: tuple[float, float],
    settings: SearchSettings,
    seed: int,
) -> list[ArchSpec]:
    """Up to n architectures to evaluate next, none of them in `trials`; fewer when none are left.

    Args:
        space: Where candidates come from.
        trials: All trials so far; those that are not complete are only avoided.
        n: Candidates wanted.
        latency: Predicted latency [ms].
        reference: Worst acceptable (loss, latency in ms).
        settings: Sampler, sizes of the start-up design and of the pool.
        seed: Together with the number of trials it fixes every random choice.
    """
    rng = np.random.default_rng((seed, len(trials)))
    known = {trial.spec for trial in trials}
    complete = [trial for trial in trials if trial.complete]
    if not trials:
        # The largest member anchors the frontier's slow end, which no random draw would hit.
        return list(itertools.islice(_unique([_largest(space), *_fresh(space, rng, n, known)]), n))
    losses = {trial.loss for trial in complete}
    if settings.sampler is Sampler.random or len(losses) < 2:  # a constant teaches nothing
        return _fresh(space, rng, n, known)
    pool = _pool(space, rng, complete, known, settings.pool_size)
    if len(pool) <= n:
        return pool
    try:
        return _select(space, complete, pool, n, latency, reference, int(rng.integers(2**31)))
    except (ModelFittingError, NotPSDError, NanError) as error:
        _log.warning("the loss model could not be fitted (%s); this batch is random", error)
        return _fresh(space, rng, n, known)


def features(space: SearchSpace, spec: ArchSpec) -> NDArray[np.float64]:
    """`spec` as the loss model sees it, in the unit cube; shape `(3 + DEPTH_BINS * 2 + 1,)`.

    - Depth and the logarithms of both widths: loss follows powers of the sizes, so that a step
      matters more at the narrow end.
    - For each efficient kind its share among the layers near each of a few relative depths, by
      linear interpolation. Layers do unlike jobs early and late in the network; relative
      position makes specs of unequal depth comparable, and a handful of bins can be learned from
      tens of trials where a one-hot of every slot could not. Full attention is the rest.
    - Share of neighbouring layers that are both efficient, since runs of them hurt (Sec. 3.5).
    """
    sizes = [
        _unit(spec.num_layers, space.depths),
        _unit(np.log(spec.model_dim), np.log(space.model_dims)),
        _unit(np.log(spec.ffn_dim), np.log(space.ffn_dims)),
    ]
    positions = np.linspace(0, DEPTH_BINS - 1, spec.num_layers)
    weights = np.maximum(0, 1 - abs(positions[:, None] - np.arange(DEPTH_BINS)))
    weights /= weights.sum(axis=0).clip(min=1e-9)
    shares = [
        np.array([layer is kind for layer in spec.layer_types], dtype=float) @ weights
        for kind in (Attention.sliding_attention, Attention.skip_attention)
    ]
    efficient = [layer.efficient for layer in spec.layer_types]
    pairs = [a and b for a, b in itertools.pairwise(efficient)]
    return np.concatenate([sizes, *shares, [float(np.mean(pairs)) if pairs else 0.0]])


def _unit(value: float, choices: Sequence[float] | NDArray[np.float64]) -> float:
    low, high = choices[0], choices[-1]
    return float((value - low) / (high - low)) if high > low else 0.0


def _select(
    space: SearchSpace,
    complete: Sequence[Trial],
    pool: Sequence[ArchSpec],
    n: int,
    latency: Latency,
    reference: tuple[float, float],
    seed: int,
) -> list[ArchSpec]:
    """The n members of the pool with the greatest joint expected hypervolume improvement."""
    losses = np.array([trial.loss for trial in complete], dtype=float)
    center, scale = losses.mean(), losses.std()
    observed = np.stack([features(space, trial.spec) for trial in complete])
    choices = np.stack([features(space, spec) for spec in pool])
    with manual_seed(seed), warnings.catch_warnings():
        # More jitter and another start are BoTorch's ways to succeed; when they fail, it raises.
        warnings.simplefilter("ignore", NumericalWarning)
        warnings.simplefilter("ignore", OptimizationWarning)
        model = fit_loss_model(observed, (losses - center) / scale)
        both = torch.from_numpy(np.concatenate([observed, choices]))
        sampler = SobolQMCNormalSampler(torch.Size([MC_SAMPLES]), seed=seed)
        with torch.no_grad():
            draws = sampler(model.posterior(both)).squeeze(-1).numpy() * scale + center
    latencies = np.concatenate([[trial.latency_ms for trial in complete], latency(pool)])
    chosen = greedy_batch(draws, latencies, len(complete), n, reference)
    return [pool[i - len(complete)] for i in chosen]


def fit_loss_model(inputs: NDArray[np.float64], losses: NDArray[np.float64]) -> SingleTaskGP:
    """A Gaussian process of standardised losses over `features`, by maximum a posteriori."""
    model = SingleTaskGP(
        torch.from_numpy(inputs),
        torch.from_numpy(losses).unsqueeze(-1),
        # Matern: loss surfaces are less smooth than an RBF assumes. ARD: each feature has its own
        # length, so that those that do not matter fade; the prior suits any number of them.
        covar_module=get_covar_module_with_dim_scaled_prior(inputs.shape[-1], use_rbf_kernel=False),
        outcome_transform=None,
    )
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"ftol": FIT_TOLERANCE}})
    return model


def greedy_batch(
    draws: NDArray[np.float64],
    latencies: NDArray[np.float64],
    num_observed: int,
    n: int,
    reference: tuple[float, float],
) -> list[int]:
    """Indices of the n points with the greatest expected hypervolume improvement, best first.

    This is qNEHVI (arXiv:2105.08195) by sequential conditioning over a discrete pool. As latency is
    known, every draw's frontier is a staircase over the same latencies, and a point's improvement
    is an exact integral: the area between the staircase and the point's loss, from the point's
    latency up to the reference. BoTorch's general version needs a box decomposition for each draw
    and, since 0.18, compiles C++ on first use behind a lock that a killed process leaves behind.

    Args:
        draws: Joint posterior draws of the loss, shape `(draws, points)`: observed points, which
            are noisy and hence drawn too, then the pool.
        latencies: Latency of every point [ms].
        num_observed: How many of the points are observed.
        n: Points wanted.
        reference: Worst acceptable (loss, latency in ms).
    """
    worst_loss, worst_ms = reference
    chosen: list[int] = []
    pool = np.arange(num_observed, draws.shape[1])
    for _ in range(min(n, len(pool))):
        known = np.array([*range(num_observed), *chosen], dtype=int)
        known = known[np.argsort(latencies[known], kind="stable")]
        starts = np.minimum(latencies[known], worst_ms)
        # Step j of the staircase spans starts[j]..starts[j + 1]; before the first, all is open.
        edges = np.concatenate([[-np.inf], starts, [worst_ms]])
        steps = np.minimum.accumulate(
            np.column_stack([np.full(len(draws), worst_loss), draws[:, known]]), axis=1
        )
        gain = np.zeros(len(pool))
        for j in range(steps.shape[1]):
            widths = (edges[j + 1] - np.maximum(edges[j], latencies[pool])).clip(min=0)
            right = widths > 0
            heights = (steps[:, j, None] - draws[:, pool[right]]).clip(min=0)
            gain[right] += widths[right] * heights.mean(axis=0)
        best = int(gain.argmax())
        chosen.append(int(pool[best]))
        pool = np.delete(pool, best)
    return chosen


def _pool(
    space: SearchSpace,
    rng: np.random.Generator,
    complete: Sequence[Trial],
    known: set[ArchSpec],
    size: int,
) -> list[ArchSpec]:
    """Different unknown specs: near the frontier one and two steps away, the rest drawn afresh."""
    points = [trial.point for trial in complete]
    parents = [t.spec for t, keep in zip(complete, non_dominated(points), strict=True) if keep]
    near = _unique(spec for parent in parents for spec in space.neighbours(parent))
    near = _draw(rng, [spec for spec in near if spec not in known], size // 2)
    # Expanding every neighbour would cost seconds; a few show the same directions.
    far = _unique(
        spec for parent in _draw(rng, near, 2 * len(parents)) for spec in space.neighbours(parent)
    )
    taken = known | set(near)
    far = _draw(rng, [spec for spec in far if spec not in taken], size // 4)
    taken |= set(far)
    return near + far + _fresh(space, rng, size - len(near) - len(far), taken)


def _fresh(
    space: SearchSpace, rng: np.random.Generator, n: int, known: set[ArchSpec]
) -> list[ArchSpec]:
    """Up to n different stratified draws that are not known; fewer when the space runs dry."""
    found: dict[ArchSpec, None] = {}
    dry = 0
    while len(found) < n and dry < 10:
        drawn = space.stratified(rng, max(n - len(found), 16))
        new = [spec for spec in drawn if spec not in known and spec not in found]
        found.update(dict.fromkeys(new[: n - len(found)]))
        dry = 0 if new else dry + 1
    return list(found)


def _largest(space: SearchSpace) -> ArchSpec:
    return space.make(
        space.model_dims[-1],
        space.ffn_dims[-1],
        (Attention.full_attention,) * space.depths[-1],
    )


def _unique(specs: Iterable[ArchSpec]) -> list[ArchSpec]:
    return list(dict.fromkeys(specs))


def _draw(rng: np.random.Generator, specs: Sequence[ArchSpec], n: int) -> list[ArchSpec]:
    """Up to n of the specs at random."""
    return [specs[int(i)] for i in rng.permutation(len(specs))[:n]]
