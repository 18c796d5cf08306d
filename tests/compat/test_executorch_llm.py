"""Contract test of ExecuTorch's LLM stack for flash.compat.executorch_llm."""

import subprocess
import sys

from tests.compat.contract import contract

CODE = """
from contextlib import contextmanager
from executorch.extension.llm.export import builder
from flash.compat import executorch_llm as stack

params = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32,
          "hidden_dim": 96, "vocab_size": 96, "act_fn": "gelu_approx"}
plain = {name for name, _ in stack.meta_model(params).named_parameters()}
stack.complete_layers()
complete = {name for name, _ in stack.meta_model(params).named_parameters()}
assert {"tok_embeddings.weight", "output.weight"} <= plain
norms = {f"layers.0.post_{half}_norm.weight" for half in ("attention", "ffn")}
assert complete - plain == norms, complete - plain

manager = builder.LLMEdgeManager
assert "to_edge_transform_and_lower" in manager.to_edge_transform_and_lower.__code__.co_names
inside = []

@contextmanager
def context():
    inside.append(True)
    yield

stack.lower_within(context)
try:
    builder.to_edge_transform_and_lower(None)
except Exception:
    pass
assert inside
import importlib.util
assert importlib.util.find_spec(stack.EXPORT) is not None
"""


def test_the_stack_builds_complete_layers_and_lowers_inside_a_context():
    """Run the check in a child process, since it changes the stack."""
    with contract(
        "ExecuTorch's llama_transformer, LLMEdgeManager or export_llm",
        "flash.compat.executorch_llm",
        "lower the baselines of the paper",
    ):
        done = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
