"""Model families: the keys of their config.json and the names of their tensors.

A config.json is read by the config class of transformers itself, so that defaults, former names of
keys and their precedence are those of the library. What the decoder cannot compute is refused.

Our tensors have the names of transformers' Llama and Qwen classes. The descriptor of a family holds
all of its differences; no other code asks for a family by its name.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from flash.arch import ArchSpec, Attention, RopeKind, RopeScaling
from flash.errors import InputError, require, under
from flash.log_filters import quiet

Config = Mapping[str, Any]
Stock = Any
"""A config object of transformers, whose classes differ in their fields."""


@dataclass(frozen=True)
class Family:
    """Descriptor of one `model_type`.

    Attributes:
        model_type: Name of the family in config.json.
        architecture: Class of transformers that runs the family.
        can_express: True for a spec that a config of this family describes completely; used to
            choose the family of a checkpoint that is written.
        spec_values: Fields of the spec that the family has in its own way; `layer_types` is always
            among them. It raises `InputError` for what the decoder lacks, with keys relative to
            the file.
        ffn_key: Config key of the FFN width.
        biases: Config keys that add biases which the decoder lacks.
        read_as: `model_type` whose config class reads the file; empty for the family's own.
        renames: Parts of our tensor names, and the family's for each.
        interleaved: True if rotary pairs are neighboring channels of a head; false if they are the
            same channels of both halves.
        unit_head_norms: True if QK-norm has no gains; ours are then ones.
    """

    model_type: str
    architecture: str
    can_express: Callable[[ArchSpec], bool]
    spec_values: Callable[[Stock, Config], dict[str, Any]]
    ffn_key: str = "intermediate_size"
    biases: Sequence[str] = ()
    read_as: str = ""
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


def _is_plain(spec: ArchSpec) -> bool:
    """True if all layers have attention and one FFN width, without QK-norm and biases."""
    return _is_stock(spec) and not spec.qk_norm and not spec.qkv_bias


def _is_stock(spec: ArchSpec) -> bool:
    """True if all layers have attention and the same FFN width."""
    return all(kind.attends for kind in spec.layer_types) and isinstance(spec.ffn_dim, int)


def _is_llama(spec: ArchSpec) -> bool:
    """True for what the Llama class builds: full attention, and heads that divide the width."""
    full = set(spec.layer_types) == {Attention.full_attention}
    return full and _is_plain(spec) and spec.model_dim % spec.num_heads == 0


def _llama_values(stock: Stock, config: Config) -> dict[str, Any]:
    """Values of a Llama config, whose class ignores windows.

    Its cache does not: with a window, transformers writes another text than its own logits say.
    """
    full = Attention.full_attention.value
    kinds = getattr(stock, "layer_types", None)
    unlike = sorted(set(kinds or ()) - {full})
    require(
        not unlike,
        "layer_types",
        kinds,
        "full_attention only, as the Llama class has no other; model_type ministral has windows",
    )
    for key in () if kinds else ("sliding_window", "attention_chunk_size"):
        window = getattr(stock, key, None)
        require(
            window is None or (_is_int(window) and window >= stock.max_position_embeddings),
            key,
            window,
            "null, as the Llama class has no windows but its cache would; model_type ministral "
            "has both",
        )
    return {"layer_types": (full,) * stock.num_hidden_layers, "qk_norm": False}


def _ministral_values(stock: Stock, config: Config) -> dict[str, Any]:
    """Values of a Ministral config, whose class needs a window also without a sliding layer."""
    window = stock.sliding_window
    require(window is not None, "sliding_window", None, "a number, which the class needs")
    return {"layer_types": stock.layer_types, "qk_norm": False}


def _own_values(stock: Stock, config: Config) -> dict[str, Any]:
    """Values of a config of our own."""
    kinds = config.get("layer_types")
    require(bool(kinds), "layer_types", kinds, "the kind of each layer")
    widths = config.get("intermediate_sizes")
    return {
        "layer_types": kinds,
        "qk_norm": bool(config.get("use_qk_norm", False)),
        "qkv_bias": bool(config.get("use_qkv_bias", False)),
        **({"ffn_dim": widths} if widths is not None else {}),
    }


def _llama4_values(stock: Stock, config: Config) -> dict[str, Any]:
    """Values of a Llama 4 config.

    Chunked attention is full attention within the first chunk, so the context is cut to a chunk.

    Raises:
        InputError: Some layers are mixtures of experts, have no rotary embedding, or there is no
            chunk, which the class needs also without a chunked layer.
    """
    layers = stock.num_hidden_layers
    experts = [layer for layer in stock.moe_layers if 0 <= layer < layers]
    require(not experts, "moe_layers", experts, "[]; mixtures of experts are not supported")
    rotary = stock.no_rope_layers
    require(
        len(rotary) >= layers and all(rotary[:layers]),
        "no_rope_layers",
        rotary,
        "rotary embeddings (1) in every layer; layers without positions are not supported",
    )
    chunk = stock.attention_chunk_size
    require(chunk is not None, "attention_chunk_size", None, "a number, which the class needs")
    context, chunked, full = stock.max_position_embeddings, "chunked_attention", "full_attention"
    kinds = stock.layer_types
    require(set(kinds) <= {chunked, full}, "layer_types", kinds, f"only {chunked} and {full}")
    return {
        "layer_types": (full,) * layers,
        "qk_norm": stock.use_qk_norm,
        "max_context": min(context, chunk) if chunked in kinds else context,
    }


OWN = Family(
    "mobilellm_flash",
    "MobileLLMFlashForCausalLM",
    can_express=lambda spec: True,
    spec_values=_own_values,
    read_as="ministral",
)
"""Family of the architectures that no class of transformers can build. With a `model_type` of its
own, transformers refuses such a folder; as `llama` it would load and compute something else."""

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        can_express=_is_llama,
        spec_values=_llama_values,
        biases=("attention_bias", "mlp_bias"),
    ),
    # Llama with windows, and without its rule that the heads divide the width.
    Family(
        "ministral",
        "MinistralForCausalLM",
        can_express=_is_plain,
        spec_values=_ministral_values,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        can_express=lambda spec: spec.qk_norm and not spec.qkv_bias and _is_stock(spec),
        spec_values=lambda stock, config: {"layer_types": stock.layer_types, "qk_norm": True},
        biases=("attention_bias",),
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        can_express=lambda spec: spec.qkv_bias and not spec.qk_norm and _is_stock(spec),
        spec_values=lambda stock, config: {
            "layer_types": stock.layer_types,
            "qk_norm": False,
            "qkv_bias": True,
        },
    ),
    Family(
        "llama4_text",
        "Llama4ForCausalLM",
        # Its QK-norm has no gains, so that checkpoints with gains are written as Qwen3.
        can_express=lambda spec: False,
        spec_values=_llama4_values,
        ffn_key="intermediate_size_mlp",
        biases=("attention_bias",),
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
_CONFIG_KEYS = {
    "model_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "max_context": "max_position_embeddings",
}
"""Config key of each field of a spec that has another name there."""
_UNSUPPORTED = {
    "quantization_config": "null; only weights that are not quantized are read",
    "per_layer_config": "null; layers that differ in more than their attention are not supported",
    "text_config": "null; take the text model out of the multimodal one",
    "transformers_weights": "null; weights are read from model.safetensors or its index",
    "configuration_files": "null; copy the config of your version of transformers to config.json",
}
"""Config keys that change what transformers loads, and what is expected of each."""


def family_of(config: Config, source: str) -> Family:
    """The family of a config.json; `source` names the file in errors.

    Raises:
        InputError: The family is not supported.
    """
    families = {family.model_type: family for family in FAMILIES}
    name = config.get("model_type")
    if name == "llama" and _is_former_llama(config):
        return families["ministral"]
    if isinstance(name, str) and name in families:
        return families[name]
    reason = f"; {_REASONS[name]}" if isinstance(name, str) and name in _REASONS else ""
    raise InputError(f"{source}: model_type={name}: expected one of {', '.join(families)}{reason}")


def _is_former_llama(config: Config) -> bool:
    """True for a checkpoint of a former version of ours that the Llama class refuses."""
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if "use_qk_norm" not in config or not isinstance(width, int) or not isinstance(heads, int):
        return False
    return heads > 0 and width % heads != 0


def to_config(spec: ArchSpec) -> dict[str, Any]:
    """The config.json of `spec`, in the first family that can express it."""
    family = next(family for family in FAMILIES if family.can_express(spec))
    kinds = set(spec.layer_types)
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": spec.model_dim,
        "intermediate_size": max(spec.ffn_dims),
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
        # Without it, AutoTokenizer suspects the tokenizer of every Ministral folder.
        "transformers_version": "5.23.0",
    }
    if isinstance(spec.ffn_dim, tuple):
        config["intermediate_sizes"] = list(spec.ffn_dim)
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


_MOST_LAYERS = 10_000
"""Layers or labels beyond which a config is taken for damaged."""


def from_config(config: Config, source: str = "config.json") -> ArchSpec:
    """The architecture that transformers takes a config.json to describe.

    Args:
        config: Content of the file.
        source: Name of the file, for errors.

    Raises:
        InputError: The family is not supported, transformers refuses the file, or a value is one
            that the decoder does not support.
    """
    family = family_of(config, source)
    with under(source, ": "):
        _check_unsupported(config)
        # The library makes lists as long as these say, before it looks at them.
        for key in ("num_hidden_layers", "num_labels"):
            size = config.get(key)
            if isinstance(size, int):
                require(size <= _MOST_LAYERS, key, size, f"at most {_MOST_LAYERS}")
        stock = _as_transformers(config, family)
        _check_supported(stock, family)
        values = {
            "model_dim": stock.hidden_size,
            "ffn_dim": getattr(stock, family.ffn_key),
            "num_heads": stock.num_attention_heads,
            "num_kv_heads": stock.num_key_value_heads,
            "head_dim": getattr(stock, "head_dim", stock.hidden_size // stock.num_attention_heads),
            "vocab_size": stock.vocab_size,
            "tie_embeddings": stock.tie_word_embeddings,
            "norm_eps": stock.rms_norm_eps,
            "max_context": stock.max_position_embeddings,
            **_rope_values(stock, config),
            **family.spec_values(stock, config),
        }
        values["sliding_window"] = _window(stock, config, values["layer_types"])
        try:
            return ArchSpec(**values)
        except InputError as error:
            name, equals, rest = str(error).partition("=")
            widths = "intermediate_sizes" if "intermediate_sizes" in config else family.ffn_key
            key = {**_CONFIG_KEYS, "ffn_dim": widths}.get(name, name)
            raise InputError(f"{key}{equals}{rest}") from error


def _check_unsupported(config: Config) -> None:
    """Check for keys that change what transformers loads beside the architecture.

    Raises:
        InputError: The config has one, or a value makes the classes of transformers fail.
    """
    for key, expected in _UNSUPPORTED.items():
        require(not config.get(key), key, config.get(key), expected)
    heads = config.get("num_attention_heads")
    require(heads != 0, "num_attention_heads", heads, "a positive integer")
    causal = config.get("is_causal", True)
    require(causal, "is_causal", causal, "true; a model that sees the future is not supported")
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        require(value is None or isinstance(value, Mapping), key, value, "null or a mapping")


def _as_transformers(config: Config, family: Family) -> Stock:
    """The config as transformers holds it: with its defaults, and rope in one form.

    Raises:
        InputError: The library refuses the config.
    """
    with quiet():
        from transformers import CONFIG_MAPPING  # takes a second

    values = copy.deepcopy(dict(config))  # the class changes what it is given
    if family is OWN and isinstance(values.get("layer_types"), list):
        skip, full = Attention.skip_attention.value, Attention.full_attention.value
        values["layer_types"] = [full if kind == skip else kind for kind in values["layer_types"]]
    try:
        stock = CONFIG_MAPPING[family.read_as or family.model_type](**values)
        stock.standardize_rope_params()  # once more, as it is when the model is built
    except Exception as error:  # validators raise what they like
        reason = " ".join(str(error).split()).strip("\"' ")
        raise InputError(f"transformers refuses it: {reason}") from error
    return stock


def _check_supported(stock: Stock, family: Family) -> None:
    """Check the values that all families have in common.

    Raises:
        InputError: The decoder does not support one, or transformers cannot build a model with it.
    """
    act = stock.hidden_act
    require(act in ("silu", "swish"), "hidden_act", act, "silu; not supported")
    for key in family.biases:
        value = getattr(stock, key)
        require(not value, key, value, "false; not supported")
    pad, vocabulary = stock.pad_token_id, stock.vocab_size
    require(
        pad is None or -vocabulary <= pad < vocabulary,
        "pad_token_id",
        pad,
        f"null or an id below vocab_size={vocabulary}, which transformers needs",
    )


def _window(stock: Stock, config: Config, kinds: Sequence[Attention | str]) -> int:
    """Window of the sliding layers; without one, the window that a candidate with one would have.

    Raises:
        InputError: There are sliding layers, and no window.
    """
    sliding = Attention.sliding_attention
    window: Any = getattr(stock, "sliding_window", None)
    if {sliding, sliding.value} & set(kinds):
        require(
            window is not None,
            "sliding_window",
            window,
            f"a number for layers of layer_types={sliding.value}, and use_sliding_window=true",
        )
        return window
    unused = config.get("sliding_window")
    return unused if isinstance(unused, int) and unused > 0 else 256


def _rope_values(stock: Stock, config: Config) -> dict[str, Any]:
    """Base and scaling of the rotary embedding.

    Raises:
        InputError: The decoder does not support them.
    """
    rope = stock.rope_parameters
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    require("rope_type" in rope, key, rope, "one rope for all layers; nested ones are not known")
    partial = rope.get("partial_rotary_factor", 1.0)
    require(partial == 1.0, "partial_rotary_factor", partial, "1.0; not supported")
    theta = _number(rope, "rope_theta")
    return {"rope_theta": theta, "rope_scaling": _rope_scaling(rope, key)}


def _rope_scaling(rope: Config, key: str) -> RopeScaling | None:
    """The change of rotary frequencies, or None; `key` is the config key that holds it."""
    kind = rope["rope_type"]
    if kind == "default":
        return None
    known = ", ".join(["default", *RopeKind.__members__])
    is_known = isinstance(kind, str) and kind in RopeKind.__members__
    require(is_known, "rope_type", kind, f"one of {known}; not supported")
    with under(key):
        values: dict[str, Any] = {"kind": RopeKind(kind), "factor": _number(rope, "factor")}
        if kind == RopeKind.llama3.value:
            original = "original_max_position_embeddings"
            context = _number(rope, original)
            require(context.is_integer(), original, context, "an integer")
            values |= {
                "low_freq_factor": _number(rope, "low_freq_factor"),
                "high_freq_factor": _number(rope, "high_freq_factor"),
                "original_context": int(context),
            }
        return RopeScaling(**values)


def _is_int(value: object) -> bool:
    """True for an integer of JSON, which true and false are not."""
    return type(value) is int


def _number(rope: Config, key: str) -> float:
    """A number of a rope, which can be whole.

    Raises:
        InputError: It is none.
    """
    value = rope.get(key)
    require(type(value) in (int, float), key, value, "a number")
    return float(value)  # pyright: ignore
