"""Surrogate models of what training decides: a Gaussian process over architectures for each."""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from botorch.exceptions.warnings import OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from botorch.sampling import SobolQMCNormalSampler
from botorch.utils.sampling import manual_seed
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning
from numpy.typing import NDArray

from flash.arch import ArchSpec, Attention, SearchSpace, Variant

DEPTH_BINS = 8
"""Number of bins of relative depth in `features`. Trained on 50 and tested on 88 members of the
tabular benchmark (benchmarks/tabular.py), 4 bins gave 2.6 times the error of 8, and no larger
number was better."""
WIDTH_BINS = 4
"""Number of relative depths near which `features` averages FFN widths that differ by layer."""
FIT_TOLERANCE = 1e-6
"""Relative gain in likelihood at which fitting stops; SciPy's default takes ten times longer."""
MC_SAMPLES = 64
"""Posterior draws of the losses over which the expected improvement is averaged."""


def features(space: SearchSpace, spec: ArchSpec) -> NDArray[np.float64]:
    """Encode a spec as a vector in the unit cube, of `3 + DEPTH_BINS * 2 + 1` numbers or more.

    - Depth and the logarithms of both widths: loss follows powers of the sizes, so a step matters
      more at the narrow end.
    - Share of each efficient kind among the layers near each of `DEPTH_BINS` relative depths, by
      linear interpolation; full attention is the remainder. Early and late layers play different
      roles. Relative positions make specs of unequal depth comparable, and few bins can be learned
      from tens of trials: a one-hot encoding of every slot gave nearly twice the error.
    - Share of adjacent layers that are both efficient, since runs of them hurt (Sec. 3.5).
    - With an FFN width for each layer, the logarithm of the width near each of `WIDTH_BINS`
      relative depths, less their mean; with a choice of heads or vocabulary, the logarithms of
      their numbers.
    """
    sizes = [
        _unit(spec.num_layers, space.depths),
        _unit(np.log(spec.model_dim), np.log(space.model_dims)),
        _unit(np.log(spec.mean_ffn_dim), np.log(space.ffn_dims)),
    ]
    weights = _near(spec.num_layers, DEPTH_BINS)
    shares = [
        np.array([layer is kind for layer in spec.layer_types], dtype=float) @ weights
        for kind in (Attention.sliding_attention, Attention.skip_attention)
    ]
    efficient = [layer.efficient for layer in spec.layer_types]
    pairs = [a and b for a, b in itertools.pairwise(efficient)]
    runs = float(np.mean(pairs)) if pairs else 0.0
    return np.concatenate([sizes, *shares, [runs], *_wider_features(space, spec)])


def _wider_features(space: SearchSpace, spec: ArchSpec) -> list[NDArray[np.float64]]:
    """Encode what only wider spaces than the paper's choose."""
    found: list[NDArray[np.float64]] = []
    if space.per_layer:
        span = max(np.log(space.ffn_dims[-1] / space.ffn_dims[0]), 1e-9)
        logs = np.log(np.array(spec.ffn_dims) / spec.mean_ffn_dim) / span
        found.append(logs @ _near(spec.num_layers, WIDTH_BINS) / 2 + 0.5)
    for name, value in Variant.of(spec)._asdict().items():
        choices = np.unique([getattr(variant, name) for variant in space.variants])
        if len(choices) > 1:
            found.append(np.array([_unit(np.log(value), np.log(choices))]))
    return found


def _near(num_layers: int, bins: int) -> NDArray[np.float64]:
    """Weights of layers in means near evenly spaced relative depths, shape `(layers, bins)`."""
    positions = np.linspace(0, bins - 1, num_layers)
    weights = np.maximum(0, 1 - abs(positions[:, None] - np.arange(bins)))
    return weights / weights.sum(axis=0).clip(min=1e-9)


def _unit(value: float, choices: Sequence[float] | NDArray[np.float64]) -> float:
    low, high = choices[0], choices[-1]
    return float((value - low) / (high - low)) if high > low else 0.0


