"""`light_delegates`: ExecuTorch's split of a graph into delegates in less time and memory.

A decoder of 30 layers becomes 180 delegates out of thousands of nodes. The bytes stay the same;
that is checked together with the passes (tests/lowering/test_export_passes.py).

1. ExecuTorch keeps sets of all nodes before and behind each node: a gigabyte for 30 layers. Bits of
   integers take a few megabytes and are compared faster.
2. After each delegate it copies the whole graph to sort its nodes. Here they are moved.
3. It packs a matrix of 4-bit weights in one go, with several copies of it, 250 MB for an embedding
   of 100 million weights. Here some rows are packed at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.fx.graph import _Namespace
from torch.fx.passes.infra import partitioner as torch_partitioner
from torch.fx.passes.infra.partitioner import Partition
from torch.fx.passes.tools_common import legalize_graph
from torch.fx.passes.utils.fuser_utils import validate_partition

CHUNK_WEIGHTS = 2**20
"""Weights that are packed at a time."""


@contextmanager
def light_delegates() -> Iterator[None]:
    """Split graphs into delegates with less work inside the `with` block, to the same result."""
    from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor
    from executorch.exir import lowered_backend_module
    from executorch.exir.backend.canonical_partitioners import group_partitioner

    partitioner = group_partitioner.GroupBasedPartitioner
    in_rows = staticmethod(_pack_rows(NodeVisitor.convert_to_qc4w))
    with ExitStack() as stack:
        for owner, name, new in (
            (group_partitioner, "_DependencyViewer", _Reachability),
            (torch_partitioner, "_DependencyViewer", _Reachability),
            (partitioner, "_can_merge_partitions", _can_merge),
            (lowered_backend_module, "legalize_graph", _sort_nodes),
            (NodeVisitor, "convert_to_qc4w", in_rows),
        ):
            stack.enter_context(patch.object(owner, name, new))
        yield


class _Reachability:
    """The nodes behind each node of a graph, as the bits of an integer.

    ExecuTorch keeps sets of nodes, which take a gigabyte for 30 layers.
    """

    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        self.bit = {node: 1 << place for place, node in enumerate(graph_module.graph.nodes)}
        self.behind = dict.fromkeys(self.bit, 0)
        for node in reversed(graph_module.graph.nodes):
            for user in node.users:
                self.behind[node] |= self.bit[user] | self.behind[user]
        self._members: dict[int | None, tuple[int, int]] = {}

    def members(self, partition: Partition) -> int:
        """Return the bits of a partition's nodes; partitions only grow while they are merged."""
        size, bits = self._members.get(partition.id, (0, 0))
        if size != partition.size():
            bits = sum(self.bit[node] for node in partition.nodes)
            self._members[partition.id] = (partition.size(), bits)
        return bits

    def downstreams_of(self, node: torch.fx.Node) -> set[torch.fx.Node]:
        """Return the nodes behind a node, as PyTorch's own partitioner asks for them."""
        return {other for other, bit in self.bit.items() if bit & self.behind[node]}


def _can_merge(self: Any, first: int, second: int, partitions_by_id: dict) -> bool:
    """`GroupBasedPartitioner._can_merge_partitions` on bits in place of sets."""
    reach = self.dependency_viewer
    pair = (partitions_by_id[first], partitions_by_id[second])
    members = reach.members(pair[0]) | reach.members(pair[1])
    for partition in pair:
        for node in partition.nodes:
            for user in node.users:
                if reach.behind[user] & members and not reach.bit[user] & members:
                    return False
    return validate_partition([*pair[0].nodes, *pair[1].nodes])


class _Order:
    """Stand-in for the new graph of `legalize_graph`, which takes the order of its nodes only."""

    def __init__(self) -> None:
        self.nodes: list[torch.fx.Node] = []

    def node_copy(self, node: torch.fx.Node, _: Callable) -> torch.fx.Node:
        self.nodes.append(node)
        return node


def _sort_nodes(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`legalize_graph` that moves the nodes in place of copying them, once for each delegate."""
    graph = graph_module.graph
    order: Any = SimpleNamespace(graph=graph)
    with patch.object(torch.fx, "Graph", _Order):
        legalize_graph(order)
    # As in a new graph: the order of nodes and of their users, and which names are taken.
    graph._graph_namespace = _Namespace()
    for node in order.graph.nodes:
        graph._root._prepend(node)
        node.users.clear()
        name = graph._graph_namespace.create_name(node.name, None)
        graph._graph_namespace.associate_name_with_obj(name, node)
        for source in node._input_nodes:
            source.users[node] = None
    graph_module.recompile()
    return graph_module


def _pack_rows(pack: Callable) -> Callable:
    """`convert_to_qc4w` of some rows at a time, which holds no more copies of a whole matrix."""

    def packing(weight: torch.Tensor) -> torch.Tensor:
        if weight.dim() != 2:
            return pack(weight)
        packed = torch.empty(len(weight), (weight.shape[1] + 1) // 2, dtype=torch.uint8)
        rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
        for source, target in zip(weight.split(rows), packed.split(rows), strict=True):
            target.copy_(pack(source))
        return packed

    return packing
