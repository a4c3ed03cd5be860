"""Steps of 16-bit weights, and of states in another precision, where no compiled loop runs: on wider copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridopt.engines import _noise
from hybridopt.optim._extras import HALVES

if TYPE_CHECKING:
    from hybridopt.optim._base import FusedStep


@torch.no_grad()
def wide_step(optimizer: FusedStep, step: Callable[[], None], factor: float | None) -> None:
    """`step` as if 16-bit weights, their gradients and all states were float32, and gradients `factor` times as large.

    Weights get wider memory for the time of the step. If it raises, weights, gradients and states are as before.

    Args:
        optimizer: whose weights are stepped.
        step: its step in Python, which creates missing states.
        factor: of the gradients; None = 1.
    """
    lent: list[_Lent] = []
    number = 0
    for group in optimizer.param_groups:
        active = optimizer._active(group)
        for p in group["params"]:
            if p.grad is not None:
                lent.append(_Lent(optimizer, p, active, number, factor))
            number += 1
    done = False
    try:
        for one in lent:
            one.widen()
        step()
        done = True
    finally:
        for one in lent:
            one.give_back(done)


class _Lent:
    """One weight and its states, in the dtype of the arithmetic while the step runs."""

    def __init__(
        self, optimizer: FusedStep, p: Tensor, active: tuple[str, ...], number: int, factor: float | None
    ) -> None:
        self.extras = optimizer._extras
        self.optimizer = optimizer
        self.p = p
        self.active = active
        self.number = number
        self.factor = factor
        self.grad = p.grad
        self.data = p.data
        self.entry = dict(optimizer.state[p]) if p in optimizer.state else {}
        self.dtype = torch.float32 if p.dtype in HALVES else p.dtype
        self.kahan = self.extras.kahan_for(p.dtype)
        self.swapped = False

    def widen(self) -> None:
        p, grad = self.p, self.grad
        assert grad is not None
        wide = grad.to(self.dtype) if grad.layout is torch.strided else grad
        if self.factor is not None:
            wide = wide * self.factor
        if wide is not grad or p.dtype is not self.dtype:
            self.swapped = True
            p.grad = None
            if p.dtype is not self.dtype:
                data = self.data.to(self.dtype)
                lost = self.entry.get("kahan_comp")
                p.data = data if lost is None or not self.kahan else data + lost.to(self.dtype)
            p.grad = wide
        state = self.optimizer.state[p] if self.entry else {}
        for name, tensor in self.entry.items():
            if self._elementwise(name, tensor):
                state[name] = tensor.to(self.dtype)

    def give_back(self, done: bool) -> None:
        p = self.p
        wide = p.data
        if self.swapped:
            p.grad = None
            p.data = self.data
            p.grad = self.grad
        if not done:
            if self.entry:
                self.optimizer.state[p].update(self.entry)
            elif p in self.optimizer.state:
                del self.optimizer.state[p]
            return
        entry = self.optimizer.state[p]
        if self.extras.stochastic_rounding and not self.optimizer.rule.counts:
            before = entry.get("step", torch.tensor(0.0, device=p.device))
            entry["step"] = before + 1
        if p.dtype is not self.dtype:
            stored = self._stored(wide, p.dtype, 0)
            p.copy_(stored)
            if self.kahan:
                entry["kahan_comp"] = (wide - stored.to(self.dtype)).to(p.dtype)
        for name, tensor in list(entry.items()):
            if self._elementwise(name, tensor) and name != "kahan_comp":
                column = self.active.index(name) + 1 if name in self.active else 0
                before = self.entry.get(name)
                dtype = self.extras.state_dtype or (p.dtype if before is None else before.dtype)
                value = self._stored(tensor, dtype, column)
                if before is not None and before.dtype is dtype:  # the state keeps its memory
                    before.copy_(value)
                    value = before
                entry[name] = value

    def _elementwise(self, name: str, tensor: Any) -> bool:
        return (
            isinstance(tensor, Tensor)
            and tensor.is_floating_point()
            and tensor.shape == self.p.shape
            and name not in ("step", *self.optimizer.rule.scalar_state)
        )

    def _stored(self, x: Tensor, dtype: torch.dtype, column: int) -> Tensor:
        if x.dtype is dtype:
            return x
        if self.extras.stochastic_rounding and dtype is torch.bfloat16 and not (self.kahan and column == 0):
            step = int(self.optimizer.state[self.p]["step"].item())
            single = x.to(torch.float32)
            return _noise.rounded(single, _noise.key(self.extras.seed, step, self.number, column))
        return x.to(dtype)


@torch.no_grad()
def keep_precision(optimizer: FusedStep, state_dict: Mapping[str, Any]) -> None:
    """Give states the dtype that was chosen, or that they were saved with, after torch has cast them."""
    chosen = optimizer._extras.state_dtype
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    counters = (*optimizer.rule.scalar_state, "kahan_comp")
    for number, p in zip(numbers, weights, strict=True):
        for name, saved in state_dict["state"].get(number, {}).items():
            if not isinstance(saved, Tensor) or name == "step" or not saved.is_floating_point():
                continue
            if name in counters:
                dtype = saved.dtype if chosen is not None or p.dtype in HALVES else None
            elif chosen is None and p.dtype in HALVES and saved.dtype not in HALVES:
                dtype = torch.float32
            else:
                dtype = chosen
            now = optimizer.state[p][name]
            if dtype is not None and now.dtype is not dtype:
                optimizer.state[p][name] = saved.to(device=now.device, dtype=dtype, copy=True)


@torch.no_grad()
def cast_states(optimizer: FusedStep) -> None:
    """Give states that torch makes before the first step the dtype that was chosen."""
    chosen = optimizer._extras.state_dtype
    for entry in optimizer.state.values() if chosen is not None else ():
        for name, tensor in entry.items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and name != "step":
                entry[name] = tensor.to(chosen)
