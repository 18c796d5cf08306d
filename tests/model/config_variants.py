"""Folders of stock transformers with edited configs, and our verdicts on them.

Each folder is written by `save_pretrained` with random weights; then config.json is edited as
people, older versions and other tools do. Stock transformers reads the edited folder too.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from flash.errors import InputError
from flash.model.checkpoint import load
from tests.verdicts import Outcome, Verdict

TOLERANCE = 1e-4
"""Largest accepted difference of a logit, divided by the largest one."""
DELETED = object()
"""Value of a key that an edit takes out of config.json."""
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough that attention and norms matter
}
LLAMA4 = {
    "intermediate_size_mlp": 96,
    "moe_layers": [],
    "no_rope_layers": [1, 1, 1],
    "attention_chunk_size": 64,
}
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {}, "ministral": {}, "llama4_text": LLAMA4}
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = [FULL, SLIDING, FULL]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@dataclass(frozen=True)
class Variant:
    """One folder.

    Attributes:
        name: Name of the variant.
        family: Its `model_type`.
        edit: Keys of config.json that are set after saving, or `DELETED`.
        made_with: Keys of the config that the folder is made with.
        weights: Change of the saved tensors by name.
        refused: Pattern of our error; None for a folder that we read as transformers does.
    """

    name: str
    family: str
    edit: dict[str, Any] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)
    weights: Callable[[dict[str, Tensor]], None] | None = None
    refused: str | None = None


def _own_head(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()


def _copied_head(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


def _no_head(weights: dict[str, Tensor]) -> None:
    del weights["lm_head.weight"]


def _heads(family: str) -> Iterator[Variant]:
    """Heads in the config, in the file, or in both."""
    tied = {"tie_word_embeddings": True}
    yield Variant("tied", family, made_with=tied)
    yield Variant("untied", family)
    yield Variant("tied, head of its own", family, made_with=tied, weights=_own_head)
    yield Variant("tied, copy of the embedding", family, made_with=tied, weights=_copied_head)
    yield Variant("tied by edit, head of its own", family, tied)
    yield Variant("untied, no head", family, weights=_no_head, refused="lm_head.weight is missing")
    yield Variant("no key, head", family, {"tie_word_embeddings": DELETED})
    yield Variant(
        "no key, no head",
        family,
        {"tie_word_embeddings": DELETED},
        tied,
        refused="lm_head.weight is missing",
    )


def _ropes(family: str) -> Iterator[Variant]:
    """Rope under its present and former keys, at the top and nested."""
    old = {"rope_parameters": DELETED}
    edits: dict[str, dict[str, Any]] = {
        "no rope key": old,
        "null rope": {"rope_parameters": None},
        "empty rope": {"rope_parameters": {}},
        "top theta": {**old, "rope_theta": 500.0},
        "whole theta": {**old, "rope_theta": 500},
        "theta in rope_scaling": {**old, "rope_scaling": {"rope_theta": 500.0}},
        "theta in both": {**old, "rope_theta": 900.0, "rope_scaling": {"rope_theta": 500.0}},
        "theta in rope_parameters": {"rope_parameters": {"rope_theta": 500.0}},
        "both keys": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "rope_scaling": {**LINEAR, "rope_theta": 900.0},
        },
        "empty rope_scaling beside": {
            "rope_parameters": {**LINEAR, "rope_theta": 500.0},
            "rope_scaling": {},
        },
        "linear": {**old, "rope_theta": 500.0, "rope_scaling": LINEAR},
        "type linear": {**old, "rope_scaling": {"type": "linear", "factor": 2}},
        "type and rope_type": {**old, "rope_scaling": {**LINEAR, "type": "default"}},
        "default with factor": {**old, "rope_scaling": {"rope_type": "default", "factor": 8.0}},
        "llama3": {**old, "rope_theta": 500.0, "rope_scaling": LLAMA3},
        "llama3 context at the top": {
            **old,
            "rope_scaling": LLAMA3,
            "original_max_position_embeddings": 32,
        },
        "llama3 context at the top only": {
            **old,
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": DELETED},
            "original_max_position_embeddings": 24,
        },
        "llama3 without context": {
            **old,
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": DELETED},
        },
        "context at the top, no llama3": {**old, "original_max_position_embeddings": 24},
    }
    for name, edit in edits.items():
        yield Variant(name, family, edit)
    refused: dict[str, tuple[dict[str, Any], str]] = {
        "llama3 without low factor": (
            {**old, "rope_scaling": {**LLAMA3, "low_freq_factor": DELETED}},
            "low_freq_factor",
        ),
        "linear without factor": ({**old, "rope_scaling": {"type": "linear"}}, "factor"),
        "yarn": ({**old, "rope_scaling": {**LINEAR, "rope_type": "yarn"}}, "rope_type=yarn"),
        "dynamic": (
            {**old, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type=dynamic",
        ),
        "unknown rope": ({**old, "rope_scaling": {"rope_type": "new"}}, "rope_type=new"),
        "null theta": ({**old, "rope_theta": None}, "rope_theta=null"),
        "text theta": ({**old, "rope_theta": "500"}, "rope_theta=500"),
        "text rope": ({**old, "rope_scaling": "linear"}, "rope_scaling=linear"),
        "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        "partial rotary inside": (
            {**old, "rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        "factor below one": ({**old, "rope_scaling": {**LINEAR, "factor": 0.5}}, "factor=0.5"),
    }
    for name, (edit, message) in refused.items():
        yield Variant(name, family, edit, refused=message)
    nested = {kind: {"rope_type": "default", "rope_theta": 500.0} for kind in (FULL, SLIDING)}
    # Only kinds of layers that the model has are names of ropes.
    knows_kinds = family not in ("llama", "llama4_text")
    yield Variant(
        "nested rope",
        family,
        {"rope_parameters": nested},
        refused="rope_parameters" if knows_kinds else None,
    )


def _defaults(family: str) -> Iterator[Variant]:
    """Keys that are left out, with weights of the default's shape."""
    for key in ("rms_norm_eps", "hidden_act", "pad_token_id", "architectures", "dtype"):
        yield Variant(f"no {key}", family, {key: DELETED})
    head = {"head_dim": DELETED}
    if family == "ministral":  # whose class then fails
        yield Variant("no head_dim", family, head, refused="head_dim=null")
    else:
        wide = family in ("qwen3", "llama4_text")
        yield Variant("no head_dim", family, head, {"head_dim": 128} if wide else head)
    for key in ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size"):
        yield Variant(f"no {key}", family, {key: DELETED}, refused="tensor|transformers refuses it")
    if family == "llama":
        same = {"num_key_value_heads": 4}
        yield Variant("no num_key_value_heads", family, {"num_key_value_heads": DELETED}, same)
    if family not in ("llama4_text", "ministral"):  # these classes take no null
        same = {"num_key_value_heads": 4}
        yield Variant("null num_key_value_heads", family, {"num_key_value_heads": None}, same)
    yield Variant("eps 1e-3", family, {"rms_norm_eps": 1e-3})


