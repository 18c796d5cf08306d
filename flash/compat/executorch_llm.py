"""ExecuTorch's own LLM stack: its decoder, and its lowering inside a context of ours.

What the examples and the exporter of ExecuTorch 1.5 do not document, and the reasons to use it:

- `executorch.examples.models.llama`: `llama_transformer.construct_transformer`, `ModelArgs`,
  `RMSNorm`, `FeedForward`, to make a checkpoint of random weights;
  `llama_transformer.TransformerBlock` and its `_apply_attention_residual`, replaced for Gemma 3.
- `executorch.extension.llm.export.builder`: `to_edge_transform_and_lower` and
  `LLMEdgeManager.to_executorch`, wrapped to lower without repeated work.
- `executorch.extension.llm.export.export_llm`: run as a program.

The functions change classes and modules of ExecuTorch for the rest of the process, which is one of
its own (flash/interop/export_llm_child.py).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from executorch.examples.models.llama import llama_transformer
from executorch.examples.models.llama.feed_forward import FeedForward
from executorch.examples.models.llama.model_args import ModelArgs
from executorch.examples.models.llama.norm import RMSNorm
from executorch.extension.llm.export import builder

EXPORT = "executorch.extension.llm.export.export_llm"
"""The exporter, to be run as a program."""


class CompleteBlock(llama_transformer.TransformerBlock):
    """A layer with all that ModelArgs say of Gemma 3.

    The layer of ExecuTorch 1.5.1 overlooks three of its own arguments: the norms behind attention
    and FFN, and an activation other than SiLU.
    """

    def __init__(self, args: ModelArgs, attention: Any, **kwargs: Any) -> None:
        super().__init__(args, attention, **kwargs)
        assert args.hidden_dim is not None
        self.post_attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.post_ffn_norm = RMSNorm(args.dim, args.norm_eps)  # used where a layer has one
        self.feed_forward = ActivatedFeedForward(args.dim, args.hidden_dim)
        self.feed_forward.activation = args.act_fn.get_function()

    def _apply_attention_residual(
        self, x: torch.Tensor, attention_output: torch.Tensor
    ) -> torch.Tensor:
        return x + self.post_attention_norm(attention_output)


class ActivatedFeedForward(FeedForward):
    """A gated FFN with any activation."""

    activation: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


def complete_layers() -> None:
    """Have the stack build its decoders of `CompleteBlock` from now on."""
    llama_transformer.TransformerBlock = CompleteBlock


def meta_model(params: dict[str, Any]) -> llama_transformer.Transformer:
    """ExecuTorch's decoder of these `ModelArgs`, without memory for its weights."""
    with torch.device("meta"):
        return llama_transformer.construct_transformer(ModelArgs(**params))


def lower_within(context: Callable[[], AbstractContextManager[None]]) -> None:
    """Have the stack lower inside `context` from now on; tracing stays as it is."""
    manager = builder.LLMEdgeManager
    builder.to_edge_transform_and_lower = _within(context, builder.to_edge_transform_and_lower)
    manager.to_executorch = _within(context, manager.to_executorch)


def _within(context: Callable[[], AbstractContextManager[None]], lower: Callable) -> Callable:
    @wraps(lower)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return lower(*args, **kwargs)

    return wrapped
