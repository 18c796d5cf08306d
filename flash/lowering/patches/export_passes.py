"""`short_passes`: ExecuTorch's own lowering without its repeated work, for the same bytes.

Lowering is nearly all Python. About sixty graph passes each run every node again on fake tensors
(2-4 ms a node when the length is symbolic) although almost none changes anything. These are cut,
each checked to leave the .pte byte-identical (tests/lowering/test_export_passes.py):

1. A pass that meets a node with the operator and inputs it already had takes the recorded result
   instead of computing it again. For a call of a delegate, which is a node too, that would run all
   nodes of the delegate.
2. A pass that could only copy a graph, since the pass before it made it and nobody changed it,
   leaves the graph. Most of the fifteen passes over each delegate are of this kind.
3. `to_edge_transform_and_lower` decomposes the graph three times; once is enough when nothing is
   left to decompose.
4. XNNPACK's searches for bilinear upsampling and for a decomposed attention are left out: our
   graphs hold neither, and tracing the patterns costs seconds a process.
5. Every pass turns the new graph into Python source and compiles it, a fifth of what is left, and
   no one calls it: graphs are interpreted. It is put off until someone does.
6. PyTorch keeps the fake results of its own operators. It does so of torchao's as well
   (`short_tracing`, which also serves torch.export).
7. A node remembers the nodes of earlier passes that it comes from. They are shared, not copied.
8. The graph is split into delegates in a time that does not grow with its square
   (`flash.lowering.patches.delegates`).

The libraries are as before when the block ends; graphs made inside keep the late compilation of
point 5, each in a class of its own. The patches hold for the whole process, so that one thread at a
time may be inside (`lower.ONE_AT_A_TIME`). If ExecuTorch changes under us, the test fails and
`lower(..., fast=False)` still works.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from operator import is_
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.fx.traceback
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from flash.lowering.patches.delegates import light_delegates

DROPPED_PASSES = ("ConvertToSDPAPass", "ConvertToUpsampleBilinear2d")
"""Names of XNNPACK's pattern searches that are left out (point 4 above)."""


@contextmanager
def short_tracing() -> Iterator[None]:
    """Let torch.export look results of torchao's operators up; the program is the same."""
    kept = _keep_quantized(FakeTensorMode._validate_cache_key)
    with patch.object(FakeTensorMode, "_validate_cache_key", kept):
        yield


@contextmanager
def short_passes() -> Iterator[None]:
    """Leave out the repeated work of lowering inside the `with` block; the result is the same."""
    import torch._export.pass_base as torch_passes
    from executorch.backends.xnnpack._passes import XNNPACKPassManager
    from executorch.exir import pass_base as edge_passes
    from torch._export.pass_infra.proxy_value import ProxyValue

    bases = (
        (edge_passes._ExportPassBase, edge_passes.ProxyValue),
        (torch_passes._ExportPassBaseDeprecatedDoNotUse, ProxyValue),
    )
    with ExitStack() as stack:
        stack.enter_context(short_tracing())
        stack.enter_context(light_delegates())

        def replace(owner: Any, name: str, new: Any) -> None:
            stack.enter_context(patch.object(owner, name, new))

        for base, proxy_value in bases:
            interpreter = base.ExportInterpreter
            replace(interpreter, "run_node", _remember_node(interpreter.run_node))
            replace(base, "_fx", _reuse_results(base._fx, proxy_value))
        base = edge_passes._ExportPassBase
        replace(base, "call", _trace_once(base.call))
        replace(XNNPACKPassManager, "__init__", _drop_searches(XNNPACKPassManager.__init__))
        once = _decompose_once(ExportedProgram.run_decompositions)
        replace(ExportedProgram, "run_decompositions", once)
        replace(torch.fx.traceback, "copy", SimpleNamespace(copy=copy, deepcopy=list))
        replace(torch.fx.GraphModule, "recompile", _recompile_later(torch.fx.GraphModule.recompile))
        yield


def _keep_quantized(validate: Callable) -> Callable:
    """`_validate_cache_key` that lets PyTorch keep the fake results of torchao's operators.

    By default it computes operators of other libraries each time, since it cannot know that these
    have no side effects.
    """

    def kept(self: Any, func: Any, args: Any, kwargs: Any) -> None:
        if getattr(func, "namespace", None) != "torchao":
            validate(self, func, args, kwargs)

    return kept