def _other(family: str) -> Iterator[Variant]:
    """Activations, biases, keys of other families and of tools."""
    yield Variant("swish", family, {"hidden_act": "swish"})
    for name, edit in {
        "Granite's multipliers": {"attention_multiplier": 0.5, "logits_scaling": 8.0},
        "embedding_multiplier": {"embedding_multiplier": 12.0, "residual_multiplier": 0.2},
        "Gemma's soft caps": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        "pretraining_tp": {"pretraining_tp": 2},
        "torch_dtype": {"dtype": DELETED, "torch_dtype": "bfloat16"},
        "layers without rope of SmolLM3": {"no_rope_layer_interval": 2},
        "null quantization": {"quantization_config": None},
        "negative padding": {"pad_token_id": -1},
        "attention_dropout": {"attention_dropout": 0.1},
        "other architecture": {"architectures": ["LlamaForSequenceClassification"]},
    }.items():
        yield Variant(name, family, edit)
    refused: dict[str, tuple[dict[str, Any], str]] = {
        "gelu": ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        "bidirectional": ({"is_causal": False}, "is_causal=false"),
        "padding beyond the vocabulary": ({"pad_token_id": 97}, "pad_token_id=97"),
        "per layer": ({"per_layer_config": {"0": {"intermediate_size": 32}}}, "per_layer_config="),
        "other weights": ({"transformers_weights": "x.safetensors"}, "transformers_weights="),
        "multimodal": ({"text_config": {"hidden_size": 64}}, "text_config="),
        "text size": ({"hidden_size": "64"}, "hidden_size"),
        "heads of half a group": ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0"),
        "other family": ({"model_type": "olmo2"}, "model_type=olmo2"),
    }
    for name, (edit, message) in refused.items():
        yield Variant(name, family, edit, refused=message)
    bias = {"attention_bias": True}
    if family in ("llama", "qwen3", "llama4_text"):
        yield Variant("attention_bias", family, made_with=bias, refused="attention_bias=true")
    else:
        yield Variant("attention_bias", family, bias)
    if family == "llama":
        yield Variant("mlp_bias", family, made_with={"mlp_bias": True}, refused="mlp_bias=true")
    else:
        yield Variant("mlp_bias", family, {"mlp_bias": True})


