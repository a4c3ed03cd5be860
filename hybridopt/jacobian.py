"""Derivatives of many numbers at once: Jacobians by reverse or forward mode, and products with Hessians."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybridopt import filters
from hybridopt.vector import FloatArray

ROWS = 64
"""How many directions are followed in one pass: this many times the memory of one, whatever the machine."""


def reverse(output: Tensor, tensors: Sequence[Tensor], one_by_one: bool = False) -> FloatArray:
    """The Jacobian of `output`, shape (m,), by its graph: m backwards, in batches where torch can.

    Args:
        output: shape (m,).
        tensors: the weights.
        one_by_one: no batches, for whoever counts backwards.

    Returns:
        Shape (m, n), float64, one column a weight; zeros where `output` has no graph to it.
    """
    m = len(output)
    parts: list[Tensor] = []
    for first in range(0, m, ROWS):
        last = min(first + ROWS, m)
        seeds = torch.zeros((last - first, m), dtype=output.dtype, device=output.device)
        seeds[torch.arange(last - first), torch.arange(first, last)] = 1
        if one_by_one:
            parts.extend(pull(output, tensors, seed)[None] for seed in seeds)
            continue
        try:
            with filters.changed("ignore"):  # torch says so where it loops over an operation
                grads = torch.autograd.grad(
                    output, tensors, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
                )
        except RuntimeError:  # an operation without a batched backward; its own error comes again here
            parts.extend(pull(output, tensors, seed)[None] for seed in seeds)
        else:
            parts.append(_flat(grads, tensors, last - first))
    jacobian: FloatArray = torch.cat(parts).numpy()
    return jacobian


def pull(output: Tensor, tensors: Sequence[Tensor], seed: Tensor) -> Tensor:
    """`seed` times the Jacobian of `output`, shape (n,), float64: one backward, the graph is kept."""
    grads = torch.autograd.grad(output, tensors, seed, retain_graph=True, allow_unused=True)
    return _flat([None if g is None else g[None] for g in grads], tensors, 1)[0]


def forward(function: Callable[[Tensor], Tensor], x: Tensor) -> FloatArray:
    """The Jacobian of a pure function at `x`, shape (n,), by forward mode: n passes, in batches.

    Raises:
        Exception: whatever torch raises where an operation has no forward derivative or no batched form.
    """

    def push(direction: Tensor) -> Tensor:
        derivative: Tensor = torch.func.jvp(function, (x,), (direction,))[1]
        return derivative

    with filters.changed("ignore"):
        columns = torch.func.vmap(push, chunk_size=ROWS, randomness="same")(torch.eye(len(x), dtype=x.dtype))
    jacobian: FloatArray = columns.detach().to("cpu", torch.float64).T.contiguous().numpy()
    return jacobian


def slopes(loss: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The gradient of a loss, shape (n,), float64, with a graph of its own to differentiate again."""
    grads = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    pieces = [
        torch.zeros(t.numel(), dtype=torch.float64)
        if g is None
        else g.to_dense().reshape(-1).to("cpu", torch.float64)
        for g, t in zip(grads, tensors, strict=True)
    ]
    return torch.cat(pieces)


def _flat(grads: Sequence[Tensor | None], tensors: Sequence[Tensor], rows: int) -> Tensor:
    """Gradients of several rows, shape (rows, ...) each, side by side."""
    pieces = [
        torch.zeros((rows, t.numel()), dtype=torch.float64)
        if g is None
        else g.detach().to_dense().reshape(rows, -1).to("cpu", torch.float64)
        for g, t in zip(grads, tensors, strict=True)
    ]
    return torch.cat(pieces, dim=1)
