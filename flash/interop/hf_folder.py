"""A Hugging Face folder that stock transformers loads, without any code of ours.

Its classes build no layer without attention. So a skipped layer is written with an attention that
adds nothing: its weights are zeros. The answers are the model's; the speed is not: that attention
is computed and its keys and values are kept like any other's.
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
from flash.lowering.parity_metrics import FormatCheck, ParityLimits, compare, error_of, require_text
from flash.model.checkpoint import expected_shapes, save, state_to_save
from flash.model.decoder import Decoder

log = logging.getLogger(__name__)


def zero_filled(model: Decoder, spec: ArchSpec) -> dict[str, Tensor]:
    """Checkpoint tensors of `model` as those of `spec`, which attends or has biases in more places.

    What `model` lacks is zero, but for the gains of norms, which are one: it adds nothing.
    """
    weights = state_to_save(model, torch.float32)
    for name, shape in expected_shapes(spec).items():
        if name not in weights:
            weights[name] = torch.full(shape, 1.0 if name.endswith("norm.weight") else 0.0)
    return weights


def zero_form(model: Decoder) -> tuple[ArchSpec, dict[str, Tensor]]:
    """The same function as `model` in its `zero_spec`, in float32; without one an InputError."""
    spec = zero_spec(model.spec)
    return spec, zero_filled(model, spec)


def zero_spec(spec: ArchSpec) -> ArchSpec:
    """The architecture of a stock class in which `spec` can be said.

    A skipped layer becomes a sliding one where the model has windows, which keeps its useless cache
    short, else a full one. Llama's class has no windows and wants a width of whole heads; Qwen2's
    does without either, with biases of zero.

    Raises:
        InputError: The model has both QK-norm and biases, which no class of the three has.
    """
    require(
        not (spec.qk_norm and spec.qkv_bias),
        "arch.qkv_bias",
        spec.qkv_bias,
        "false with arch.qk_norm=True, since no stock class (Llama, Qwen2, Qwen3) has both; "
        "export as pte",
    )
    sliding = Attention.sliding_attention in spec.layer_types
    stand_in = Attention.sliding_attention if sliding else Attention.full_attention
    like_llama = not sliding and spec.model_dim % spec.num_heads == 0
    return spec.replace(
        layer_types=tuple(kind if kind.attends else stand_in for kind in spec.layer_types),
        qkv_bias=spec.qkv_bias or not (spec.qk_norm or like_llama),
    )


def write_hf(
    folder: Path,
    model: Decoder,
    *,
    tokenizer: Path | None = None,
    token_ids: Mapping[str, int] | None = None,
) -> None:
    """Write a folder for `AutoModelForCausalLM.from_pretrained`, whole or not at all.

    Not faster than the backbone there: a skipped layer's attention is computed, with zero weights.
    Weights are stored in bfloat16 where that loses nothing, as it does for what `train.py` wrote,
    else in float32.

    Args:
        folder: Where to write; replaced as a whole if it exists.
        model: The decoder.
        tokenizer: A tokenizer.json to put beside the weights, with its settings and chat template.
        token_ids: Special token ids for config.json, such as `eos_token_id`.

    Raises:
        InputError: No stock class can say this architecture.
    """
    spec, weights = zero_form(model)
    if all(torch.equal(weight.bfloat16().float(), weight) for weight in weights.values()):
        weights = {name: weight.bfloat16() for name, weight in weights.items()}
    save(folder, spec, weights, tokenizer=tokenizer, token_ids=token_ids)
    if tokenizer is not None and spec.qkv_bias and not is_qwen2(tokenizer):
        log.warning(
            "%s: AutoTokenizer would cut text as Qwen2 does and not as this tokenizer.json; "
            "read it with transformers.PreTrainedTokenizerFast.from_pretrained",
            folder,
        )


@torch.no_grad()
def check_hf(
    folder: Path, model: Decoder, text: Int[Tensor, " n"], limit: float = 1e-4
) -> FormatCheck:
    """A folder in stock transformers, in float32, against the decoder that it was made from.

    Args:
        folder: Of `write_hf`.
        model: The decoder in float32.
        text: Token ids of real text, 2 to `max_context` of them.
        limit: Largest difference of a logit over the largest logit.

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
        if not error_of(output, theirs_inside[name]) <= limit  # nor is NaN within it
    )
    return replace(check, worst_layer=next(differing, None))


def _outputs(
    model: nn.Module, run: Callable[[Tensor], Tensor], tokens: Int[Tensor, "b s"]
) -> dict[str, Tensor]:
    """What embedding, layers, final norm and head put out; both sides call them alike."""
    layers = len(cast(nn.ModuleList, model.get_submodule("model.layers")))
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(layers)), "model.norm"]
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(keep(name)) for name in [*names, "lm_head"]
    ]
    try:
        run(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
