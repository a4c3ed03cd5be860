"""Steps of DTensors (FSDP2, tensor parallelism) on their local shards: no dispatch, every rule, every engine."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from hybridopt.optim._plan import counter_names

Spread: TypeAlias = list[tuple[tuple[Any, ...], list[Tensor]]]
"""Groups of processes over whose gradients squares are to be added, and the shards that are here."""

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
        local = [torch.nn.Parameter(_local(p).detach(), requires_grad=False) for p in self.weights]
        self.locals = dict(zip(self.weights, local, strict=True))
        self.inner.param_groups = [
            {**group, "params": [self.locals[p] for p in group["params"]]} for group in optimizer.param_groups
        ]
        # equal places of different shards must not share their noise; replicas must
        self.inner._shard_numbers = {self.locals[p]: _shard_number(p) for p in self.weights}
        self.inner._spread = _spread(self.locals)
        self.inner.state = defaultdict(dict)
        self.seen: dict[tuple[int, str], Tensor] = {}

    def fits(self, optimizer: FusedStep) -> bool:
        """Whether weights and groups are those it was made for, in the same memory."""
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        sizes, known = (
            [len(group["params"]) for group in groups]
            for groups in (optimizer.param_groups, self.inner.param_groups)
        )
        return sizes == known and all(
            p is q and _local(p).data_ptr() == self.locals[p].data_ptr()
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
            mine, grad = self.locals[p], p.grad
            if grad is not None and _is_sharded(grad) and grad.placements != p.placements:
                grad = grad.redistribute(placements=p.placements)
            mine.grad = None if grad is None else _local(grad)
            given = optimizer.state.get(p, {})
            for name in inner.state.get(mine, {}).keys() - given.keys():
                del inner.state[mine][name]
            for name, value in given.items():
                if self.seen.get((i, name)) is not value:
                    inner.state[mine][name] = _local(value) if isinstance(value, Tensor) else value
        try:
            inner._update()
        finally:
            optimizer._skipped = inner._skipped
        optimizer._say(f"{inner._used}, on local shards")
        counters = counter_names(optimizer)
        for i, p in enumerate(self.weights):
            for name, value in inner.state.get(self.locals[p], {}).items():
                known = self.seen.get((i, name))
                if known is None or _local(known) is not value or optimizer.state[p].get(name) is not known:
                    wrapped = value if name in counters else _like(value, p)
                    self.seen[i, name] = optimizer.state[p][name] = wrapped


@torch.no_grad()
def whole_step(optimizer: Extended, step: Callable[[], None]) -> None:
    """`step` for one weight after the other, gathered from its shards; its states are whole on every process."""
    groups, state = optimizer.param_groups, optimizer.state
    lists = [group["params"] for group in groups]
    try:
        for group in groups:
            group["params"] = []
        for group, params in zip(groups, lists, strict=True):
            for p in params:
                if p.grad is None:
                    continue
                whole = torch.nn.Parameter(_whole(p.detach()), requires_grad=False)
                whole.grad_dtype, whole.grad = None, _whole(p.grad)
                optimizer.state = defaultdict(dict, {whole: state[p]})
                group["params"] = [whole]
                step()
                p.copy_(_part(whole.detach(), p))
            group["params"] = []
    finally:
        optimizer.state = state
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


def _spread(locals_: Mapping[Any, Tensor]) -> Spread:
    """Shards by the groups of processes that hold the others of their weight; replicas count once."""
    found: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for p, local in locals_.items():
        dims = [d for d, placement in enumerate(getattr(p, "placements", ())) if not placement.is_replicate()]
        found[tuple(p.device_mesh.get_group(d) for d in dims)].append(local)
    return list(found.items())


@torch.no_grad()
def square_sum(spread: Spread) -> Tensor:
    """The sum of the squares of all gradients, those on other processes included, in float64.

    Every process must call it: also one whose shards have no gradient.
    """
    total: Tensor | None = None
    for groups, weights in spread:
        norms = [
            torch.linalg.vector_norm(p.grad, dtype=torch.complex128 if p.is_complex() else torch.float64)
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


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "to_local")


def _local(tensor: Any) -> Tensor:
    """The shard itself (the attribute: `to_local` makes a new tensor each time)."""
    found: Tensor = tensor._local_tensor if _is_sharded(tensor) else tensor
    return found


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


def _like(value: Any, p: Any) -> Any:
    """A state of a shard as a DTensor laid out like its weight."""
    if not _is_sharded(p) or not isinstance(value, Tensor) or value.shape != _local(p).shape:
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
