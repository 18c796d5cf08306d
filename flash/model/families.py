"""Model families: the keys of their config.json and the names of their tensors.

Our tensors have the names of transformers' Llama and Qwen classes. The descriptor of a family holds
all of its differences; no other code asks for a family by its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from flash.arch import ArchSpec, Attention, RopeKind, RopeScaling
from flash.errors import InputError, under

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Descriptor of one `model_type`.

    Attributes:
        model_type: Name of the family in config.json.
        architecture: Class of transformers that runs the family.
        can_express: True for a spec that a config of this family describes completely; used to
            choose the family of a checkpoint that is written.
        required: Config keys and the one value of each that the decoder supports. A missing key
            counts as this value.
        spec_values: Fields of the spec that the config gives in the family's own way.
        check: Raises `InputError` for unsupported configs that `required` cannot detect. It takes
            the config and its source.
        renames: Parts of our tensor names, and the family's for each.
        interleaved: True if rotary pairs are neighboring channels of a head; false if they are the
            same channels of both halves.
        unit_head_norms: True if QK-norm has no gains; ours are then ones.
    """

    model_type: str
    architecture: str
    can_express: Callable[[ArchSpec], bool]
    required: Mapping[str, Any] = field(default_factory=dict)
    spec_values: Callable[[Config], dict[str, Any]] = lambda config: {}
    check: Callable[[Config, str], None] = lambda config, source: None
    renames: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    unit_head_norms: bool = False

    def source(self, name: str) -> str | None:
        """The family's name of our tensor `name`; None if the family has no such tensor."""
        if self.unit_head_norms and name.endswith(("q_norm.weight", "k_norm.weight")):
            return None
        for ours, theirs in self.renames.items():
            name = name.replace(ours, theirs)
        return name

    def row_order(self, name: str, spec: ArchSpec) -> Int[Tensor, " rows"] | None:
        """For each row of our tensor `name`, its row in the family's tensor; None if all agree.

        Rotary pairs (2i, 2i + 1) of a head become (i, i + head_dim / 2). Queries and keys are
        permuted alike, so attention stays the same.
        """
        heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(name.split(".")[-2])
        if not self.interleaved or heads is None:
            return None
        rows = torch.arange(heads * spec.head_dim).view(heads, spec.head_dim // 2, 2)
        return rows.transpose(1, 2).flatten()


def _has_plain_projections(spec: ArchSpec) -> bool:
    """True without QK-norm and without biases."""
    return not spec.qk_norm and not spec.qkv_bias


def _windows(config: Config) -> dict[str, Any]:
    """Layer kinds of older configs of Qwen, which give only the first layer with a window."""
    layers = int(config["num_hidden_layers"])
    sliding = bool(config.get("use_sliding_window", False)) and config.get("sliding_window")
    if config.get("layer_types") or not sliding:
        return {}
    first = min(layers, int(config.get("max_window_layers", 28)))
    full, windowed = Attention.full_attention, Attention.sliding_attention
    return {"layer_types": (full,) * first + (windowed,) * (layers - first)}


def _llama4_values(config: Config) -> dict[str, Any]:
    """Values of a Llama 4 config.

    Chunked attention is full attention within the first chunk, so the context is cut to a chunk.
    """
    chunk = config.get("attention_chunk_size", 8192)
    kinds = config.get("layer_types") or ["chunked_attention"] * int(config["num_hidden_layers"])
    context = int(config.get("max_position_embeddings", 4096 * 32))
    if chunk is not None and "chunked_attention" in kinds:
        context = min(context, int(chunk))
    full = Attention.full_attention.value
    return {
        "ffn_dim": int(config["intermediate_size_mlp"]),
        "layer_types": tuple(full if kind == "chunked_attention" else kind for kind in kinds),
        "qk_norm": bool(config.get("use_qk_norm", True)),
        "max_context": context,
    }


def _check_llama4(config: Config, source: str) -> None:
    """Check for features of Llama 4 that the decoder lacks.

    Raises:
        InputError: Some layers are mixtures of experts or have no rotary embedding.
    """
    layers = int(config["num_hidden_layers"])
    step = int(config.get("interleave_moe_layer_step", 1))
    default = list(range(step - 1, layers, step)) if step > 0 else []
    listed = config.get("moe_layers")
    experts = default if listed is None else listed
    if experts and config.get("num_local_experts", 16) > 0:
        raise InputError(
            f"{source}: moe_layers={experts}: expected []; mixtures of experts are not supported"
        )
    every = int(config.get("no_rope_layer_interval", 4))
    rotary = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    if not all(rotary):
        raise InputError(
            f"{source}: no_rope_layers={rotary}: expected rotary embeddings (1) in every layer; "
            "layers without positions are not supported"
        )


OWN = Family(
    "mobilellm_flash",
    "MobileLLMFlashForCausalLM",
    can_express=lambda spec: True,
    spec_values=lambda config: {
        "qk_norm": bool(config.get("use_qk_norm", False)),
        "qkv_bias": bool(config.get("use_qkv_bias", False)),
    },
)
"""Family of the architectures that no class of transformers can build. With a `model_type` of its
own, transformers refuses such a folder; as `llama` it would load and compute something else."""

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        can_express=lambda spec: (
            _has_plain_projections(spec) and set(spec.layer_types) == {Attention.full_attention}
        ),
        required={"attention_bias": False, "mlp_bias": False},
        spec_values=lambda config: {"qk_norm": False},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        can_express=lambda spec: spec.qk_norm and not spec.qkv_bias and _attends(spec),
        required={"attention_bias": False},
        spec_values=lambda config: {"qk_norm": True, **_windows(config)},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        can_express=lambda spec: spec.qkv_bias and not spec.qk_norm and _attends(spec),
        spec_values=lambda config: {"qk_norm": False, "qkv_bias": True, **_windows(config)},
    ),
    Family(
        "llama4_text",
        "Llama4ForCausalLM",
        # Its QK-norm has no gains, so that checkpoints with gains are written as Qwen3.
        can_express=lambda spec: False,
        required={"attention_bias": False},
        spec_values=_llama4_values,
        check=_check_llama4,
        renames={".mlp.": ".feed_forward."},
        interleaved=True,
        unit_head_norms=True,
    ),
    OWN,
)
"""The families that can be read, in the order in which they are tried for writing."""
_REASONS = {
    "gemma3": "its four norms a layer, GELU and scaled embeddings are not expressible",
    "gemma3_text": "its four norms a layer, GELU and scaled embeddings are not expressible",
    "llama4": "take the text model out of the multimodal one (model_type llama4_text)",
    "lfm2": "its short convolutions are not expressible",
}


