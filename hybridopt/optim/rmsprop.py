"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._base import FusedStep
from hybridopt.optim._extras import StepOptions
from hybridopt.rules.rmsprop import RULE


class RMSprop(FusedStep, torch.optim.RMSprop):
    """`torch.optim.RMSprop` with a compiled step: same arguments, same results, same state dict.

    Args:
        params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize,
            differentiable: as in torch.
        fused: `True` is another spelling of `implementation="fused"` (torch has no fused RMSprop).
        options: `implementation`, `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`,
            `seed`, `flatten`, all by keyword; see `StepOptions`.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([1.0, -1.0], requires_grad=True)
        >>> optimizer = hybridopt.optim.RMSprop([x], lr=0.1)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     loss = (x**2).sum()
        ...     loss.backward()
        ...     optimizer.step()
        >>> loss.item() < 2
        True
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.RMSprop.__init__(
            self,
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )
        self._configure(options, foreach, fused)

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return group["lr"], group["alpha"], group["eps"], group["weight_decay"], group["momentum"]

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return (group["maximize"], bool(group["weight_decay"] != 0), group["centered"], group["momentum"] > 0)
