"""Stage 2 of the search: propose the candidates that should widen the frontier most.

Quality is learned by a Gaussian process from the trials so far; latency is the known function that
stage 1 left behind, so it is never modelled again. The acquisition is qLogNEHVI (Sec. 3.5).
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
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.exceptions.errors import ModelFittingError
from botorch.exceptions.warnings import OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelList, SingleTaskGP
from botorch.models.deterministic import GenericDeterministicModel
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from botorch.optim import optimize_acqf_discrete
from botorch.sampling.get_sampler import get_sampler
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
    """Up to n architectures to evaluate next, none of them among `trials`; fewer when none are left.

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
    return np.concatenate([sizes, *shares, [np.mean(pairs) if pairs else 0.0]])


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
    # One latency column follows the features: the deterministic model reads only it, the loss
    # model's kernel only the features. Both objectives are of order one, as BoTorch's smoothing
    # constants are absolute, and negated, as it maximises.
    observed = _inputs(
        space, [t.spec for t in complete], [t.latency_ms for t in complete], reference[1]
    )
    choices = _inputs(space, pool, latency(pool), reference[1])
    target = torch.from_numpy((center - losses) / scale).unsqueeze(-1)
    with manual_seed(seed), warnings.catch_warnings():
        # Widened jitter and a retried optimiser step are BoTorch's ways to succeed; failure raises.
        warnings.simplefilter("ignore", NumericalWarning)
        warnings.simplefilter("ignore", OptimizationWarning)
        model = ModelList(
            _fit_loss_model(observed, target), GenericDeterministicModel(lambda x: -x[..., -1:])
        )
        sampler = get_sampler(model.posterior(observed), torch.Size([MC_SAMPLES]), seed=seed)
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            model,
            ref_point=[(center - reference[0]) / scale, -1.0],
            X_baseline=observed,
            sampler=sampler,
            prune_baseline=True,
        )
        chosen, _ = optimize_acqf_discrete(acquisition, n, choices, return_acq_values=False)
    picked: dict[ArchSpec, None] = {}
    for row in chosen:
        # Specs that share features and latency are alike to the model; each is picked once.
        same = torch.nonzero((choices == row).all(dim=-1)).flatten().tolist()
        picked[next(pool[i] for i in same if pool[i] not in picked)] = None
    return list(picked)


def _fit_loss_model(inputs: torch.Tensor, target: torch.Tensor) -> SingleTaskGP:
    num_features = inputs.shape[-1] - 1
    model = SingleTaskGP(
        inputs,
        target,
        # Matern: loss surfaces are less smooth than an RBF assumes. ARD: each feature gets its own
        # length, so that those that do not matter fade; the prior suits any number of them.
        covar_module=get_covar_module_with_dim_scaled_prior(
            num_features, use_rbf_kernel=False, active_dims=range(num_features)
        ),
        outcome_transform=None,
    )
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def _inputs(
    space: SearchSpace,
    specs: Sequence[ArchSpec],
    latencies_ms: Sequence[float] | NDArray[np.float64],
    scale_ms: float,
) -> torch.Tensor:
    rows = np.stack([features(space, spec) for spec in specs])
    column = np.asarray(latencies_ms, dtype=float)[:, None] / scale_ms
    return torch.from_numpy(np.concatenate([rows, column], axis=1))


def _pool(
    space: SearchSpace,
    rng: np.random.Generator,
    complete: Sequence[Trial],
    known: set[ArchSpec],
    size: int,
) -> list[ArchSpec]:
    """Different unknown specs: near the frontier one and two steps away, the rest drawn afresh."""
    points = [(trial.loss, trial.latency_ms) for trial in complete]
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