class _Contents:
    """The nodes of a graph with their arguments and values, to see whether it was changed."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.items = [
            item
            for node in graph.nodes
            for item in (
                node,
                node.name,
                node.target,
                node.args,
                node.kwargs,
                node.meta.get("val"),
            )
        ]

    def same(self, other: "_Contents") -> bool:
        """Return True if all are the same objects: each change replaces the old ones."""
        return len(self.items) == len(other.items) and all(map(is_, self.items, other.items))


def _trace_once(call: Callable) -> Callable:
    """`call` of an export pass that returns a graph as it is if tracing could only copy it.

    That is a graph which such a call made and which no one has changed since, in a pass that
    treats no node in its own way.
    """
    from executorch.exir.pass_base import ExportPass
    from torch.fx.passes.infra.pass_base import PassResult

    checks = {"call", "requires", "ensures", "_abc_impl"}
    ways = [name for name in dir(ExportPass) if name[:2] != "__" and name not in checks]

    def once(self: Any, graph_module: torch.fx.GraphModule) -> Any:
        graph = graph_module.graph
        traced: _Contents | None = getattr(graph, "flash_traced", None)
        if (
            traced is not None
            and isinstance(self, ExportPass)
            and all(getattr(type(self), name) is getattr(ExportPass, name) for name in ways)
            and traced.same(_Contents(graph))
        ):
            return PassResult(graph_module, True)
        result = call(self, graph_module)
        graph = result.graph_module.graph
        graph.flash_traced = _Contents(graph)
        return result

    return once


def _remember_node(run_node: Callable) -> Callable:
    def remembering(self: Any, node: torch.fx.Node) -> Any:
        self.callback.flash_node = node
        try:
            return run_node(self, node)
        finally:
            self.callback.flash_node = None  # some passes exist as long as the process

    return remembering


def _reuse_results(run: Callable, proxy_value: type) -> Callable:
    """`_fx` of an export pass that takes a node's recorded result when nothing about it changed."""

    def reusing(self: Any, kind: str, target: Any, args: Any, kwargs: Any, meta: Any) -> Any:
        node = getattr(self, "flash_node", None)
        if node is None or not kind == node.op == "call_function" or "val" not in node.meta:
            return run(self, kind, target, args, kwargs, meta)
        recorded = node.meta["val"]
        data = pytree.tree_map_only(proxy_value, lambda value: value.data, (args, kwargs))
        if _unchanged(node, target, *data):
            proxies = pytree.tree_map_only(proxy_value, lambda value: value.proxy, (args, kwargs))
            name = None
            if isinstance(target, torch._ops.OpOverload):
                name = self.tracer.graph._target_to_str(target.overloadpacket.__name__)
            proxy = self.tracer.create_proxy(kind, target, *proxies, name=name)
            proxy.node.meta.update(meta.data)
            self.tracer.set_metadata(proxy.node, recorded)
            return proxy_value(recorded, proxy)
        result = run(self, kind, target, args, kwargs, meta)
        if isinstance(recorded, FakeTensor) and _same(recorded, result.data):
            # Hand on the recorded object, so that the nodes behind it compare equal quickly.
            result.proxy.node.meta["val"] = recorded
            return proxy_value(recorded, result.proxy)
        return result

    return reusing


def _unchanged(node: torch.fx.Node, target: Any, args: tuple, kwargs: dict) -> bool:
    """Return True if `node` computed this target (in any dialect) from these values."""
    if _operator(node.target) is not _operator(target):
        return False
    old_args, old_kwargs = map_arg((node.args, dict(node.kwargs)), _value)
    return _same(tuple(old_args), tuple(args)) and _same(dict(old_kwargs), dict(kwargs))


def _operator(target: Any) -> Any:
    """Return the ATen operator of an operator of ExecuTorch's dialect; others as they are."""
    from executorch.exir.dialects.edge._ops import EdgeOpOverload

    return target._op if isinstance(target, EdgeOpOverload) else target


def _value(source: torch.fx.Node) -> Any:
    """Return what a pass hands on for a node: a delegate or a constant itself, or a fake value."""
    if source.op == "get_attr":
        return getattr(source.graph.owning_module, str(source.target), source)
    value = source.meta.get("val", source)
    constant = getattr(value, "constant", None) if source.op == "placeholder" else None
    return value if constant is None else constant


def _same(a: Any, b: Any) -> bool:
    """Return True if a fake kernel cannot tell two values apart: equal, or of equal layout."""
    if a is b:
        return True
    if isinstance(a, FakeTensor) and isinstance(b, FakeTensor):
        return _layout(a) == _layout(b)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return a.node.expr == b.node.expr
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def _layout(tensor: FakeTensor) -> tuple:
    """Dtype, device, shape, strides and offset, without guards on symbolic shapes.

    The offset matters: XNNPACK's partitioner refuses a view that starts at a position known only
    at run time, but not its copy.
    """
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    plain = tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes)
    return tensor.dtype, tensor.device, tensor.dim(), plain


def _drop_searches(init: Callable) -> Callable:
    def shorter(self: Any, program: ExportedProgram, passes: Any = None) -> None:
        init(self, program, passes)
        self.passes = [p for p in self.passes if p.__name__ not in DROPPED_PASSES]

    return shorter


def _decompose_once(run: Callable) -> Callable:
    """`run_decompositions` that skips a call which could only trace the graph again."""

    def once(self: ExportedProgram, table: dict | None = None, **options: Any) -> ExportedProgram:
        # The first of the three calls only functionalises, which the next one does as well.
        if table is not None and not table:
            return self
        if getattr(self, "flash_decomposed", False) and not _left_to_decompose(self, table):
            return self
        program = run(self, table, **options)
        program.flash_decomposed = True
        return program

    return once


def _left_to_decompose(program: ExportedProgram, table: dict | None) -> bool:
    # sym_size is in the table and decomposes into itself.
    targets = {node.target for node in program.graph.nodes} - {torch.ops.aten.sym_size.int}
    return table is None or not targets.isdisjoint(table)


def _recompile_later(recompile: Callable) -> Callable:
    """`GraphModule.recompile` that generates the code at the first call of the module."""

    def forward(self: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        recompile(self)
        return self.forward(*args, **kwargs)

    def later(self: torch.fx.GraphModule) -> None:
        # Each GraphModule has a class of its own, so this touches no other.
        type(self).forward = forward
        self._code = ""  # for str(), which ExecuTorch builds debug messages from
        codegen = self._graph._codegen
        if isinstance(codegen, _PyTreeCodeGen):
            self._in_spec, self._out_spec = (
                codegen.pytree_info.in_spec,
                codegen.pytree_info.out_spec,
            )

    return later
