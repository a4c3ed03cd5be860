"""ASGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._base import FusedStep
from hybridopt.optim._extras import StepOptions
from hybridopt.rules.asgd import RULE


class ASGD(FusedStep, torch.optim.ASGD):
    """`torch.optim.ASGD` with a compiled step: same arguments, same results, same state dict.

    Args:
        params, lr, lambd, alpha, t0, weight_decay, foreach, maximize, differentiable, capturable: as in
            torch.
        fused: `True` is another spelling of `implementation="fused"` (torch has no fused ASGD).
        options: `implementation`, `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`,
            `seed`, `flatten`, all by keyword; see `StepOptions`.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([1.0, -1.0], requires_grad=True)
        >>> optimizer = hybridopt.optim.ASGD([x], lr=0.1)
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
        lambd: float = 0.0001,
        alpha: float = 0.75,
        t0: float = 1000000.0,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.ASGD.__init__(
            self, params, lr, lambd, alpha, t0, weight_decay, foreach, maximize, differentiable, capturable
        )
        self._configure(options, foreach, fused)

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return group["lr"], group["lambd"], group["alpha"], group["t0"], group["weight_decay"]

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return (group["maximize"], bool(group["weight_decay"] != 0))
