"""LAMB."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.errors import MethodError
from hybridopt.optim._extended import Extended
from hybridopt.optim._extras import HALVES, StepOptions
from hybridopt.optim._implementation import outside_graphs
from hybridopt.optim._shards import like, local, shards_known, whole_norms
from hybridopt.optim._wide import lost, narrowed, stream
from hybridopt.optim.own import RuleOptimizer
from hybridopt.rules.lamb import RULE

_SHARED = ("betas", "eps", "weight_decay", "maximize")
_BLOCK = 1 << 15  # elements summed in one go; see `_in_blocks`


class LAMB(Extended):
    """Adam whose step in each tensor is as long as the learning rate times the tensor's own norm; for huge batches.

    You et al. 2020 (arXiv 1904.00962), algorithm 2: x <- x - lr * |x| / |u| * u with u = r + weight_decay * x, and r
    Adam's step with both biases corrected. phi is the identity, as in the paper's experiments and in apex: no bounds on
    the ratio. A tensor whose norm, or whose u, is zero takes the ratio 1. Differs from apex: every tensor has its
    ratio (apex spares those without weight decay), and gradients are clipped only under `max_grad_norm`. With small
    batches use AdamW.

    The norms are taken over tensors, so it matters how a model is cut into them. The same bits for any number of
    threads. Besides two states, keeps one tensor as scratch for each weight.

    Args:
        params: weights or parameter groups, real and dense.
        lr: length of a step, as a fraction of the norm of each tensor.
        betas: decay of the first and second moment.
        eps: added to the root.
        weight_decay: lambda; part of the direction, hence scaled by the ratio too.
        maximize: ascend.
        foreach, fused: `True` is another spelling of `implementation="foreach"`, `"fused"`.
        implementation: of the moments and the direction; norms and step are torch's list functions. `"auto"`
            (default) or `"fused"`: one compiled loop on the CPU where it can be; `"foreach"`: torch's list functions,
            on any device; `"reference"`: tensor by tensor.
        options: `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`, `seed`, by keyword;
            see `StepOptions`.

    Raises:
        MethodError: a hyperparameter is out of range, or a weight is complex or has a sparse gradient.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([3.0, -4.0], requires_grad=True)
        >>> optimizer = hybridopt.optim.LAMB([x], lr=0.1, weight_decay=0.0)
        >>> (x**2).sum().backward()
        >>> optimizer.step()  # 0.1 of its norm 5, evenly in both: Adam's first step has equal entries
        >>> x.detach().round(decimals=3)
        tensor([ 2.6460, -3.6460])
    """

    _directions: _Directions | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0 or not all(0 <= beta < 1 for beta in betas) or not eps >= 0:
            raise MethodError(
                f"LAMB: expected lr, eps and weight_decay >= 0 and betas in [0, 1), got lr={lr}, eps={eps}, "
                f"weight_decay={weight_decay}, betas={betas}"
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
        )
        self._configure(options, foreach, fused)

    def _active(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    @property
    def skipped_steps(self) -> int:
        """See `Extended.skipped_steps`; the directions count."""
        return int(self._skipped) + (0 if self._directions is None else self._directions.skipped_steps)

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
        with shards_known(self):
            self._torch_step()
        return loss

    @torch.no_grad()
    def _torch_step(self) -> None:
        """The directions' step, which also looks for gradients to be clipped or refused; then the weights'."""
        directions = self._ready()
        before = directions._skipped
        before = before.clone() if isinstance(before, Tensor) else before
        try:
            directions._update()  # not `step`: hooks of all optimizers are to see ours alone
            self._say(directions._used)
            done = directions._skipped == before  # on a device a tensor, for which nothing waits
            if done is not False:
                for index in range(len(self.param_groups)):
                    self._move(index, directions.param_groups[index]["params"], done)
        finally:  # gradients are not ours to keep
            for scratch in directions.param_groups:
                for u in scratch["params"]:
                    u.grad = None

    def _move(self, index: int, directions: list[Tensor], done: bool | Tensor) -> None:
        """Move the weights of a group, 16-bit ones as float32, unless the step of the directions was skipped."""
        group = self.param_groups[index]
        numbers = self._streams(index)
        moved = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        if not moved:
            return
        weights: list[Tensor] = [group["params"][i] for i in moved]
        params = [local(p) for p in weights]
        wide = [p.float() if p.dtype in HALVES else p for p in params]
        for weight, w in zip(weights, wide, strict=True):
            if "kahan_comp" in self.state[weight] and self._extras.kahan_for(weight.dtype):
                w.add_(local(self.state[weight]["kahan_comp"]))
        _move(wide, [local(directions[i]) for i in moved], weights, group["lr"], done)
        for i, weight, p, w in zip(moved, weights, params, wide, strict=True):
            if w is not p:
                state = self.state[weight]
                p.copy_(narrowed(w, p.dtype, stream(self._extras, p.dtype, state, numbers[i], 0)))
                if self._extras.kahan_for(p.dtype):
                    state["kahan_comp"] = like(lost(w, p), weight)

    def _ready(self) -> _Directions:
        """The directions' optimizer, its options, gradients and states being ours of now."""
        directions = self._directions
        if directions is None or not directions.fits(self.param_groups):
            self._skipped = self.skipped_steps
            directions = self._directions = _Directions(self)
        for group, scratch in zip(self.param_groups, directions.param_groups, strict=True):
            scratch.update((key, group[key]) for key in (*_SHARED, "param_names") if key in group)
            for p, u in zip(group["params"], scratch["params"], strict=True):
                u.grad = p.grad
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        for name in self._active(group):
                            state[name] = torch.zeros_like(
                                p, dtype=self._extras.state_dtype, memory_format=torch.preserve_format
                            )
                    directions.state[u].update((name, state[name]) for name in ("step", *self._active(group)))
                    directions.state[u]["weight"] = p
        return directions


