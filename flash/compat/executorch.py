"""ExecuTorch: its operators, settings of its lowering, and a cache that keeps weights.

Names that ExecuTorch 1.5 does not document, and the reasons to use them:

- `executorch.extension.llm.custom_ops.custom_ops` and `executorch.kernels.quantized`: importing
  them registers the `llama` and `quantized_decomposed` operators of an exported decoder.
- `EdgeCompileConfig(_check_ir_validity=False)`: the check refuses `torch.sym_max`, though
  the rest of the lowering takes it.
- `executorch.exir.backend.utils.is_same_node`: a cache of its results, for the life of the process,
  holds the nodes of every graph that was lowered.

ExecuTorch takes seconds to import, so each function imports what it needs. Passes and the
partitioner are replaced in `flash.lowering.patches`; `flash.device.runner` uses the native module
on its own, since it is copied to boards alone.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from executorch.exir import EdgeCompileConfig


def register_operators() -> None:
    """Have PyTorch know the operators `llama::*` and the quantized embedding."""
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401
    import executorch.kernels.quantized  # noqa: F401


def edge_compile_config() -> "EdgeCompileConfig":
    """Settings of `to_edge_transform_and_lower` for graphs with maxima of symbolic numbers."""
    from executorch.exir import EdgeCompileConfig

    return EdgeCompileConfig(_check_ir_validity=False)


def clear_compared_nodes() -> None:
    """Forget which nodes were compared, and with them the graphs that these belong to."""
    from executorch.exir.backend.utils import is_same_node

    is_same_node.cache_clear()
