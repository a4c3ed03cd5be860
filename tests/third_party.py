"""Methods as a third party would write them: what the contract, resume and copy tests run besides our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import torch
from scipy.optimize import minimize

from hybridopt import registry
from hybridopt.ledger import Reason
from hybridopt.solver import Ask, BlockingMethod, Ending, Start


@dataclass(frozen=True)
class NelderMead(BlockingMethod):
    """A blocking solver behind the whole of an adapter."""

    name: ClassVar[str] = "third.nelder_mead"

    xatol: float = 1e-4

    def solve(self, ask: Ask, start: Start) -> Ending:
        r = minimize(
            ask.value, start.x0, method="nelder-mead", options={"xatol": self.xatol, "maxiter": 10_000}
        )
        return Ending(Reason.CONVERGED if r.success else Reason.STALLED, r.message, float(r.fun), r.x)


class SignSGD(torch.optim.Optimizer):
    """A torch optimizer with a state of its own."""

    def __init__(self, params: Any, lr: float = 0.1, decay: float = 0.99) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["size"] = torch.full_like(p, group["lr"], dtype=torch.float32)
                state["size"].mul_(group["decay"])
                p.sub_((state["size"] * p.grad.sign()).to(p.dtype))


class Extragradient(torch.optim.Optimizer):
    """A torch optimizer whose step needs a closure: it looks ahead, comes back, and uses the gradient from there."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        closure = torch.enable_grad()(closure)
        loss = closure()
        assert loss.item() == float(loss)
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in weights]
        for p in weights:
            p.sub_(self.defaults["lr"] * p.grad)
        closure()
        for p, b in zip(weights, before, strict=True):
            p.copy_(b - self.defaults["lr"] * p.grad)
        return loss


@contextmanager
def registered(name: str, cls: type) -> Iterator[None]:
    """As if a package had registered the class under this name by entry point."""
    entries = registry._entries()
    entries[name] = EntryPoint(name=name, value=f"{cls.__module__}:{cls.__qualname__}", group=registry.GROUP)
    try:
        yield
    finally:
        del entries[name]
