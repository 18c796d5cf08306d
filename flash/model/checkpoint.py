"""Checkpoints in Hugging Face folders of config.json, safetensors and tokenizer.json."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flash.arch import ArchSpec
from flash.errors import InputError
from flash.model.decoder import Decoder
from flash.model.families import to_config
from flash.model.tokenizer import ModelTokenizer
from flash.model.weights import EMBEDDING, HEAD, Weights
from flash.records import unfinished


def expected_shapes(spec: ArchSpec) -> dict[str, torch.Size]:
    """Name and shape of every tensor in a checkpoint of `spec`, without the head if it is tied."""
    with torch.device("meta"):
        model = Decoder(spec)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if spec.tie_embeddings:
        del shapes[HEAD]
    return shapes


def build(spec: ArchSpec, weights: Mapping[str, Tensor], source: str = "weights") -> Decoder:
    """A float32 decoder of the architecture `spec` with `weights`.

    Args:
        spec: The architecture.
        weights: Tensors by name, in any dtype.
        source: Origin of the weights, for errors.

    Raises:
        InputError: A tensor is missing, left over, or of another shape than `spec` has, or a tied
            head is not the embedding.
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
    left_over = sorted(set(weights) - set(expected) - {HEAD})
    if left_over:
        raise InputError(f"{source}: tensor {left_over[0]} does not belong to arch {spec}")
    embedding, head = weights[EMBEDDING], weights.get(HEAD)
    if spec.tie_embeddings and head is not None and not _same(head, embedding):
        raise InputError(f"{source}: tensor {HEAD} is not the embedding, to which {spec} ties it")
    with torch.device("meta"):
        model = Decoder(spec)
    state = {name: weights[name].float() for name in expected}
    if spec.tie_embeddings:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    if spec.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_()


def _same(one: Tensor, other: Tensor) -> bool:
    """True for one memory, whose values can be NaN, or for equal values."""
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def load(folder: Path) -> Decoder:
    """The decoder of a checkpoint folder, in float32.

    Raises:
        InputError: The folder is incomplete or damaged, or its model family is not supported.
    """
    weights = Weights(folder)
    shapes = expected_shapes(weights.spec)
    weights.check(shapes)
    tensors = {name: weights.read(name, dtype=torch.float32) for name in shapes}
    return build(weights.spec, tensors, str(folder))


def state_to_save(model: Decoder, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint tensors of `model` by name, on the CPU and cast to `dtype`."""
    return {
        name: model.state_dict()[name].detach().to("cpu", dtype).contiguous()
        for name in expected_shapes(model.spec)
    }


def save(
    folder: Path,
    spec: ArchSpec,
    weights: Mapping[str, Tensor],
    *,
    tokenizer: ModelTokenizer | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint folder as a whole.

    A kill or a full disk leaves the old folder or none, but never a part of the new one.

    Args:
        folder: Folder to write; replaced if it exists.
        spec: Architecture of the weights.
        weights: Tensors by Hugging Face name, in the dtype to store.
        tokenizer: Tokenizer to write into the folder, with its special tokens in config.json and
            generation_config.json, and its chat template.
        metadata: Further facts to write into the file of weights.
    """
    with unfinished(folder) as temporary:
        temporary.mkdir()
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        token_ids = tokenizer.token_ids if tokenizer is not None else {}
        config = {**to_config(spec), **token_ids, "dtype": dtype}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        about = {"format": "pt", **(metadata or {})}
        save_file(dict(weights), temporary / "model.safetensors", metadata=about)
        if tokenizer is not None:
            tokenizer.write(temporary)
        for path in (path for path in temporary.rglob("*") if path.is_file()):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            path.chmod(0o644)  # safetensors writes files that others cannot read
        temporary.chmod(0o755)
        # Not in the hidden folder, which the next process removes after a kill between both moves.
        old = folder.with_name(f".{folder.name}.old")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
