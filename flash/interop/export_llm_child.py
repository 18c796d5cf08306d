"""One run of ExecuTorch's own LLM export with random weights, in a process of its own.

    export_llm_child.py JOB, a file with one JSON object:
    {"params": "params.json", "checkpoint": "random.pt", "seed": 0, "fast": true,
     "arguments": ["key=value"...]}

The script writes a checkpoint of the shape that `params` describe and then runs
`python -m executorch.extension.llm.export.export_llm ARGUMENTS`. With `"fast": true` it leaves out
the repeated work of ExecuTorch's passes: the program has the same instructions, delegates and
weights, in about half the time (tests/interop/test_export_llm.py).
"""

import ctypes
import json
import runpy
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from executorch.examples.models.llama import llama_transformer
from executorch.examples.models.llama.feed_forward import FeedForward
from executorch.examples.models.llama.model_args import ModelArgs
from executorch.examples.models.llama.norm import RMSNorm
from executorch.extension.llm.export import builder

from flash.lowering.patches.export_passes import short_passes

EXPORT_MODULE = "executorch.extension.llm.export.export_llm"
"""Module that this process runs as its main program."""
WEIGHT_STD = 0.02
"""Standard deviation of matrices; the quantised cache aborts on weights that are all equal."""


class CompleteBlock(llama_transformer.TransformerBlock):
    """A layer that heeds all fields of ModelArgs that Gemma 3 needs.

    The layer of ExecuTorch 1.5.1 ignores three of them: the norms behind attention and FFN, and an
    activation other than SiLU.
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


def meta_model(params: dict[str, Any]) -> llama_transformer.Transformer:
    """Build ExecuTorch's decoder on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return llama_transformer.construct_transformer(ModelArgs(**params))


def random_checkpoint(params: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Draw weights of ExecuTorch's decoder by name, in bf16; head and embedding are one tensor."""
    model = meta_model(params)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, like in model.named_parameters():
        if like.ndim == 1:
            weights[name] = torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0).bfloat16()
        elif name == "output.weight":
            weights[name] = weights["tok_embeddings.weight"]
        else:
            empty = torch.empty(like.shape, dtype=torch.bfloat16)
            weights[name] = empty.normal_(std=WEIGHT_STD, generator=generator)
    return weights


def end_with_parent() -> None:
    """Make Linux kill this process when its parent ends, even if the parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def shorten_passes() -> None:
    """Make export_llm lower inside `short_passes`; tracing stays as it is."""
    manager = builder.LLMEdgeManager
    builder.to_edge_transform_and_lower = _short(builder.to_edge_transform_and_lower)
    manager.to_executorch = _short(manager.to_executorch)


def _short(lower: Callable) -> Callable:
    @wraps(lower)
    def shorter(*args: Any, **kwargs: Any) -> Any:
        with short_passes():
            return lower(*args, **kwargs)

    return shorter


def main(job_path: str) -> None:
    """Write the random checkpoint of the job, then run ExecuTorch's exporter on it."""
    end_with_parent()
    job = json.loads(Path(job_path).read_text("utf-8"))
    params = json.loads(Path(job["params"]).read_text("utf-8"))
    if params.get("post_attention_norm"):
        llama_transformer.TransformerBlock = CompleteBlock
    torch.save(random_checkpoint(params, job["seed"]), job["checkpoint"])
    if job["fast"]:
        shorten_passes()
    sys.argv = [EXPORT_MODULE, *job["arguments"]]
    runpy.run_module(EXPORT_MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1])
