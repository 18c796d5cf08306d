"""Surrogate model of the loss: a Gaussian process over architectures, on the log of the loss."""

import itertools
import warnings
from collections.abc import Sequence

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


def draw_losses(
    space: SearchSpace,
    specs: Sequence[ArchSpec],
    losses: Sequence[float],
    others: Sequence[ArchSpec],
    seed: int,
) -> NDArray[np.float64]:
    """Draw losses jointly from the posterior, given the losses of the evaluated specs.

    Args:
        space: Search space, which scales the features.
        specs: Evaluated architectures.
        losses: Noisy losses of `specs` [nats a token].
        others: Architectures without a loss.
        seed: Seed of the draws.

    Returns:
        Losses of `specs`, then of `others`; shape `(MC_SAMPLES, specs + others)`.
    """
    rows = np.stack([features(space, spec) for spec in [*specs, *others]])
    return draw(rows[: len(specs)], losses, rows[len(specs) :], seed)


def draw(
    observed: NDArray[np.float64],
    losses: Sequence[float] | NDArray[np.float64],
    others: NDArray[np.float64],
    seed: int,
) -> NDArray[np.float64]:
    """Draw losses as `draw_losses` does, for points given by features in the unit cube.

    Args:
        observed: Features of evaluated points, shape `(points, features)`.
        losses: Losses of these points: noisy, positive and not all equal.
        others: Features of points without a loss.
        seed: Seed of the draws.
    """
    logs = np.log(np.asarray(losses, dtype=float))
    center, scale = logs.mean(), logs.std()
    with manual_seed(seed), warnings.catch_warnings():
        # BoTorch warns when it adds jitter or restarts a fit; if that fails too, it raises.
        warnings.simplefilter("ignore", NumericalWarning)
        warnings.simplefilter("ignore", OptimizationWarning)
        model = fit_loss_model(observed, (logs - center) / scale)
        both = torch.from_numpy(np.concatenate([observed, others]))
        sampler = SobolQMCNormalSampler(torch.Size([MC_SAMPLES]), seed=seed)
        with torch.no_grad():
            draws = sampler(model.posterior(both)).squeeze(-1).numpy()
    return np.exp(draws * scale + center)


def fit_loss_model(inputs: NDArray[np.float64], losses: NDArray[np.float64]) -> SingleTaskGP:
    """Fit a Gaussian process of standardized log-losses over `features` (maximum a posteriori)."""
    model = SingleTaskGP(
        torch.from_numpy(inputs),
        torch.from_numpy(losses).unsqueeze(-1),
        # Matern: loss surfaces are less smooth than an RBF kernel assumes. ARD: each feature has
        # its own lengthscale, so irrelevant ones fade; the prior scales with their number.
        covar_module=get_covar_module_with_dim_scaled_prior(inputs.shape[-1], use_rbf_kernel=False),
        outcome_transform=None,
    )
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"ftol": FIT_TOLERANCE}})
    return model
