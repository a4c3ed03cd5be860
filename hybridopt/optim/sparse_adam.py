"""SparseAdam."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._implementation import Chosen, Implementation


class SparseAdam(Chosen, torch.optim.SparseAdam):
    """`torch.optim.SparseAdam`, its rows gathered, updated and put back at once: same arguments, same results.

    For dense weights with sparse gradients (`Embedding(sparse=True)`); rows without a gradient keep weight and
    moments, which is why it is lazier than Adam. torch adds three sparse tensors to dense ones in each step, which
    costs several times more. Hybrid gradients with several sparse dimensions are served too.

    Args:
        params, lr, betas, eps, maximize: as in torch.
        foreach, fused: `True` is another spelling of `implementation="foreach"`, `"fused"`.
        implementation: `"auto"` (default) and `"foreach"`: gathered rows, on any device; `"reference"`: torch's own
            step; `"fused"`: not there, gathered rows run instead after one warning. `repr` says which.

    Example:
        >>> import torch, hybridopt
        >>> table = torch.nn.Embedding(3, 2, sparse=True, _weight=torch.ones(3, 2))
        >>> optimizer = hybridopt.optim.SparseAdam(table.parameters(), lr=0.1)
        >>> table(torch.tensor([2, 2])).sum().backward()
        >>> optimizer.step()
        >>> table.weight.detach()
        tensor([[1.0000, 1.0000],
                [1.0000, 1.0000],
                [0.9000, 0.9000]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        torch.optim.SparseAdam.__init__(self, params, lr, betas, eps, maximize)
        self._choose(implementation, foreach, fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one update.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.

        Returns:
            The closure's loss, or None.
        """
        if self._implementation == "reference":
            self._say("torch's own code")
            return inspect.unwrap(torch.optim.SparseAdam.step)(self, closure)  # hooks have run around us
        self._say("gathered rows")
        if self._implementation == "fused" and not self._warned:
            self._warned = True
            warnings.warn(
                "SparseAdam: fused was asked for, but there is no compiled loop over rows; gathered rows run instead",
                RuntimeWarning,
                stacklevel=3,  # torch's profiling wrapper is between
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            if not all(p.grad.is_sparse for p in with_grad):
                raise RuntimeError(
                    "SparseAdam does not support dense gradients, please consider Adam instead"
                )
            for p in with_grad:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["step"] += 1
                _update(p, state, group)
        return loss


def _update(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Adam on the rows that have a gradient: torch's operations in torch's order, in few buffers."""
    assert p.grad is not None
    grad = p.grad.coalesce()  # repeated rows add up
    g, at = grad.values(), grad.indices().unbind()
    if g.numel() == 0:
        return
    if group.get("maximize", False):
        g = -g
    lr = group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
    beta1, beta2 = group["betas"]
    rows = _take(state["exp_avg"], at)
    exp_avg = g.sub(rows).mul_(1 - beta1).add_(rows)
    _put(state["exp_avg"], at, exp_avg)
    rows = _take(state["exp_avg_sq"], at, out=rows)
    exp_avg_sq = g.pow(2).sub_(rows).mul_(1 - beta2).add_(rows)
    _put(state["exp_avg_sq"], at, exp_avg_sq)
    # both biases in the step, so that eps is compared with the uncorrected root (Kingma & Ba 2015, end of section 2)
    size = lr * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
    move = exp_avg.div_(exp_avg_sq.sqrt_().add_(group["eps"])).mul_(-size)
    _put(p, at, _take(p, at, out=rows).add_(move))


def _take(t: Tensor, at: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
    """The slices of `t` at these indices into its first dimensions, as a copy; in `out` where that saves memory."""
    if len(at) == 1:
        return torch.index_select(t.detach(), 0, at[0], out=out)
    return t[at] if at else t.unsqueeze(0).clone()  # no index at all: the gradient is one dense slice


def _put(t: Tensor, at: tuple[Tensor, ...], values: Tensor) -> None:
    if len(at) == 1:
        t.index_copy_(0, at[0], values)
    else:
        t[at or ...] = values
