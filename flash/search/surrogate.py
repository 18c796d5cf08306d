"""The model of quality: a Gaussian process over architectures, on the logarithm of the loss."""

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

from flash.arch import ArchSpec, Attention, SearchSpace

DEPTH_BINS = 8
"""Resolution at which the model sees where in the network a layer kind sits. Trained on 50
and tested on 88 members of the tabular truth (benchmarks/tabular.py), 4 made errors 2.6 times those
of 8, and no finer one was better."""
FIT_TOLERANCE = 1e-6
"""Relative gain of the likelihood at which fitting stops; SciPy's default is ten times slower."""
MC_SAMPLES = 64
"""Draws of the loss surface that the expected improvement averages over."""


def features(space: SearchSpace, spec: ArchSpec) -> NDArray[np.float64]:
    """`spec` as the loss model sees it, in the unit cube; shape `(3 + DEPTH_BINS * 2 + 1,)`.

    - Depth and the logarithms of both widths: loss follows powers of the sizes, so that a step
      matters more at the narrow end.
    - For each efficient kind its share among the layers near each of a few relative depths, by
      linear interpolation. Layers do unlike jobs early and late in the network; relative
      position makes specs of unequal depth comparable, and few bins can be learned from tens of
      trials; a one-hot of every slot made errors nearly twice as large. Full attention is the
      rest.
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


def draw_losses(
    space: SearchSpace,
    specs: Sequence[ArchSpec],
    losses: Sequence[float],
    others: Sequence[ArchSpec],
    seed: int,
) -> NDArray[np.float64]:
    """Joint posterior draws of the losses of `specs`, then of `others`; shape `(draws, both)`.

    Args:
        space: Scales the features.
        specs: Evaluated architectures.
        losses: Their losses, which are noisy.
        others: Architectures without a loss.
        seed: Of the draws.
    """
    rows = np.stack([features(space, spec) for spec in [*specs, *others]])
    return draw(rows[: len(specs)], losses, rows[len(specs) :], seed)


def draw(
    observed: NDArray[np.float64],
    losses: Sequence[float] | NDArray[np.float64],
    others: NDArray[np.float64],
    seed: int,
) -> NDArray[np.float64]:
    """`draw_losses` for points given by their features, shape `(points, features)`, each in 0..1.

    Args:
        observed: Evaluated points.
        losses: Their losses: noisy, positive and not all the same.
        others: Points without a loss.
        seed: Of the draws.
    """
    logs = np.log(np.asarray(losses, dtype=float))
    center, scale = logs.mean(), logs.std()
    with manual_seed(seed), warnings.catch_warnings():
        # More jitter and another start are BoTorch's ways to succeed; when they fail, it raises.
        warnings.simplefilter("ignore", NumericalWarning)
        warnings.simplefilter("ignore", OptimizationWarning)
        model = fit_loss_model(observed, (logs - center) / scale)
        both = torch.from_numpy(np.concatenate([observed, others]))
        sampler = SobolQMCNormalSampler(torch.Size([MC_SAMPLES]), seed=seed)
        with torch.no_grad():
            draws = sampler(model.posterior(both)).squeeze(-1).numpy()
    return np.exp(draws * scale + center)


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