class _Directions(RuleOptimizer):
    """Runs LAMB's rule on scratch tensors, one for each weight; what it steps are directions, not weights."""

    rule = RULE

    def __init__(self, lamb: LAMB) -> None:
        scratch = [
            {
                **{key: g[key] for key in _SHARED},
                "params": [torch.zeros_like(p, dtype=_wide(p.dtype)) for p in g["params"]],
            }
            for g in lamb.param_groups
        ]
        super().__init__(scratch, {}, implementation=lamb.implementation)
        self._extras, self._guarded = replace(lamb._extras, kahan_sum=False), lamb._guarded
        for group in scratch:
            for u in group["params"]:
                u.grad_dtype = None  # lent gradients may be of 16 bits

    def _has_halves(self) -> bool:
        weights = [p for group in self.param_groups for p in group["params"]]
        return any(p.grad is not None and p.grad.dtype in HALVES for p in weights)

    def fits(self, groups: list[dict[str, Any]]) -> bool:
        """Whether there is a scratch tensor like each weight."""
        return [len(g["params"]) for g in groups] == [len(g["params"]) for g in self.param_groups] and all(
            u.shape == p.shape
            and u.dtype is _wide(p.dtype)
            and u.device == p.device
            and u.stride() == p.stride()
            for group, scratch in zip(groups, self.param_groups, strict=True)
            for p, u in zip(group["params"], scratch["params"], strict=True)
        )

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return *group["betas"], group["eps"], group["weight_decay"]

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return group["maximize"], group["weight_decay"] != 0


_Directions.__name__ = "LAMB"  # its warnings and errors are LAMB's


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of the arithmetic."""
    return torch.float32 if dtype in HALVES else dtype


def _move(
    params: list[Tensor],
    directions: list[Tensor],
    weights: list[Tensor],
    lr: float | Tensor,
    done: bool | Tensor,
) -> None:
    """Set x to x - lr * |x| / |u| * u, of shards with the norms of their weights; x stays where not `done`."""
    device = params[0].device
    norms = torch.stack([n.to(device) for n in _norms([*params, *directions])]).view(2, -1)
    lengths, steps = whole_norms(norms, weights)
    ratios = torch.where((lengths > 0) & (steps > 0), lengths / steps, 1.0)
    if isinstance(lr, Tensor):
        ratios, lr = ratios * lr.to(device), 1.0
    if isinstance(done, Tensor):
        ratios = torch.where(done.to(device), ratios, 0.0)
    beside = [ratio.to(p.device) for ratio, p in zip(ratios.unbind(), params, strict=True)]
    torch._foreach_addcmul_(params, directions, beside, value=-lr)


def _norms(tensors: list[Tensor]) -> Any:
    """In float32 at least; in one dtype, so that they can be stacked."""
    dtype = functools.reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    return torch._foreach_norm([_in_blocks(t) for t in tensors], dtype=dtype)


def _in_blocks(t: Tensor) -> Tensor:
    """A tensor with the same norm and at most `_BLOCK` elements.

    On the CPU torch adds all squares of a tensor in float32, one after another in a few lanes (relative error 9e-6 for
    1 M elements, torch 2.13). Blocks are right to 1e-7, and sum in an order that no number of threads changes.
    """
    if t.device.type != "cpu" or t.numel() < _BLOCK:
        return t
    flat = t.reshape(-1)
    blocks, rest = torch.split(flat, [t.numel() // _BLOCK * _BLOCK, t.numel() % _BLOCK])
    parts = [torch.linalg.vector_norm(blocks.view(-1, _BLOCK), dim=1), torch.linalg.vector_norm(rest).view(1)]
    return _in_blocks(torch.cat(parts))
