"""A Hugging Face folder that the released transformers library loads without code of ours.

The library's classes build no layer without attention. A skipped layer is therefore written with an
attention whose weights are zeros, so that it adds nothing. The logits are those of the model, but
the speed is not: this attention is computed, and its keys and values are cached, like any other's.
They have one FFN width too: narrower FFNs are filled up with channels of zeros.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flash.arch import ArchSpec, Attention
from flash.errors import require
from flash.interop.gguf_tokenizer import is_qwen2
from flash.log_filters import quiet
from flash.lowering.parity_metrics import (
    FormatCheck,
    ParityLimits,
    compare,
    max_relative_error,
    require_text,
)
from flash.model.checkpoint import expected_shapes, save, state_to_save
from flash.model.decoder import Decoder
from flash.model.tokenizer import ModelTokenizer

log = logging.getLogger(__name__)


def zero_filled_state(model: Decoder, spec: ArchSpec) -> dict[str, Tensor]:
    """Checkpoint tensors of a model of `spec` that computes the same function as `model`.

    Args:
        model: The decoder.
        spec: Its architecture, except that more layers may attend and FFNs may be wider.

    Returns:
        Float32 tensors by name. What `model` lacks is zero, or one for the gains of norms.
    """
    weights = state_to_save(model, torch.float32)
    for name, shape in expected_shapes(spec).items():
        own = weights.get(name)
        if own is None or own.shape != shape:
            filled = torch.full(shape, 1.0 if name.endswith("norm.weight") else 0.0)
            if own is not None:  # a narrower FFN
                filled[tuple(slice(size) for size in own.shape)] = own
            weights[name] = filled
    return weights


def transformers_spec(spec: ArchSpec) -> ArchSpec:
    """Find the architecture of a transformers class that can express `spec` with added zeros.

    All FFNs become as wide as the widest. A skipped layer becomes a layer with zero attention.
    Where the model has windows it becomes a sliding one, which keeps its useless cache short, else
    a full one. With attention in every layer, `flash.model.families.to_config` finds the class, for
    this folder and for checkpoints.

    Raises:
        InputError: The model has both QK-norm and biases, which none of these classes has.
    """
    require(
        not (spec.qk_norm and spec.qkv_bias),
        "arch.qkv_bias",
        spec.qkv_bias,
        "false with arch.qk_norm=true, since no stock class (Llama, Ministral, Qwen2, Qwen3) has "
        "both; export as pte",
    )
    sliding = Attention.sliding_attention in spec.layer_types
    replacement = Attention.sliding_attention if sliding else Attention.full_attention
    kinds = tuple(kind if kind.attends else replacement for kind in spec.layer_types)
    return spec.replace(layer_types=kinds, ffn_dim=max(spec.ffn_dims))


def write_hf(
    folder: Path,
    model: Decoder,
    *,
    tokenizer: ModelTokenizer | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a folder for `AutoModelForCausalLM.from_pretrained`, whole or not at all.

    The model is no faster there than the backbone, since skipped layers compute an attention of
    zeros. Weights are stored in bfloat16 if that loses nothing, as with those that `train.py`
    wrote, else in float32.

    Args:
        folder: Folder to write; replaced as a whole if it exists.
        model: The decoder.
        tokenizer: Tokenizer to put beside the weights, with special tokens and chat template.
        metadata: Further facts to write into the file of weights.

    Raises:
        InputError: No transformers class can express this architecture.
    """
    spec = transformers_spec(model.spec)
    weights = zero_filled_state(model, spec)
    if all(torch.equal(weight.bfloat16().float(), weight) for weight in weights.values()):
        weights = {name: weight.bfloat16() for name, weight in weights.items()}
    save(folder, spec, weights, tokenizer=tokenizer, metadata=metadata)
    if tokenizer is not None and spec.qkv_bias and not is_qwen2(tokenizer.path):
        log.warning(
            "%s: AutoTokenizer would cut text as Qwen2 does and not as this tokenizer.json; "
            "read it with transformers.PreTrainedTokenizerFast.from_pretrained",
            folder,
        )


@torch.no_grad()
def check_hf(
    folder: Path, model: Decoder, text: Int[Tensor, " n"], limit: float = 1e-4
) -> FormatCheck:
    """Compare a folder, loaded by transformers in float32, with the decoder it was made from.

    If the logits differ too much, the report names the first part of the model whose output does.

    Args:
        folder: Written by `write_hf`.
        model: The decoder in float32.
        text: Token ids of real text, 2 to `max_context` of them.
        limit: Largest accepted difference of a logit, divided by the largest logit.

    Raises:
        InputError: The text is too short or too long.
    """
    from transformers import AutoModelForCausalLM

    require_text(text, model.spec.max_context)
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        ).eval()

    def their_logits(tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s vocab"]:
        return theirs(tokens).logits

    tokens = text[None].long()
    check = compare(
        "hf", model(tokens)[0], their_logits(tokens)[0], text, ParityLimits(max_error=limit)
    )
    if check.passed:
        return check
    ours_inside = _outputs(model, model, tokens)
    theirs_inside = _outputs(theirs, their_logits, tokens)
    differing = (
        name
        for name, output in ours_inside.items()
        if not max_relative_error(output, theirs_inside[name]) <= limit  # nor is NaN within it
    )
    return replace(check, worst_layer=next(differing, None))


def _outputs(
    model: nn.Module, run: Callable[[Tensor], Tensor], tokens: Int[Tensor, "b s"]
) -> dict[str, Tensor]:
    """Outputs of embedding, layers, final norm and head by name; both sides use the same names."""
    layers = len(cast(nn.ModuleList, model.get_submodule("model.layers")))
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(layers)), "model.norm"]
    outputs: dict[str, Tensor] = {}

    def keep_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(keep_output(name))
        for name in [*names, "lm_head"]
    ]
    try:
        run(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
