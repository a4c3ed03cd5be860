"""Small matrix products inside a compiled forward of many points: part of the loops around them, no library's calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files  # torch's way to add a pass

SHORT = 8
"""Up to so many terms the compiler writes a sum out, so that it is part of the loop around it."""
SMALL = 2**14
"""Up to so many multiplications a member, a library's call takes longer than they do."""


class ShortProducts(CustomGraphPass):
    """Writes batched matrix products of few terms as sums, on a CPU.

    A library takes a fifth of a microsecond for each member's product however small it is: for 100 members of a network
    of ten weights 70 of 170 µs.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph of a program."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
            a, b = node.args
            _, m, terms = a.meta["val"].shape
            size = m * terms * b.meta["val"].shape[2]
            like = a.meta["val"]
            if like.device.type != "cpu" or not like.is_floating_point() or terms > SHORT or size > SMALL:
                continue
            for factor in (a, b):  # computed once, not wherever it is read
                factor.meta["inductor_realize_to_strides"] = True
            with graph.inserting_before(node):
                columns = _then(graph, torch.ops.aten.unsqueeze.default, a, 3)  # (rows, m, k, 1)
                rows = _then(graph, torch.ops.aten.unsqueeze.default, b, 1)  # (rows, 1, k, n)
                products = _then(graph, torch.ops.aten.mul.Tensor, columns, rows)
                summed = _then(graph, torch.ops.aten.sum.dim_IntList, products, [2])
            node.replace_all_uses_with(summed)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        """By which torch's cache of compiled code knows what this pass does."""
        return get_hash_for_files((__file__,))


def _then(graph: fx.Graph, operation: Callable[..., Any], *args: Any) -> fx.Node:
    """One more operation of a graph, with the shape of its result."""
    node = graph.call_function(operation, args)
    node.meta["val"] = operation(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args))
    return node
