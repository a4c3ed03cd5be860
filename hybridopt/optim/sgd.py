"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._base import FusedStep
from hybridopt.optim._extras import StepOptions
from hybridopt.rules.sgd import RULE


class SGD(FusedStep, torch.optim.SGD):
    """`torch.optim.SGD` with a compiled step: same arguments, same results, same state dict.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused:
            as in torch.
        options: `implementation`, `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`,
            `seed`, `flatten`, all by keyword; see `StepOptions`.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> x.grad = torch.tensor([2.0])
        >>> hybridopt.optim.SGD([x], lr=0.1).step()
        >>> x.detach()
        tensor([0.8000])
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.SGD.__init__(
            self,
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._configure(options, foreach, fused)

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return group["lr"], group["momentum"], group["dampening"], group["weight_decay"]

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return group["maximize"], bool(group["weight_decay"] != 0), group["momentum"] != 0, group["nesterov"]
