"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._base import FusedStep
from hybridopt.optim._implementation import Implementation
from hybridopt.rules.sgd import RULE


class SGD(FusedStep, torch.optim.SGD):
    """`torch.optim.SGD` with a compiled step: same arguments, same results, same state dict.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused:
            as in torch.
        implementation: `"auto"` (default): compiled where it can be, else torch's default; `"fused"`: the same, with
            one warning where it cannot; `"foreach"`, `"reference"`: torch's own.

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
        implementation: Implementation = "auto",
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
        self._choose(implementation, foreach, fused)

    def _hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return float(group["lr"]), group["momentum"], group["dampening"], float(group["weight_decay"])

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return group["maximize"], bool(group["weight_decay"] != 0), group["momentum"] != 0, group["nesterov"]
