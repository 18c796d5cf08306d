"""ExecuTorch's LLM stack `export_llm`: its decoder, and its lowering inside a given context.

Names that ExecuTorch 1.5 does not document, and the reasons to use them:

- `executorch.examples.models.llama`: `llama_transformer.construct_transformer`, `ModelArgs`,
  `RMSNorm`, `FeedForward`, to make a checkpoint of random weights;
  `llama_transformer.TransformerBlock` and its `_apply_attention_residual`, replaced for Gemma 3.
- `executorch.extension.llm.export.builder`: `to_edge_transform_and_lower` and
  `LLMEdgeManager.to_executorch`, wrapped to lower without repeated work.
- `executorch.extension.llm.export.export_llm`: run as a program.

The functions change classes and modules of ExecuTorch until the process ends; they are therefore
called only in a child process (flash/interop/export_llm_child.py).
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
"""Module of the exporter, to be run with `python -m`."""


class CompleteBlock(llama_transformer.TransformerBlock):
    """Decoder layer that applies all arguments in `ModelArgs`, as Gemma 3 needs.

    The layer of ExecuTorch 1.5.1 ignores three of them: the norms after attention and FFN, and an
    activation other than SiLU.
    """

    def __init__(self, args: ModelArgs, attention: Any, **kwargs: Any) -> None:
        super().__init__(args, attention, **kwargs)
        assert args.hidden_dim is not None
        self.post_attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.post_ffn_norm = RMSNorm(args.dim, args.norm_eps)  # applied by the base class
        self.feed_forward = ActivatedFeedForward(args.dim, args.hidden_dim)
        self.feed_forward.activation = args.act_fn.get_function()

    def _apply_attention_residual(
        self, x: torch.Tensor, attention_output: torch.Tensor
    ) -> torch.Tensor:
        return x + self.post_attention_norm(attention_output)


class ActivatedFeedForward(FeedForward):
    """Gated FFN with any activation function."""

    activation: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


def complete_layers() -> None:
    """Make all decoders that are built from now on use `CompleteBlock`."""
    llama_transformer.TransformerBlock = CompleteBlock


def meta_model(params: dict[str, Any]) -> llama_transformer.Transformer:
    """Build ExecuTorch's decoder of these `ModelArgs` on the device `meta`, without weights."""
    with torch.device("meta"):
        return llama_transformer.construct_transformer(ModelArgs(**params))


def lower_within(context: Callable[[], AbstractContextManager[None]]) -> None:
    """Make all lowering from now on run inside `context`; tracing is not affected."""
    manager = builder.LLMEdgeManager
    builder.to_edge_transform_and_lower = _within(context, builder.to_edge_transform_and_lower)
    manager.to_executorch = _within(context, manager.to_executorch)


def _within(context: Callable[[], AbstractContextManager[None]], lower: Callable) -> Callable:
    @wraps(lower)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return lower(*args, **kwargs)

    return wrapped
