"""Steps of DTensors (FSDP2, tensor parallelism) on their local shards: no dispatch, every rule, every engine."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from hybridopt.engines._noise import GOLDEN
from hybridopt.optim._kind import counter_names

Spread: TypeAlias = list[tuple[tuple[Any, ...], list[Tensor]]]
"""Groups of processes over whose gradients squares are to be added, and the weights whose shards are here."""

if TYPE_CHECKING:
    from hybridopt.optim._base import FusedStep
    from hybridopt.optim._extended import Extended


def sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a weight is a DTensor; the module that defines them takes long to import, and is not loaded for this."""
    module = sys.modules.get("torch.distributed.tensor")
    kind: Any = getattr(module, "DTensor", None)
    return kind is not None and any(
        isinstance(p, kind) for group in optimizer.param_groups for p in group["params"]
    )


class Shards:
    """A twin of an optimizer that steps the local shards, in the same memory.

    The optimizer's own states are DTensors around the twin's states, laid out as their weight, as distributed
    checkpoints want them. A shard without elements has states too.
    """

    def __init__(self, optimizer: FusedStep) -> None:
        if optimizer._extras.flatten:
            optimizer._warn("flatten was asked for, but weights are DTensors; they stay where they are")
        self.inner = copy.copy(optimizer)
        self.inner._extras = replace(optimizer._extras, flatten=False)
        self.inner._plans = None
        self.inner._shards = None
        self.weights = [p for group in optimizer.param_groups for p in group["params"]]
        shards = [torch.nn.Parameter(local(p).detach(), requires_grad=False) for p in self.weights]
        for p, shard in zip(self.weights, shards, strict=True):
            shard.grad_dtype = p.grad_dtype
        self.locals = dict(zip(self.weights, shards, strict=True))
        self.inner.param_groups = [
            {**group, "params": [self.locals[p] for p in group["params"]]} for group in optimizer.param_groups
        ]
        self.inner._stream_numbers = dict(zip(shards, _stream_numbers(self.weights), strict=True))
        self.inner._spread = _spread(self.weights, shards)
        self.inner.state = defaultdict(dict)
        self.seen: dict[tuple[int, str], tuple[Any, Any]] = {}  # states: the shard's, the optimizer's own

    def fits(self, optimizer: FusedStep) -> bool:
        """Whether weights and groups are those it was made for, in the same memory."""
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        sizes, known = (
            [len(group["params"]) for group in groups]
            for groups in (optimizer.param_groups, self.inner.param_groups)
        )
        return sizes == known and all(
            p is q and local(p).data_ptr() == self.locals[p].data_ptr()
            for p, q in zip(weights, self.weights, strict=True)
        )

    @torch.no_grad()
    def step(self, optimizer: FusedStep) -> None:
        """Hand gradients, options and states that were replaced to the twin; let it step; wrap what it made."""
        inner = self.inner
        for mine, group in zip(inner.param_groups, optimizer.param_groups, strict=True):
            for key, value in group.items():
                if key != "params":
                    mine[key] = value
        for name in ("grad_scale", "found_inf"):
            inner.__dict__.pop(name, None)
            if name in optimizer.__dict__:
                inner.__dict__[name] = optimizer.__dict__[name]
        for i, p in enumerate(self.weights):
            mine = self.locals[p]
            mine.grad = None if p.grad is None else local(gradient(p))
            given = optimizer.state.get(p, {})
            for name in inner.state.get(mine, {}).keys() - given.keys():
                del inner.state[mine][name]
            for name, value in given.items():
                if self.seen.get((i, name), (None, None))[1] is not value:
                    shard = inner.state[mine][name] = local(value) if isinstance(value, Tensor) else value
                    self.seen[i, name] = shard, value
        try:
            inner._update()
        finally:
            optimizer._skipped = inner._skipped
        optimizer._say(f"{inner._used}, on local shards")
        counters = counter_names(optimizer)
        for i, p in enumerate(self.weights):
            for name, value in inner.state.get(self.locals[p], {}).items():
                shard, known = self.seen.get((i, name), (None, None))
                if shard is not value or optimizer.state[p].get(name) is not known:
                    optimizer.state[p][name] = value if name in counters else like(value, p)
                    self.seen[i, name] = value, optimizer.state[p][name]


@contextlib.contextmanager
def shards_known(optimizer: Extended) -> Iterator[None]:
    """While an optimizer without a twin steps: where its DTensors are, for norms and noise."""
    if not sharded(optimizer):
        yield
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer._spread = _spread(weights, weights)
    optimizer._stream_numbers = dict(zip(weights, _stream_numbers(weights), strict=True))
    try:
        yield
    finally:
        del optimizer._spread, optimizer._stream_numbers