@dataclass(frozen=True)
class Observations:
    """Values of one objective of the evaluated architectures.

    Attributes:
        values: Noisy values.
        noise: Their standard errors; None if they are unknown, and learned.
        logarithmic: True to model the logarithm, as for a loss, which follows powers of the sizes;
            an error in percent, which may be 0, is modeled as it is.
    """

    values: NDArray[np.float64]
    noise: NDArray[np.float64] | None = None
    logarithmic: bool = True


def draw_values(
    space: SearchSpace,
    specs: Sequence[ArchSpec],
    observed: Sequence[Observations],
    others: Sequence[ArchSpec],
    seed: int,
) -> NDArray[np.float64]:
    """Draw objectives jointly from the posterior, given those of the evaluated specs.

    Args:
        space: Search space, which scales the features.
        specs: Evaluated architectures.
        observed: What is known of `specs`, for each objective.
        others: Architectures of which nothing is known.
        seed: Seed of the draws.

    Returns:
        Values of `specs`, then of `others`; shape `(objectives, MC_SAMPLES, specs + others)`.
    """
    rows = np.stack([features(space, spec) for spec in [*specs, *others]])
    return np.stack([
        draw(rows[: len(specs)], each, rows[len(specs) :], seed + i)
        for i, each in enumerate(observed)
    ])


def draw(
    points: NDArray[np.float64],
    observed: Observations,
    others: NDArray[np.float64],
    seed: int,
) -> NDArray[np.float64]:
    """Draw one objective as `draw_values` does, for points given by features in the unit cube.

    Args:
        points: Features of evaluated points, shape `(points, features)`.
        observed: Values of these points. Equal ones tell nothing, and are drawn as they are.
        others: Features of points of which nothing is known.
        seed: Seed of the draws.
    """
    values = np.log(observed.values) if observed.logarithmic else observed.values
    center, scale = values.mean(), values.std()
    if np.ptp(values) == 0:  # their deviation may be a rounding error
        return np.full((MC_SAMPLES, len(points) + len(others)), observed.values[0])
    variances = None if observed.noise is None else (observed.noise / scale) ** 2
    with manual_seed(seed), warnings.catch_warnings():
        # BoTorch warns when it adds jitter or restarts a fit; if that fails too, it raises.
        warnings.simplefilter("ignore", NumericalWarning)
        warnings.simplefilter("ignore", OptimizationWarning)
        model = fit_model(points, (values - center) / scale, variances)
        both = torch.from_numpy(np.concatenate([points, others]))
        sampler = SobolQMCNormalSampler(torch.Size([MC_SAMPLES]), seed=seed)
        with torch.no_grad():
            draws = sampler(model.posterior(both)).squeeze(-1).numpy()
    draws = draws * scale + center
    return np.exp(draws) if observed.logarithmic else draws


def fit_model(
    inputs: NDArray[np.float64],
    values: NDArray[np.float64],
    variances: NDArray[np.float64] | None = None,
) -> SingleTaskGP:
    """Fit a Gaussian process of standardized values over `features` (maximum a posteriori).

    Args:
        inputs: Features, shape `(points, features)`.
        values: Standardized values, such as log-losses.
        variances: Their known variances; None has one for all be learned.
    """
    model = SingleTaskGP(
        torch.from_numpy(inputs),
        torch.from_numpy(values).unsqueeze(-1),
        None if variances is None else torch.from_numpy(variances).unsqueeze(-1),
        # Matern: loss surfaces are less smooth than an RBF kernel assumes. ARD: each feature has
        # its own lengthscale, so irrelevant ones fade; the prior scales with their number.
        covar_module=get_covar_module_with_dim_scaled_prior(inputs.shape[-1], use_rbf_kernel=False),
        outcome_transform=None,
    )
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"ftol": FIT_TOLERANCE}})
    return model
