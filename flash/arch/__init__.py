"""Architectures, the search space of them, and their counts. Imports no torch."""

from flash.arch.counts import (
    CacheFormat,
    ParameterCount,
    Quantization,
    count_parameters,
    decode_flops,
    kv_cache_bytes,
    linear_parts,
    prefill_flops,
    training_flops_per_token,
    weight_bytes,
)
from flash.arch.distance import distance
from flash.arch.space import Choices, FfnChoices, SearchSpace, SpaceSettings, Variant
from flash.arch.spec import (
    GROUP,
    ArchSpec,
    Attention,
    RopeKind,
    RopeScaling,
    parse_pattern,
)

__all__ = [
    "GROUP",
    "ArchSpec",
    "Attention",
    "CacheFormat",
    "Choices",
    "FfnChoices",
    "ParameterCount",
    "Quantization",
    "RopeKind",
    "RopeScaling",
    "SearchSpace",
    "SpaceSettings",
    "Variant",
    "count_parameters",
    "decode_flops",
    "distance",
    "kv_cache_bytes",
    "linear_parts",
    "parse_pattern",
    "prefill_flops",
    "training_flops_per_token",
    "weight_bytes",
]
