"""Model families: how each says an architecture in config.json and names its tensors.

Our tensors have the names of transformers' Llama and Qwen classes. A family that differs says so in
its descriptor, and nowhere else does code ask for a family by its name.
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
    """What is special about one `model_type`.

    Attributes:
        model_type: Its name in config.json.
        architecture: The class of transformers that runs it.
        says: Whether a config of the family can say a spec, for writing.
        wanted: Config keys with the one value that the decoder expresses; absent keys have it.
        values: What of the spec the config decides in the family's own way.
        refuse: Raises InputError for what `wanted` cannot tell.
        renamed: Our part of a tensor's name -> the family's.
        interleaved: Rotary pairs are neighbouring channels of a head, not its halves.
        unit_head_norms: QK-norm has no gains: ours are ones.
    """

    model_type: str
    architecture: str
    says: Callable[[ArchSpec], bool]
    wanted: Mapping[str, Any] = field(default_factory=dict)
    values: Callable[[Config], dict[str, Any]] = lambda config: {}
    refuse: Callable[[Config, str], None] = lambda config, source: None
    renamed: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    unit_head_norms: bool = False

    def source(self, name: str) -> str | None:
        """The family's name of our tensor `name`; None where it has no such tensor."""
        if self.unit_head_norms and name.endswith(("q_norm.weight", "k_norm.weight")):
            return None
        for ours, theirs in self.renamed.items():
            name = name.replace(ours, theirs)
        return name

    def row_order(self, name: str, spec: ArchSpec) -> Int[Tensor, " rows"] | None:
        """Which row of the family's tensor each row of ours is; None where they agree.

        Pairs (2i, 2i + 1) of a head become (i, i + head_dim / 2): the same rotation, as queries and
        keys are permuted alike.
        """
        heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(name.split(".")[-2])
        if not self.interleaved or heads is None:
            return None
        rows = torch.arange(heads * spec.head_dim).view(heads, spec.head_dim // 2, 2)
        return rows.transpose(1, 2).flatten()


def _plain(spec: ArchSpec) -> bool:
    return not spec.qk_norm and not spec.qkv_bias


def _windows(config: Config) -> dict[str, Any]:
    """Layer kinds of Qwen's configs, older ones of which only say where the windows begin."""
    layers = int(config["num_hidden_layers"])
    sliding = bool(config.get("use_sliding_window", False)) and config.get("sliding_window")
    if config.get("layer_types") or not sliding:
        return {}
    first = min(layers, int(config.get("max_window_layers", 28)))
    full, windowed = Attention.full_attention, Attention.sliding_attention
    return {"layer_types": (full,) * first + (windowed,) * (layers - first)}


def _llama4_values(config: Config) -> dict[str, Any]:
    """Chunked attention is full attention up to the size of a chunk: the context ends there."""
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


def _refuse_llama4(config: Config, source: str) -> None:
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
    says=lambda spec: True,
    values=lambda config: {
        "qk_norm": bool(config.get("use_qk_norm", False)),
        "qkv_bias": bool(config.get("use_qkv_bias", False)),
    },
)
"""What stock classes cannot build. Stock Llama would load such a folder and compute something else
without a word; an unknown type makes it refuse."""

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        says=lambda spec: _plain(spec) and set(spec.layer_types) == {Attention.full_attention},
        wanted={"attention_bias": False, "mlp_bias": False},
        values=lambda config: {"qk_norm": False},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        says=lambda spec: spec.qk_norm and not spec.qkv_bias and _attends(spec),
        wanted={"attention_bias": False},
        values=lambda config: {"qk_norm": True, **_windows(config)},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        says=lambda spec: spec.qkv_bias and not spec.qk_norm and _attends(spec),
        values=lambda config: {"qk_norm": False, "qkv_bias": True, **_windows(config)},
    ),
    Family(
        "llama4_text",
        "Llama4ForCausalLM",
        says=lambda spec: False,  # trained gains of QK-norm cannot be said: Qwen3's class has them
        wanted={"attention_bias": False},
        values=_llama4_values,
        refuse=_refuse_llama4,
        renamed={".mlp.": ".feed_forward."},
        interleaved=True,
        unit_head_norms=True,
    ),
    OWN,
)
_REASONS = {
    "gemma3": "its four norms a layer, GELU and scaled embeddings are not expressible",
    "gemma3_text": "its four norms a layer, GELU and scaled embeddings are not expressible",
    "llama4": "take the text model out of the multimodal one (model_type llama4_text)",
    "lfm2": "its short convolutions are not expressible",
}


def _attends(spec: ArchSpec) -> bool:
    return all(kind.attends for kind in spec.layer_types)


def family_of(config: Config, source: str) -> Family:
    """The family of a config.json.

    Raises:
        InputError: None of ours.
    """
    name = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == name:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    reason = f"; {_REASONS[name]}" if name in _REASONS else ""
    raise InputError(f"{source}: model_type={name}: expected one of {known}{reason}")


def to_config(spec: ArchSpec) -> dict[str, Any]:
    """The config.json of `spec`, in the first family that can say it."""
    family = next(family for family in FAMILIES if family.says(spec))
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
    values: dict[str, Any] = {"rope_type": scaling.kind.value, "factor": scaling.factor}
    if scaling.kind is RopeKind.llama3:
        values |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return values


def _rope_scaling(config: Config, source: str) -> RopeScaling | None:
    """The change of rotary frequencies; transformers 5 writes it into `rope_parameters`."""
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

    Raises:
        InputError: The family is not supported, a key is missing, or it asks for something that
            the decoder cannot express.
    """
    family = family_of(config, source)
    for key, wanted in {"hidden_act": "silu", **family.wanted}.items():
        if config.get(key, wanted) != wanted:
            raise InputError(f"{source}: {key}={config[key]}: expected {wanted}; not supported")
    rope = config.get("rope_parameters") or {}
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise InputError(f"{source}: partial_rotary_factor={partial}: expected 1.0; not supported")
    try:
        family.refuse(config, source)
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
            **family.values(config),
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
