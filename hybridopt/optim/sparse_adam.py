"""SparseAdam."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._extended import Extended
from hybridopt.optim._extras import HALVES, Extras, StepOptions
from hybridopt.optim._implementation import outside_graphs
from hybridopt.optim._wide import lost, narrowed, stream


class SparseAdam(Extended, torch.optim.SparseAdam):
    """`torch.optim.SparseAdam`, its rows gathered, updated and put back at once: same arguments, same results.

    For dense weights with sparse gradients (`Embedding(sparse=True)`); rows without a gradient keep weight and
    moments, which is why it is lazier than Adam. torch adds three sparse tensors to dense ones in each step, which
    costs several times more. Hybrid gradients with several sparse dimensions are served too.

    Args:
        params, lr, betas, eps, maximize: as in torch.
        foreach, fused: `True` is another spelling of `implementation="foreach"`, `"fused"`.
        implementation: `"auto"` (default) and `"foreach"`: gathered rows, on any device; `"reference"`: torch's own
            step; `"fused"`: not there, gathered rows run instead after one warning. `repr` says which.
        options: `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`, `seed`, by keyword;
            see `StepOptions`. They cost no more than the rows that have a gradient (under `"reference"`: whole copies).

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
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.SparseAdam.__init__(self, params, lr, betas, eps, maximize)
        self._configure(options, foreach, fused)

    def _active(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    @outside_graphs
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one update.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        reference = self._implementation == "reference"
        self._say("torch's own code" if reference else "gathered rows")
        if self._implementation == "fused" and not self._warned:
            self._warned = True
            warnings.warn(
                "SparseAdam: fused was asked for, but there is no compiled loop over rows; gathered rows run instead",
                RuntimeWarning,
                stacklevel=4,  # `outside_graphs` and torch's profiling wrapper are between
            )
        self._guarded_step()
        return loss

    def _torch_step(self) -> None:
        inspect.unwrap(torch.optim.SparseAdam.step)(self)  # hooks have run around us

    @torch.no_grad()
    def _elsewhere(self, factor: float | None) -> None:
        if self._implementation == "reference":
            super()._elsewhere(factor)
            return
        for index, group in enumerate(self.param_groups):
            numbers = self._streams(index)
            with_grad = [(p, n) for p, n in zip(group["params"], numbers, strict=True) if p.grad is not None]
            if not all(p.grad.is_sparse for p, _ in with_grad):
                raise RuntimeError(
                    "SparseAdam does not support dense gradients, please consider Adam instead"
                )
            for p, number in with_grad:
                state = self.state[p]
                if not state:
                    dtype = self._extras.state_dtype
                    state["step"] = 0
                    for name in self._active(group):
                        state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                if self._extras.kahan_for(p.dtype) and "kahan_comp" not in state:
                    state["kahan_comp"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["step"] += 1
                _update(p, state, group, factor, self._extras, number)


def _update(
    p: Tensor, state: dict[str, Any], group: dict[str, Any], factor: float | None, extras: Extras, number: int
) -> None:
    """Adam on the rows that have a gradient: torch's operations in torch's order, in few buffers."""
    assert p.grad is not None
    grad = p.grad.coalesce()  # repeated rows add up
    dtype = torch.float32 if p.dtype in HALVES else p.dtype
    g, at = grad.values().to(dtype), grad.indices().unbind()
    if g.numel() == 0:
        return
    g = g if factor is None else g * factor
    places = _places(p, at, g.shape) if extras.stochastic_rounding else None

    def put(t: Tensor, column: int, values: Tensor) -> Tensor:
        noise = stream(extras, p.dtype, state, number, column)
        values = narrowed(values, t.dtype, noise, places)
        _put(t, at, values)
        return values

    if group.get("maximize", False):
        g = -g
    lr = group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
    beta1, beta2 = group["betas"]
    rows = _take(state["exp_avg"], at, dtype)
    exp_avg = g.sub(rows).mul_(1 - beta1).add_(rows)
    put(state["exp_avg"], 1, exp_avg)
    rows = _take(state["exp_avg_sq"], at, dtype, out=rows)
    exp_avg_sq = g.pow(2).sub_(rows).mul_(1 - beta2).add_(rows)
    put(state["exp_avg_sq"], 2, exp_avg_sq)
    # both biases in the step, so that eps is compared with the uncorrected root (Kingma & Ba 2015, end of section 2)
    size = lr * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
    move = exp_avg.div_(exp_avg_sq.sqrt_().add_(group["eps"])).mul_(-size)
    rows = _take(p, at, dtype, out=rows)
    kahan = extras.kahan_for(p.dtype)
    if kahan:
        rows.add_(_take(state["kahan_comp"], at, dtype))
    told = put(p, 0, rows.add_(move))
    if kahan:
        _put(state["kahan_comp"], at, lost(rows, told))


def _places(p: Tensor, at: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
    """The numbers of gathered elements in the memory of `p`, which are what their noise depends on."""
    places = torch.zeros(shape, dtype=torch.int64, device=p.device)
    for d, (size, stride) in enumerate(zip(p.shape, p.stride(), strict=True)):
        index = at[d] if d < len(at) else torch.arange(size, device=p.device)
        dimension = 0 if d < len(at) else d - len(at) + 1
        places += (index * stride).view([-1 if k == dimension else 1 for k in range(len(shape))])
    return places


def _take(t: Tensor, at: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The slices of `t` at these indices into its first dimensions, as a copy; in `out` where that saves memory."""
    if len(at) == 1:
        return torch.index_select(t.detach(), 0, at[0], out=out if t.dtype is dtype else None).to(dtype)
    # no index at all: the gradient is one dense slice
    return (t[at] if at else t.unsqueeze(0).clone()).to(dtype)


def _put(t: Tensor, at: tuple[Tensor, ...], values: Tensor) -> None:
    if len(at) == 1:
        t.index_copy_(0, at[0], values)
    else:
        t[at or ...] = values
