"""`flatten=True`: weights, states and gradients of one kind as views of one buffer each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hybridopt.optim._watch import PLAIN

if TYPE_CHECKING:
    from hybridopt.optim._base import FusedStep
    from hybridopt.optim._plan import Plan

_ALIGNED = 64  # elements: matrix products want their operands to start at such an address


class Layout(NamedTuple):
    """Where each weight of an optimizer stands in the buffer of its device and dtype, in elements."""

    starts: dict[Tensor, int]
    totals: dict[Tensor, int]
    """The length of that buffer."""

    @classmethod
    def of(cls, optimizer: FusedStep) -> Layout:
        """All weights in their order, with or without gradient: none moves when another is frozen."""
        weights = [
            p for group in optimizer.param_groups for p in group["params"] if type(p) in PLAIN and dense(p)
        ]
        starts: dict[Tensor, int] = {}
        ends: dict[tuple[torch.device, torch.dtype], int] = {}
        for p in weights:
            if p not in starts:
                starts[p] = ends.get((p.device, p.dtype), 0)
                ends[p.device, p.dtype] = starts[p] + padded(p)
        return cls(starts, {p: ends[p.device, p.dtype] for p in weights})

    def holds(self, p: Tensor, t: Tensor) -> bool:
        """Whether `t`, a weight `p` itself, its state or gradient, stands in its place of such a buffer."""
        return (
            t.storage_offset() == self.starts[p]
            and t.untyped_storage().nbytes() == self.totals[p] * t.itemsize
        )


def gradients_together(layout: Layout, params: Sequence[Tensor]) -> bool:
    """Whether all gradients are in their places of one buffer."""
    return _together(layout, [(p, p.grad) for p in params if p.grad is not None])


def padded(p: Tensor) -> int:
    """Elements from the start of a weight to that of the next one."""
    return -(-p.numel() // _ALIGNED) * _ALIGNED


@torch.no_grad()
def flatten(optimizer: FusedStep, plans: Sequence[Plan]) -> Layout:
    """Move weights and their states into buffers, keeping every tensor object; gradients become new objects.

    Gradients that are views stay: they are somebody else's (DDP's buckets).

    Raises:
        NotFlat: a weight cannot be moved without parting it from others that see the same memory.
    """
    layout = Layout.of(optimizer)
    _check(layout, optimizer._layout)
    columns: defaultdict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for p in layout.starts:
        columns[p.device, p.dtype].append((p, p))
    for plan in plans:
        for p in plan.params:
            for name in plan.names[plan.counters :]:
                state = optimizer.state[p][name]
                columns[p.device, p.dtype, name, state.dtype].append((p, state))
    for pairs in columns.values():
        if not _together(layout, pairs):
            for (_, t), place in zip(pairs, _places(layout, pairs), strict=True):
                t.data = place
    given: defaultdict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for plan in plans:
        for p in plan.params:
            if p.grad is not None:
                given[p.device, p.dtype, p.grad.dtype].append((p, p.grad))
    for pairs in given.values():
        if not _together(layout, pairs) and all(layout.holds(p, g) or not g._is_view() for p, g in pairs):
            for (p, _), place in zip(pairs, _places(layout, pairs), strict=True):
                p.grad = place
    return layout


class NotFlat(Exception):
    """Why weights stay where they are."""


def own_memory(t: Tensor) -> Tensor:
    """A tensor that can be saved alone: saving a view writes the whole buffer."""
    return t.clone() if t.untyped_storage().nbytes() > t.numel() * t.itemsize else t


def _check(layout: Layout, before: Layout | None) -> None:
    seen: set[int] = set()
    for p in layout.starts:
        ours = layout.holds(p, p) or (before is not None and p in before.starts and before.holds(p, p))
        if ours or p.numel() == 0:
            continue
        if p.data_ptr() in seen:
            raise NotFlat("two weights share their memory")
        seen.add(p.data_ptr())
        if p.untyped_storage().nbytes() != p.numel() * p.itemsize:
            raise NotFlat("a weight is part of a larger memory, whose other views would come loose")
        if p.device.type == "cpu" and p.is_shared():  # type: ignore[no-untyped-call]
            raise NotFlat("a weight is in memory shared with other processes")


def _together(layout: Layout, pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether tensors (of the weights beside them) are in one buffer already."""
    storages = {t.untyped_storage().data_ptr() for _, t in pairs if t.numel()}
    return len(storages) <= 1 and all(layout.holds(p, t) for p, t in pairs)


def _places(layout: Layout, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Copies of tensors as views of a new buffer, laid out in memory as their weights are."""
    first, like = pairs[0]
    buffer = torch.zeros(layout.totals[first], dtype=like.dtype, device=like.device)
    return [buffer.as_strided(p.shape, p.stride(), layout.starts[p]).copy_(t) for p, t in pairs]


def dense(p: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in some order of dimensions."""
    if p.layout is not torch.strided:
        return False
    if p.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
