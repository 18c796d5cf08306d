"""ExecuTorch: operators, settings of the lowering, and a cache that would keep weights alive.

Names that ExecuTorch 1.5 does not document, and the reasons to use them:

- `executorch.extension.llm.custom_ops.custom_ops` and `executorch.kernels.quantized`: importing
  them registers the `llama` and `quantized_decomposed` operators of an exported decoder.
- `EdgeCompileConfig(_check_ir_validity=False)`: the check rejects `torch.sym_max`, though
  the rest of the lowering supports it.
- `ExecutorchProgramManager._pte_data`: the packed parts of a file. `buffer` joins them while the
  program still holds all weights unpacked, and the joined file too.
- `executorch.exir.backend.utils.is_same_node`: the cache of its results is never emptied and
  holds the nodes of every graph that was lowered.
- `why` in the modules of XNNPACK's partitioner keeps the last node that was not delegated, and with
  it the program.

ExecuTorch takes seconds to import, so each function imports the parts that it needs. Passes and the
partitioner are replaced in `flash.lowering.patches`. `flash.device.runner` uses the native module
directly, since only that file is copied to boards.
"""

from typing import TYPE_CHECKING, SupportsBytes

if TYPE_CHECKING:
    from executorch.exir import EdgeCompileConfig, ExecutorchProgramManager


def register_operators() -> None:
    """Register the operators `llama::*` and the quantized embedding with PyTorch."""
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401
    import executorch.kernels.quantized  # noqa: F401


def edge_compile_config() -> "EdgeCompileConfig":
    """Return settings of `to_edge_transform_and_lower` for graphs with `torch.sym_max`."""
    from executorch.exir import EdgeCompileConfig

    return EdgeCompileConfig(_check_ir_validity=False)


def parts_of_file(program: "ExecutorchProgramManager") -> SupportsBytes:
    """Return the parts of a program's file, which need nothing of `program` any more."""
    return program._pte_data


def clear_compared_nodes() -> None:
    """Empty the cache of `is_same_node`, which frees the graphs of its nodes."""
    from executorch.exir.backend.utils import is_same_node

    is_same_node.cache_clear()


def clear_refused_nodes() -> None:
    """Let go of the last nodes that XNNPACK's partitioner refused, which frees their programs."""
    from executorch.backends.xnnpack.partition.config import (
        gemm_configs,
        generic_node_configs,
        node_configs,
        xnnpack_config,
    )

    for module in (gemm_configs, generic_node_configs, node_configs, xnnpack_config):
        module.why.node = None