@torch.no_grad()
def whole_step(optimizer: Extended, step: Callable[[], None]) -> None:
    """`step` for one weight after the other, gathered from its shards; its states are whole on every process."""
    groups, state = optimizer.param_groups, optimizer.state
    lists, numbers = [group["params"] for group in groups], optimizer._stream_numbers
    position = -1
    try:
        for group in groups:
            group["params"] = []
        for group, params in zip(groups, lists, strict=True):
            for p in params:
                position += 1
                if p.grad is None:
                    continue
                whole = torch.nn.Parameter(_whole(p.detach()), requires_grad=False)
                whole.grad_dtype, whole.grad = None, _whole(p.grad)
                optimizer.state = defaultdict(dict, {whole: state[p]})
                optimizer._stream_numbers = {whole: position}
                group["params"] = [whole]
                step()
                p.copy_(_part(whole.detach(), p))
            group["params"] = []
    finally:
        optimizer.state, optimizer._stream_numbers = state, numbers
        for group, params in zip(groups, lists, strict=True):
            group["params"] = params


def _whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if _is_sharded(tensor) else tensor
    return found


def _part(whole: Tensor, p: Any) -> Tensor:
    """A tensor that is the same on all processes, laid out like `p`; nothing is sent."""
    if not _is_sharded(p):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(whole, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=p.placements)


def _processes(p: Any) -> tuple[Any, ...]:
    """Groups of processes that hold the other shards of a weight; replicas are not others."""
    dims = [d for d, placement in enumerate(getattr(p, "placements", ())) if not placement.is_replicate()]
    return tuple(p.device_mesh.get_group(d) for d in dims)


def _spread(weights: Iterable[Any], holders: Iterable[Tensor]) -> Spread:
    """What holds the gradients of weights, by `_processes`."""
    found: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for p, holder in zip(weights, holders, strict=True):
        found[_processes(p)].append(holder)
    return list(found.items())


@torch.no_grad()
def spread_square_sum(spread: Spread) -> Tensor:
    """The sum of the squares of all gradients, those on other processes included, in float64.

    Every process must call it: also one whose shards have no gradient.
    """
    total: Tensor | None = None
    for groups, weights in spread:
        norms = [
            torch.linalg.vector_norm(
                local(gradient(p)), dtype=torch.complex128 if p.is_complex() else torch.float64
            )
            for p in weights
            if p.grad is not None
        ]
        device = weights[0].device
        part = (
            torch.stack(norms).square().sum()
            if norms
            else torch.zeros((), dtype=torch.float64, device=device)
        )
        for group in groups:
            torch.distributed.all_reduce(part, group=group)
        total = part if total is None else total + part.to(total.device)
    assert total is not None
    return total


def whole_norms(norms: Tensor, weights: Sequence[Any]) -> Tensor:
    """Norms of whole weights, shape (..., k), from those of their k shards that are here."""
    found: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, p in enumerate(weights):
        if groups := _processes(p):
            found[groups].append(i)
    for groups, members in found.items():
        squares = norms[..., members].square()
        for group in groups:
            torch.distributed.all_reduce(squares, group=group)
        norms[..., members] = squares.sqrt()
    return norms


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "to_local")


def gradient(p: Any) -> Tensor:
    """A weight's gradient, laid out like the weight."""
    grad: Any = p.grad
    moved = _is_sharded(grad) and grad.placements != p.placements
    told: Tensor = grad.redistribute(placements=p.placements) if moved else grad
    return told


def local(tensor: Any) -> Tensor:
    """The shard itself (the attribute: `to_local` makes a new tensor each time)."""
    found: Tensor = tensor._local_tensor if _is_sharded(tensor) else tensor
    return found


def _stream_numbers(weights: Iterable[Any]) -> list[int]:
    """What makes the noise of each weight its own: equal places of different shards share none, replicas do."""
    return [position + GOLDEN * _shard_number(p) for position, p in enumerate(weights)]


def _shard_number(p: Any) -> int:
    """Which of a weight's shards is here; the same on all ranks that hold this one."""
    number = 0
    if _is_sharded(p):
        mesh = p.device_mesh
        here = mesh.get_coordinate() or [0] * mesh.ndim  # None on a rank outside, which holds nothing
        for size, place, placement in zip(mesh.shape, here, p.placements, strict=True):
            if not placement.is_replicate():
                number = number * size + place
    return number


def like(value: Any, p: Any) -> Any:
    """A state of a shard as a DTensor laid out like its weight."""
    if not _is_sharded(p) or not isinstance(value, Tensor) or value.shape != local(p).shape:
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
