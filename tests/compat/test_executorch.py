"""Contract tests of ExecuTorch for flash.compat.executorch, lowering.patches, device.runner."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash.device import runner, system_info
from flash.log_filters import quiet
from tests.compat.contract import contract

OPERATORS = {
    "llama.custom_sdpa": "query key value start_pos attn_mask drpout_p is_causal",
    "llama.custom_quantized_sdpa": (
        "query key value start_pos attn_mask drpout_p is_causal scale q_zero_points q_scales "
        "k_zero_points k_scales v_zero_points v_scales"
    ),
    "llama.update_cache": "value cache start_pos",
    "llama.update_cache_with_indices": "value cache start_pos indices",
    "quantized_decomposed.choose_qparams_per_token_asymmetric": "input dtype",
    "quantized_decomposed.quantize_per_token": "input scales zero_points quant_min quant_max dtype",
    "quantized_decomposed.dequantize_per_token": (
        "input scales zero_points quant_min quant_max dtype output_dtype"
    ),
}
"""Operators used by flash.lowering.kv_cache, with the arguments that it passes by position."""


@pytest.fixture(autouse=True)
def silent():
    with quiet():
        yield


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_take_the_arguments_that_we_pass(operator):
    with contract(
        f"ExecuTorch's operator {operator}", "flash.lowering.kv_cache", "build attention of it"
    ):
        from flash.compat.executorch import register_operators

        register_operators()
        package, name = operator.split(".")
        schema = getattr(getattr(torch.ops, package), name).default._schema
        names = [argument.name for argument in schema.arguments]
        wanted = OPERATORS[operator].split()
        assert names[: len(wanted)] == wanted


def test_the_check_of_the_edge_dialect_can_be_left_out():
    with contract(
        "EdgeCompileConfig's _check_ir_validity",
        "flash.compat.executorch.edge_compile_config",
        "lower graphs with maxima of symbolic numbers",
    ):
        from flash.compat.executorch import edge_compile_config

        assert edge_compile_config()._check_ir_validity is False


def test_compared_nodes_are_forgotten():
    with contract(
        "the cache of executorch.exir.backend.utils.is_same_node",
        "flash.compat.executorch.clear_compared_nodes",
        "free the graphs of lowered programs",
    ):
        from executorch.exir.backend.utils import is_same_node

        from flash.compat.executorch import clear_compared_nodes

        graph = torch.fx.Graph()
        nodes = [graph.placeholder(name) for name in "ab"]
        is_same_node(*nodes)
        assert is_same_node.cache_info().currsize
        clear_compared_nodes()
        assert not is_same_node.cache_info().currsize


def test_refused_nodes_are_forgotten():
    with contract(
        "`why` in the modules of XNNPACK's partitioner",
        "flash.compat.executorch.clear_refused_nodes",
        "free the graphs of lowered programs",
    ):
        from executorch.backends.xnnpack.partition.config import gemm_configs, xnnpack_config

        from flash.compat.executorch import clear_refused_nodes

        node = torch.fx.Graph().placeholder("a")
        for module in (gemm_configs, xnnpack_config):
            module.why(node, "a test")
            assert module.why.node is node
        clear_refused_nodes()
        assert gemm_configs.why.node is xnnpack_config.why.node is None


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_passes_can_be_shortened():
    """Check the names that `short_passes` replaces.

    Its effect is tested in lowering/test_export_passes.
    """
    user = "flash.lowering.patches.export_passes"
    with contract("ExecuTorch's and PyTorch's base of export passes", user, "reuse results"):
        import torch._export.pass_base as torch_passes
        from executorch.exir import pass_base as edge_passes
        from torch._export.pass_infra.proxy_value import ProxyValue

        bases = (edge_passes._ExportPassBase, torch_passes._ExportPassBaseDeprecatedDoNotUse)
        for base in bases:
            assert parameters(base._fx) == ["self", "kind", "target", "args", "kwargs", "meta"]
            assert parameters(base.ExportInterpreter.run_node) == ["self", "n"]
            assert "callback" in base.ExportInterpreter.__init__.__code__.co_names
            assert callable(base.ExportTracer.set_metadata)
        assert parameters(edge_passes._ExportPassBase.call) == ["self", "graph_module"]
        for value in (edge_passes.ProxyValue, ProxyValue):
            assert parameters(value) == ["data", "proxy"]
    with contract("torch.fx's late code generation", user, "put off compiling graphs"):
        from torch.fx.graph import _PyTreeCodeGen

        module = torch.export.export(torch.nn.ReLU(), (torch.ones(1),)).module()
        codegen = module._graph._codegen
        assert isinstance(codegen, _PyTreeCodeGen)
        assert (codegen.pytree_info.in_spec, module._out_spec) == (
            module._in_spec,
            codegen.pytree_info.out_spec,
        )
        assert module._graph._target_to_str("relu_") == "relu_"
    with contract("ExportedProgram.run_decompositions", user, "decompose once"):
        names = parameters(torch.export.ExportedProgram.run_decompositions)
        assert names[:2] == ["self", "decomp_table"]


def test_fake_results_of_torchao_can_be_kept():
    user = "flash.lowering.patches.export_passes"
    with contract("PyTorch's cache of fake results", user, "look up torchao's operators"):
        from torch._subclasses import FakeTensorMode

        names = parameters(FakeTensorMode._validate_cache_key)
        assert names == ["self", "func", "args", "kwargs"]
    with contract("torch.fx.traceback.NodeSource", user, "share the sources of nodes"):
        import torch.fx.traceback

        copies = ("deepcopy", "copy")
        assert not set(copies).isdisjoint(torch.fx.traceback.NodeSource.__init__.__code__.co_names)


def test_graphs_can_be_split_with_less_work():
    """Check the names that `light_delegates` replaces."""
    user = "flash.lowering.patches.delegates"
    with contract("ExecuTorch's partitioner by groups", user, "hold reachable nodes in bits"):
        from executorch.exir.backend.canonical_partitioners import group_partitioner
        from torch.fx.passes.infra import partitioner as torch_partitioner

        from flash.lowering.patches.delegates import _Reachability

        class Chain(torch.nn.Module):
            def forward(self, x):
                y = torch.relu(x)
                return y + torch.sin(y), torch.cos(x)

        module = torch.fx.symbolic_trace(Chain())
        reach = _Reachability(module)
        for place in (group_partitioner, torch_partitioner):
            viewer = place._DependencyViewer(module)
            for node in module.graph.nodes:
                assert reach.downstreams_of(node) == viewer.downstreams_of(node)
        names = parameters(group_partitioner.GroupBasedPartitioner._can_merge_partitions)
        assert names == ["self", "p1", "p2", "partitions_by_id"]
    with contract("torch.fx's legalize_graph", user, "sort the nodes of a graph in place"):
        from executorch.exir import lowered_backend_module
        from torch.fx.passes.tools_common import legalize_graph

        from flash.lowering.patches.delegates import _sort_nodes

        assert lowered_backend_module.legalize_graph is legalize_graph
        copied, moved = (torch.fx.symbolic_trace(Chain()) for _ in range(2))
        for module, sort in ((copied, legalize_graph), (moved, _sort_nodes)):
            first, *_, last = module.graph.nodes
            first.prepend(last.prev)  # the cosine comes before its input
            sort(module)
            module.graph.lint()
        for old, new in zip(copied.graph.nodes, moved.graph.nodes, strict=True):
            assert (old.name, list(map(str, old.users))) == (new.name, list(map(str, new.users)))
    with contract("XNNPACK's convert_to_qc4w", user, "pack 4-bit weights in rows"):
        from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor

        from flash.lowering.patches.delegates import CHUNK_WEIGHTS, _pack_rows

        stock = NodeVisitor.convert_to_qc4w
        weight = torch.randint(-8, 8, (5, CHUNK_WEIGHTS // 2 + 1), dtype=torch.int8)
        assert torch.equal(_pack_rows(stock)(weight), stock(weight))


def test_the_parts_of_a_file_outlive_the_program():
    with contract(
        "ExecutorchProgramManager._pte_data",
        "flash.compat.executorch.parts_of_file",
        "free the weights before the file is put together",
    ):
        from executorch.exir import to_edge_transform_and_lower

        from flash.compat.executorch import parts_of_file

        program = torch.export.export(torch.nn.ReLU(), (torch.ones(1),))
        lowered = to_edge_transform_and_lower(program).to_executorch()
        assert bytes(parts_of_file(lowered)) == lowered.buffer


def test_searches_of_xnnpack_can_be_dropped():
    user = "flash.lowering.patches.export_passes"
    with contract(
        "XNNPACKPassManager", user, "drop passes for patterns that decoders do not contain"
    ):
        from executorch.backends.xnnpack._passes import XNNPACKPassManager

        from flash.lowering.patches.export_passes import DROPPED_PASSES, short_passes

        assert parameters(XNNPACKPassManager) == ["exported_program", "passes"]
        program = torch.export.export(torch.nn.ReLU(), (torch.ones(1),))
        names = {each.__name__ for each in XNNPACKPassManager(program).passes}
        assert names.issuperset(DROPPED_PASSES)
        with short_passes():
            shorter = {each.__name__ for each in XNNPACKPassManager(program).passes}
        assert shorter == names - set(DROPPED_PASSES)


def test_the_partitioner_calls_the_function_that_is_replaced():
    with contract(
        "XNNPACK's partitioner and the name has_free_unbacked_symbols in it",
        "flash.lowering.patches.partitioner",
        "delegate operators whose shapes are known at run time",
    ):
        from executorch.backends.xnnpack.partition.config import xnnpack_config

        functions = vars(xnnpack_config.XNNPartitionerConfig).values()
        callers = [
            function
            for function in functions
            if inspect.isfunction(function)
            and "has_free_unbacked_symbols" in function.__code__.co_names
        ]
        assert callers


def test_the_runner_finds_the_native_module():
    with contract(
        "ExecuTorch's native _load_program, _unsafe_reset_threadpool or Verification",
        "flash.device.runner",
        "load and time programs",
    ):
        code = """
import runner
runner.prepare(1)
native = runner.bindings()
try:
    native._load_program("none.pte", program_verification=native.Verification.InternalConsistency)
except RuntimeError:
    print("refused")
import torch
torch.ops.llama.custom_sdpa  # registered by the libraries that `load_operators` finds
"""
        folder = Path(runner.__file__).parent
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr.splitlines()[-1]
        assert done.stdout.strip() == "refused"


@pytest.mark.parametrize(
    ("module", "allowed"), [(runner, {"torch", "executorch"}), (system_info, set())]
)
def test_what_is_copied_to_boards_needs_nothing_of_ours(module, allowed):
    roots = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module is not None
            roots.add(node.module.partition(".")[0])
    assert roots <= allowed | sys.stdlib_module_names
