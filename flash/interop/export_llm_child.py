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
from pathlib import Path
from typing import Any

import torch

from flash.compat.executorch_llm import EXPORT, complete_layers, lower_within, meta_model
from flash.lowering.patches.export_passes import short_passes

WEIGHT_STD = 0.02
"""Standard deviation of matrices; the quantised cache aborts on weights that are all equal."""


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


def main(job_path: str) -> None:
    """Write the random checkpoint of the job, then run ExecuTorch's exporter on it."""
    end_with_parent()
    job = json.loads(Path(job_path).read_text("utf-8"))
    params = json.loads(Path(job["params"]).read_text("utf-8"))
    if params.get("post_attention_norm"):
        complete_layers()
    torch.save(random_checkpoint(params, job["seed"]), job["checkpoint"])
    if job["fast"]:
        lower_within(short_passes)
    sys.argv = [EXPORT, *job["arguments"]]
    runpy.run_module(EXPORT, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1])