def _attends(spec: ArchSpec) -> bool:
    """True if all layers have attention."""
    return all(kind.attends for kind in spec.layer_types)


def family_of(config: Config, source: str) -> Family:
    """The family of a config.json; `source` names the file in errors.

    Raises:
        InputError: The family is not supported.
    """
    name = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == name:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    reason = f"; {_REASONS[name]}" if name in _REASONS else ""
    raise InputError(f"{source}: model_type={name}: expected one of {known}{reason}")


def to_config(spec: ArchSpec) -> dict[str, Any]:
    """The config.json of `spec`, in the first family that can express it."""
    family = next(family for family in FAMILIES if family.can_express(spec))
    kinds = set(spec.layer_types)
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": spec.model_dim,
        "intermediate_size": spec.ffn_dim,
        "num_hidden_layers": spec.num_layers,
        "layer_types": [kind.value for kind in spec.layer_types],
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_embeddings,
        "use_qk_norm": spec.qk_norm,
        "use_sliding_window": Attention.sliding_attention in kinds,
        "sliding_window": spec.sliding_window,
        "rope_theta": spec.rope_theta,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_context,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    if spec.qkv_bias:
        config["use_qkv_bias"] = True
    if spec.rope_scaling is not None:
        config["rope_scaling"] = _rope_config(spec.rope_scaling)
    return config


def _rope_config(scaling: RopeScaling) -> dict[str, Any]:
    """Inverse of `_rope_scaling`."""
    values: dict[str, Any] = {"rope_type": scaling.kind.value, "factor": scaling.factor}
    if scaling.kind is RopeKind.llama3:
        values |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return values


def _rope_scaling(config: Config, source: str) -> RopeScaling | None:
    """The change of rotary frequencies, or None; transformers 5 calls its key `rope_parameters`."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in RopeKind.__members__:
        known = ", ".join(["default", *RopeKind.__members__])
        raise InputError(f"{source}: rope_type={kind}: expected one of {known}; not supported")
    values: dict[str, Any] = {"kind": RopeKind(kind), "factor": float(rope["factor"])}
    if kind == RopeKind.llama3.value:
        values |= {
            "low_freq_factor": float(rope["low_freq_factor"]),
            "high_freq_factor": float(rope["high_freq_factor"]),
            "original_context": int(rope["original_max_position_embeddings"]),
        }
    with under(f"{source}: rope_scaling"):
        return RopeScaling(**values)


def from_config(config: Config, source: str = "config.json") -> ArchSpec:
    """The architecture that a config.json describes.

    Args:
        config: Content of the file.
        source: Name of the file, for errors.

    Raises:
        InputError: The family is not supported, a key is missing, or a value is one that the
            decoder does not support.
    """
    family = family_of(config, source)
    for key, wanted in {"hidden_act": "silu", **family.required}.items():
        if config.get(key, wanted) != wanted:
            raise InputError(f"{source}: {key}={config[key]}: expected {wanted}; not supported")
    rope = config.get("rope_parameters") or {}
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise InputError(f"{source}: partial_rotary_factor={partial}: expected 1.0; not supported")
    try:
        family.check(config, source)
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        values = {
            "model_dim": int(config["hidden_size"]),
            "ffn_dim": int(config["intermediate_size"]),
            "layer_types": config.get("layer_types") or ("full_attention",) * layers,
            "num_heads": heads,
            "num_kv_heads": int(config.get("num_key_value_heads") or heads),
            "head_dim": int(config.get("head_dim") or config["hidden_size"] // heads),
            "vocab_size": int(config["vocab_size"]),
            "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
            "sliding_window": int(config.get("sliding_window") or 256),
            "rope_theta": float(theta),
            "rope_scaling": _rope_scaling(config, source),
            "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
            "max_context": int(config.get("max_position_embeddings", 8192)),
            **family.spec_values(config),
        }
    except KeyError as error:
        raise InputError(f"{source}: {error.args[0]}: missing; not a complete config") from error
    if len(values["layer_types"]) != layers:
        raise InputError(
            f"{source}: layer_types has {len(values['layer_types'])} entries: "
            f"expected num_hidden_layers={layers}"
        )
    with under(source, ": "):
        return ArchSpec(**values)
