"""Steps of 16-bit weights, and of states in another precision, where no compiled loop runs: on wider copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridopt.engines import _noise
from hybridopt.optim._extras import HALVES, Extras
from hybridopt.optim._shards import gradient, like, local

if TYPE_CHECKING:
    from hybridopt.optim._extended import Extended


@torch.no_grad()
def wide_step(optimizer: Extended, step: Callable[[], None], factor: float | None) -> None:
    """`step` as if 16-bit weights, their gradients and all states were float32, and gradients `factor` times as large.

    For the time of the step other tensors stand in the groups: wider copies, or the same memory where nothing is to be
    widened. The weights themselves never change their dtype, because autograd then forgets the hooks that others (DDP)
    have put on their gradients. If it raises, 16-bit weights and all gradients are as before.

    Args:
        optimizer: whose weights are stepped.
        step: its step in Python, which creates missing states.
        factor: of the gradients; None = 1.
    """
    groups, state = optimizer.param_groups, optimizer.state
    lists = [group["params"] for group in groups]
    lent: dict[Tensor, _Lent] = {}
    for index, group in enumerate(groups):
        active = optimizer._active(group)
        for p, number in zip(group["params"], optimizer._streams(index), strict=True):
            if p.grad is not None:
                lent[p] = _Lent(optimizer, p, active, number, factor)
    optimizer.state = defaultdict(dict, {one.wide: one.states for one in lent.values() if one.states})
    try:
        for group in groups:
            group["params"] = [lent[p].wide if p in lent else p for p in group["params"]]
        optimizer._stand_for = {one.wide: p for p, one in lent.items()}
        step()
        made = optimizer.state
    finally:
        optimizer.state, optimizer._stand_for = state, {}
        for group, params in zip(groups, lists, strict=True):
            group["params"] = params
    for one in lent.values():
        one.give_back(made.get(one.wide, {}))


class _Lent:
    """What stands for one weight and its states while the step runs, in the dtype of the arithmetic."""

    def __init__(
        self, optimizer: Extended, p: Tensor, active: tuple[str, ...], number: int, factor: float | None
    ) -> None:
        self.extras = optimizer._extras
        self.optimizer = optimizer
        self.p = p
        self.active = active
        self.number = number
        self.before: dict[str, Any] = optimizer.state.get(p, {})
        self.dtype = torch.float32 if p.dtype in HALVES else p.dtype
        self.kahan = self.extras.kahan_for(p.dtype)
        wide = p.detach().to(self.dtype)
        if self.kahan and "kahan_comp" in self.before:
            wide = wide + self.before["kahan_comp"].to(self.dtype)
        self.wide = wide.requires_grad_(p.requires_grad)
        grad = gradient(p).to(self.dtype)
        self.wide.grad = grad if factor is None else grad * factor
        self.states = {
            name: value.to(self.dtype) if self._elementwise(name, value) else value
            for name, value in self.before.items()
        }

    def give_back(self, states: dict[str, Any]) -> None:
        """Store the weight, and the states that the step has left."""
        p, wide = self.p, local(self.wide.detach())
        if self.extras.stochastic_rounding and not self.optimizer._counts():
            states["step"] = states.get("step", torch.tensor(0.0, device=p.device)) + 1
        if p.dtype is not self.dtype:
            local(p).copy_(stored := narrowed(wide, p.dtype, self._stream(0, states)))
            if self.kahan:
                states["kahan_comp"] = self._in_place("kahan_comp", lost(wide, stored))
        for name, tensor in states.items():
            if self._elementwise(name, tensor):
                column = self.active.index(name) + 1 if name in self.active else 0
                before = self.before.get(name)
                dtype = self.extras.state_dtype or (p.dtype if before is None else before.dtype)
                value = narrowed(local(tensor), dtype, self._stream(column, states))
                states[name] = self._in_place(name, value)
        if states:
            self.optimizer.state[p].update(states)

    def _in_place(self, name: str, value: Tensor) -> Any:
        """A state keeps its memory."""
        before = self.before.get(name)
        if before is None or before.dtype is not value.dtype:
            return like(value, self.p)
        local(before).copy_(value)
        return before

    def _elementwise(self, name: str, tensor: Any) -> bool:
        return (
            isinstance(tensor, Tensor)
            and tensor.is_floating_point()
            and name not in ("step", "kahan_comp", *self.optimizer._numbers())
        )

    def _stream(self, column: int, states: dict[str, Any]) -> int | Tensor | None:
        return stream(self.extras, self.p.dtype, states, self.number, column)


def stream(
    extras: Extras, weight: torch.dtype, states: Mapping[str, Any], number: int, column: int
) -> int | Tensor | None:
    """The noise of one column (0 the weight, then the states) of a weight's step; None = round to the nearest."""
    if not extras.stochastic_rounding or (column == 0 and extras.kahan_for(weight)):
        return None
    step = states["step"]
    if isinstance(step, Tensor) and step.device.type != "cpu":  # nothing waits for it
        return _noise.key(extras.seed, step.to(torch.int64), number, column)
    return _noise.key(extras.seed, int(step), number, column)


def narrowed(
    x: Tensor, dtype: torch.dtype, noise: int | Tensor | None, places: Tensor | None = None
) -> Tensor:
    """`x` as it is stored; `places`: of its elements in the memory of what they are part of."""
    if x.dtype is dtype:
        return x
    if noise is not None and dtype in HALVES:
        return _noise.rounded(x.to(torch.float32), dtype, noise, places)
    return x.to(dtype)


def lost(wide: Tensor, stored: Tensor) -> Tensor:
    """What rounding took away; an overflow is not to be made up for."""
    return (wide - stored.to(wide.dtype)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(stored.dtype)


@torch.no_grad()
def keep_precision(optimizer: Extended, state_dict: Mapping[str, Any]) -> None:
    """Give states the dtype that was chosen, or that they were saved with, after torch has cast them."""
    chosen = optimizer._extras.state_dtype
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in zip(numbers, weights, strict=True):
        for name, saved in state_dict["state"].get(number, {}).items():
            if not isinstance(saved, Tensor) or name == "step" or not saved.is_floating_point():
                continue
            dtype: torch.dtype | None
            if name in optimizer._numbers():
                dtype = saved.dtype if chosen is not None or p.dtype in HALVES else None
                dtype = torch.float32 if dtype in HALVES else dtype  # torch narrows them with each resume
            elif name == "kahan_comp":
                dtype = saved.dtype
            elif chosen is None and p.dtype in HALVES and saved.dtype not in HALVES:
                dtype = torch.float32
            else:
                dtype = chosen
            now = optimizer.state[p].get(name)
            if now is not None and dtype is not None and now.dtype is not dtype:
                optimizer.state[p][name] = saved.to(device=now.device, dtype=dtype, copy=True)


@torch.no_grad()
def cast_states(optimizer: Extended) -> None:
    """Give states that torch makes before the first step the dtype that was chosen."""
    chosen = optimizer._extras.state_dtype
    for entry in optimizer.state.values() if chosen is not None else ():
        for name, tensor in entry.items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and name != "step":
                entry[name] = tensor.to(chosen)