def _llama_windows() -> Iterator[Variant]:
    full = {"layer_types": [FULL] * 3}
    yield Variant("layer_types", "llama", full)
    yield Variant("layer_types and window", "llama", {**full, "sliding_window": 5})
    yield Variant("window of the context", "llama", {"sliding_window": 64})
    yield Variant("null window", "llama", {"sliding_window": None, "use_sliding_window": True})
    yield Variant("window", "llama", {"sliding_window": 5}, refused="sliding_window=5")
    yield Variant("chunk", "llama", {"attention_chunk_size": 8}, refused="attention_chunk_size=8")
    for name, kinds in {"sliding": MIXED, "linear": ["linear_attention"] * 3}.items():
        edit = {"layer_types": kinds, "sliding_window": 5}
        yield Variant(f"{name} layers", "llama", edit, refused="layer_types=")
    uneven = {"num_attention_heads": 6, "num_key_value_heads": 3}
    yield Variant("six heads", "llama", uneven, refused="hidden size .* multiple")


def _qwen_windows(family: str) -> Iterator[Variant]:
    on = {"use_sliding_window": True, "sliding_window": 5}
    old = {"layer_types": DELETED}
    yield Variant("windows by kind", family, {**on, "layer_types": MIXED})
    yield Variant("windows from a layer on", family, {**old, **on, "max_window_layers": 1})
    yield Variant("windows in all layers", family, {**old, **on, "max_window_layers": 0})
    yield Variant("windows after the last", family, {**old, **on})
    yield Variant("windows off", family, {**old, **on, "use_sliding_window": False})
    yield Variant("windows by default", family, {**old, "sliding_window": 5})
    yield Variant("null window", family, {**old, **on, "sliding_window": None})
    yield Variant("kinds, full", family, {**on, "layer_types": [FULL] * 3})
    off = {**on, "layer_types": MIXED, "use_sliding_window": False}
    yield Variant("kinds, windows off", family, off, refused="use_sliding_window=true")
    null = {**on, "layer_types": MIXED, "sliding_window": None}
    yield Variant("kinds, null window", family, null, refused="sliding_window=null")
    yield Variant("two kinds", family, {"layer_types": [FULL] * 2}, refused="layer_types")
    chunked = {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 8}
    yield Variant("chunks", family, chunked, refused="layer_types")


def _ministral_windows() -> Iterator[Variant]:
    old, family = {"layer_types": DELETED}, "ministral"
    yield Variant("windows by kind", family, {"sliding_window": 5, "layer_types": MIXED})
    yield Variant("windows in all layers", family, {**old, "sliding_window": 5})
    yield Variant("default window", family, {**old, "sliding_window": DELETED})
    yield Variant("full", family, {"sliding_window": 5, "layer_types": [FULL] * 3})
    for name, kinds in {"no kinds": DELETED, "full": [FULL] * 3, "mixed": MIXED}.items():
        edit = {"sliding_window": None, "layer_types": kinds}
        yield Variant(f"null window, {name}", family, edit, refused="sliding_window=null")
    uneven = {"num_attention_heads": 6, "num_key_value_heads": 3}
    yield Variant("six heads", family, made_with=uneven)
    yield Variant("null head_dim", family, {"head_dim": None}, refused="head_dim=null")


