"""SparseAdam."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._extended import Extended
from hybridopt.optim._extras import HALVES, Extras, StepOptions
from hybridopt.optim._implementation import outside_graphs
from hybridopt.optim._kind import Ineligible
from hybridopt.optim._rows import RowLoop
from hybridopt.optim._wide import lost, narrowed, stream
from hybridopt.rules.adam import RULE

GATHERED = "gathered rows"
_STATES = ("exp_avg", "exp_avg_sq")


class SparseAdam(Extended, torch.optim.SparseAdam):
    """`torch.optim.SparseAdam`, Adam's rule on the rows that have a gradient, where they stand: same results.

    For dense weights with sparse gradients (`Embedding(sparse=True)`); rows without a gradient keep weight and
    moments, which is why it is lazier than Adam. Hybrid gradients with several sparse dimensions are served too. A
    learning rate that is a tensor counts as the number it holds.

    Args:
        params, lr, betas, eps, maximize: as in torch.
        foreach, fused: `True` is another spelling of `implementation="foreach"`, `"fused"`.
        implementation: `"auto"` (default), `"fused"`: one compiled loop over the rows on the CPU, where it can be (rows
            in one piece); else, and under `"foreach"`, the rows are gathered, stepped as one tensor and put back, on
            any device; `"reference"`: torch's own step. `repr` says which.
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

    _why = ""  # rows could not be stepped by the compiled loop
    _loops: Mapping[Tensor, RowLoop] = MappingProxyType({})

    def _settle(self) -> None:
        super()._settle()
        self._loops = {}  # they hold the states

    def _active(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return _STATES

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
        self._why = ""
        self._guarded_step()
        used = "fused (llvm)" if not self._why else f"{GATHERED}: {self._why}"
        self._say({"reference": "torch's own code", "foreach": GATHERED}.get(self._implementation, used))
        if self._implementation == "fused" and self._why:
            self._warn(f"fused was asked for, but {self._why}; {GATHERED} run instead")
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
                try:
                    self._step_rows(p, state, group, factor, number)
                except BaseException:
                    state["step"] -= 1
                    raise

    def _step_rows(
        self, p: Tensor, state: dict[str, Any], group: dict[str, Any], factor: float | None, number: int
    ) -> None:
        """Adam's rule on the rows that have a gradient."""
        assert p.grad is not None
        grad = p.grad.coalesce()  # repeated rows add up
        g, at = grad.values(), grad.indices().unbind()
        if g.numel() == 0:
            return
        g = g if factor is None else g.to(torch.float32 if p.dtype in HALVES else p.dtype) * factor
        beta1, beta2 = map(float, group["betas"])
        # eps is compared with the uncorrected root (Kingma & Ba 2015, end of section 2); the rule will correct it
        eps = group["eps"] / math.sqrt(1 - beta2 ** state["step"])
        hyper = (float(group["lr"]), beta1, beta2, eps, 0.0)
        flags = {
            "amsgrad": False,
            "maximize": group.get("maximize", False),
            "decay": False,
            "decoupled": False,
        }
        if self._implementation != "foreach":
            kahan = ["kahan_comp"] if self._extras.kahan_for(p.dtype) else []
            states, dims = [state[name] for name in (*_STATES, *kahan)], len(at)
            try:
                loop = self._loops.get(p)
                if loop is None or not loop.fits(flags, states, g, dims, number):
                    loop = RowLoop(RULE, flags, p, states, g.dtype, dims, self._extras, number)
                    present = {q for group in self.param_groups for q in group["params"]}
                    self._loops = {**{q: one for q, one in self._loops.items() if q in present}, p: loop}
                loop.step(hyper, g, grad.indices(), state["step"])
            except Ineligible as reason:
                self._why = str(reason)
            else:
                return
        _gathered(p, state, g, at, flags, hyper, self._extras, number)


def _gathered(
    p: Tensor,
    state: dict[str, Any],
    g: Tensor,
    at: tuple[Tensor, ...],
    flags: dict[str, bool],
    hyper: tuple[float, ...],
    extras: Extras,
    number: int,
) -> None:
    """The rule on rows taken out, and put back."""
    dtype = torch.float32 if p.dtype in HALVES else p.dtype
    kahan = extras.kahan_for(p.dtype)
    rows = [_take(t, at, dtype) for t in (p, *(state[name] for name in _STATES))]
    if kahan:
        rows[0].add_(_take(state["kahan_comp"], at, dtype))
    told = RULE.update(
        rows[0], g.to(dtype), *rows[1:], 0.0, *RULE.coefficients_at(state["step"], (), hyper), **flags
    )
    places = _places(p, at, g.shape) if extras.stochastic_rounding else None
    for column, (t, values) in enumerate(zip((p, *(state[name] for name in _STATES)), told, strict=False)):
        stored = narrowed(values, t.dtype, stream(extras, p.dtype, state, number, column), places)
        _put(t, at, stored)
        if kahan and column == 0:
            _put(state["kahan_comp"], at, lost(values, stored))


def _places(p: Tensor, at: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
    """The numbers of gathered elements in the memory of `p`, which are what their noise depends on."""
    places = torch.zeros(shape, dtype=torch.int64, device=p.device)
    for d, (size, stride) in enumerate(zip(p.shape, p.stride(), strict=True)):
        index = at[d] if d < len(at) else torch.arange(size, device=p.device)
        dimension = 0 if d < len(at) else d - len(at) + 1
        places += (index * stride).view([-1 if k == dimension else 1 for k in range(len(shape))])
    return places


def _take(t: Tensor, at: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """The slices of `t` at these indices into its first dimensions, as a copy."""
    if len(at) == 1:
        return torch.index_select(t.detach(), 0, at[0]).to(dtype)
    # no index at all: the gradient is one dense slice
    return (t[at] if at else t.unsqueeze(0).clone()).to(dtype)


def _put(t: Tensor, at: tuple[Tensor, ...], values: Tensor) -> None:
    if len(at) == 1:
        t.index_copy_(0, at[0], values)
    else:
        t[at or ...] = values
