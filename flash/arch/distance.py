"""Distance between architectures, to tell a new idea from a variant of an old one."""

import numpy as np
from numpy.typing import ArrayLike

from flash.arch.space import Variant
from flash.arch.spec import ArchSpec

_PLACES = 64
"""Places over relative depth at which the layers of two architectures are compared."""


def distance(first: ArchSpec, second: ArchSpec) -> float:
    """Distance from 0 (equal in all that is searched) to 1.

    The mean of five parts, each from 0 to 1: the share of relative depth at which the kinds of
    attention differ, and the ratios of depth, width, FFN width (averaged over relative depth), and
    of heads and vocabulary together. A ratio counts by its binary logarithm; 2 and more count as 1.
    """
    layers = [np.arange(_PLACES) * spec.num_layers // _PLACES for spec in (first, second)]
    kinds, ffn_dims = (
        [np.array(getattr(spec, key))[i] for spec, i in zip((first, second), layers, strict=True)]
        for key in ("layer_types", "ffn_dims")
    )
    variants = [Variant.of(spec) for spec in (first, second)]
    parts = [
        np.mean(kinds[0] != kinds[1]),
        _ratio(first.num_layers, second.num_layers),
        _ratio(first.model_dim, second.model_dim),
        _ratio(*ffn_dims),
        _ratio(*variants),
    ]
    return float(np.mean(parts))


def _ratio(first: ArrayLike, second: ArrayLike) -> float:
    """Mean binary logarithm of ratios, each at most 1."""
    logs = np.abs(np.log2(np.asarray(first) / np.asarray(second)))
    return float(logs.clip(max=1).mean())