def _llama4_layers() -> Iterator[Variant]:
    family, old = "llama4_text", {"layer_types": DELETED}
    full = {"layer_types": [FULL] * 3}
    yield Variant("full", family, full)
    yield Variant("chunk of the context", family, {**old, "attention_chunk_size": 64})
    yield Variant("shorter chunk", family, {**old, "attention_chunk_size": 32})
    yield Variant("longer chunk", family, {**old, "attention_chunk_size": 8192})
    yield Variant("full, short chunk", family, {**full, "attention_chunk_size": 8})
    yield Variant("no QK-norm", family, {"use_qk_norm": False})
    yield Variant("temperature", family, {"floor_scale": 2, "attn_scale": 0.9})
    yield Variant("experts after the last layer", family, {"moe_layers": [7]})
    yield Variant("width of experts", family, {"intermediate_size": 32})
    yield Variant("null chunk", family, {"attention_chunk_size": None}, refused="attention_chunk")
    yield Variant("experts", family, {"moe_layers": DELETED}, refused="moe_layers=")
    yield Variant(
        "no experts of no number",
        family,
        {"moe_layers": DELETED, "num_local_experts": 0},
        refused="moe_layers=",
    )
    yield Variant("without rope", family, {"no_rope_layers": [1, 0, 1]}, refused="no_rope_layers=")
    yield Variant("no list of ropes", family, {"no_rope_layers": DELETED})
    second = {"no_rope_layers": [], "no_rope_layer_interval": 2}
    yield Variant("rope in every second", family, second, refused="no_rope_layers=")
    yield Variant("short rope list", family, {"no_rope_layers": [1]}, refused="no_rope_layers=")
    yield Variant("sliding", family, {"layer_types": MIXED}, refused="layer_types=")


def variants() -> list[Variant]:
    """All variants of all families."""
    shared = (_heads, _ropes, _defaults, _other)
    found = [variant for family in FAMILIES for make in shared for variant in make(family)]
    for family in ("qwen2", "qwen3"):
        found += _qwen_windows(family)
    return [*found, *_llama_windows(), *_ministral_windows(), *_llama4_layers()]


def random_model(config: Mapping[str, Any]) -> nn.Module:
    """A model of transformers with random weights, biases and gains."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # gains of one would hide a missing norm
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


class Folders:
    """Maker of variants' folders; those that are made with the same config are copies of one."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}

    def make(self, variant: Variant) -> Path:
        """The folder of a variant, in the place of the last one."""
        config = {
            "model_type": variant.family,
            **SIZES,
            **FAMILIES[variant.family],
            **variant.made_with,
        }
        key = variant.family + repr(sorted(variant.made_with.items(), key=str))
        if key not in self._made:
            self._made[key] = self._root / f"made{len(self._made)}"
            random_model(_without_deleted(config)).save_pretrained(self._made[key])
        folder = self._root / "edited"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._made[key], folder)
        path = folder / "config.json"
        values = json.loads(path.read_text("utf-8")) | variant.edit
        path.write_text(json.dumps(_without_deleted(values)), "utf-8")
        if variant.weights is not None:
            tensors = load_file(folder / "model.safetensors")
            variant.weights(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


def _without_deleted(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_deleted(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not DELETED
    }


@torch.no_grad()
def verdict(variant: Variant, folder: Path) -> Verdict:
    """Our reading of a variant's folder against that of stock transformers."""
    case = f"{variant.family}: {variant.name}"
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    try:
        decoder = load(folder)
        tokens = tokens[:, : decoder.spec.max_context]
        ours = decoder(tokens)
    except InputError as error:
        text = str(error)
        named = str(folder) in text and "\n" not in text and re.search(variant.refused or "", text)
        return Verdict(case, Outcome.refused if named else Outcome.wrong, text)
    except Exception as error:
        return Verdict(case, Outcome.wrong, f"we fail: {error!r}")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        theirs = model(tokens).logits
    except Exception as error:
        return Verdict(case, Outcome.wrong, f"transformers refuses it: {error!r}")
    if ours.shape != theirs.shape:
        return Verdict(case, Outcome.wrong, f"logits of another shape: {tuple(theirs.shape)}")
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    good = difference <= TOLERANCE  # which NaN is not
    return Verdict(case, Outcome.right if good else Outcome.wrong, f"differs by {difference:.1e}")


def verdicts(root: Path) -> Iterator[Verdict]:
    """Verdicts on all variants, whose folders are made under `root`."""
    folders = Folders(root)
    for variant in variants():
        yield verdict(variant, folders.make(variant))
