"""Hugging Face folders: config.json, model.safetensors, tokenizer.json. Safetensors only."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flash.arch import ArchSpec, Attention
from flash.errors import InputError
from flash.model.decoder import Decoder

OWN_TYPE = "mobilellm_flash"
"""`model_type` of patterns that stock classes cannot build.

Stock Llama would load such a folder and compute something else without a word; an unknown type
makes it refuse.
"""
FAMILIES = ("llama", "qwen3", OWN_TYPE)


def to_config(spec: ArchSpec) -> dict[str, Any]:
    """The config.json of `spec`: Llama's or Qwen3's where those can say it, else our own type."""
    kinds = set(spec.layer_types)
    if Attention.skip_attention in kinds or (not spec.qk_norm and len(kinds) > 1):
        family = OWN_TYPE
    elif spec.qk_norm:
        family = "qwen3"
    else:
        family = "llama" if kinds == {Attention.full_attention} else OWN_TYPE
    architectures = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [architectures.get(family, "MobileLLMFlashForCausalLM")],
        "model_type": family,
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


def from_config(config: Mapping[str, Any], source: str = "config.json") -> ArchSpec:
    """The architecture that a config.json describes.

    Raises:
        InputError: The family is not supported, a key is missing, or it asks for something that
            the decoder cannot express (biases, another activation, scaled rope).
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{source}: model_type={family}: expected one of {', '.join(FAMILIES)}")
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(key, wanted) != wanted:
            raise InputError(f"{source}: {key}={config[key]}: expected {wanted}; not supported")
    rope = dict(config.get("rope_parameters") or {})  # transformers 5 nests the rope settings
    scaling = (config.get("rope_scaling") or rope).get("rope_type", "default")
    if scaling != "default":
        raise InputError(f"{source}: rope_type={scaling}: expected default; not supported")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    try:
        layers = int(config["num_hidden_layers"])
        kinds = config.get("layer_types") or ["full_attention"] * layers
        if len(kinds) != layers:
            raise InputError(
                f"{source}: layer_types has {len(kinds)} entries: "
                f"expected num_hidden_layers={layers}"
            )
        heads = int(config["num_attention_heads"])
        return ArchSpec(
            model_dim=int(config["hidden_size"]),
            ffn_dim=int(config["intermediate_size"]),
            layer_types=tuple(Attention.parse(kind) for kind in kinds),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab_size=int(config["vocab_size"]),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=bool(config.get("use_qk_norm", family == "qwen3")),
            sliding_window=int(config.get("sliding_window") or 256),
            rope_theta=float(theta),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_context=int(config.get("max_position_embeddings", 8192)),
        )
    except KeyError as error:
        raise InputError(f"{source}: {error.args[0]}: missing; not a complete config") from error


def read_spec(folder: Path) -> ArchSpec:
    """The architecture of a checkpoint folder.

    Raises:
        InputError: No readable config.json, or one that cannot be expressed.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a Hugging Face folder") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); copy the file again") from error
    return from_config(config, str(path))


def weights_file(folder: Path) -> Path:
    """The folder's model.safetensors.

    Raises:
        InputError: There is none.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file; only safetensors weights are read")
    return path


def open_weights(folder: Path) -> Any:
    """The folder's weights as an open, memory-mapped safetensors file.

    Raises:
        InputError: The file is missing or cut off.
    """
    path = weights_file(folder)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path}: damaged ({error}); copy the file again") from error


def expected_shapes(spec: ArchSpec) -> dict[str, torch.Size]:
    """Name and shape of every tensor in a checkpoint of `spec`; a tied head is stored once."""
    with torch.device("meta"):
        model = Decoder(spec)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if spec.tie_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def build(spec: ArchSpec, weights: Mapping[str, Tensor], source: str = "weights") -> Decoder:
    """A float32 decoder that holds `weights`.

    Raises:
        InputError: A tensor is missing, left over, or of another shape than `spec` wants.
    """
    expected = expected_shapes(spec)
    for name, shape in expected.items():
        if name not in weights:
            raise InputError(f"{source}: tensor {name} is missing; expected shape {tuple(shape)}")
        if weights[name].shape != shape:
            raise InputError(
                f"{source}: tensor {name} has shape {tuple(weights[name].shape)}: "
                f"expected {tuple(shape)} for arch {spec}"
            )
    left_over = sorted(set(weights) - set(expected) - {"lm_head.weight"})
    if left_over:
        raise InputError(f"{source}: tensor {left_over[0]} does not belong to arch {spec}")
    with torch.device("meta"):
        model = Decoder(spec)
    state = {name: weights[name].float() for name in expected}
    if spec.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if spec.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_()


def load(folder: Path) -> Decoder:
    """The decoder of a checkpoint folder, in float32.

    Raises:
        InputError: The folder is incomplete, damaged or of an unsupported family.
    """
    spec = read_spec(folder)
    with open_weights(folder) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return build(spec, weights, str(folder / "model.safetensors"))


def state_to_save(model: Decoder, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint tensors of `model`, cast to `dtype`."""
    return {
        name: model.state_dict()[name].detach().to("cpu", dtype).contiguous()
        for name in expected_shapes(model.spec)
    }


def save(
    folder: Path,
    spec: ArchSpec,
    weights: Mapping[str, Tensor],
    *,
    tokenizer: Path | None = None,
    token_ids: Mapping[str, int] | None = None,
) -> None:
    """Write a checkpoint folder; a kill or a full disk leaves the old one or none, never half.

    Args:
        folder: Where to write; replaced as a whole if it exists.
        spec: Architecture of the weights.
        weights: Tensors by Hugging Face name, in the dtype to store.
        tokenizer: A tokenizer.json to put beside them.
        token_ids: Special token ids to record in config.json, such as `eos_token_id`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        config = {**to_config(spec), **(token_ids or {}), "dtype": dtype}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file(dict(weights), temporary / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / "tokenizer.json")
        for path in temporary.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        if folder.exists():
            old = temporary.with_name(temporary.name + ".old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
