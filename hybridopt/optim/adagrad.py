"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._base import FusedStep
from hybridopt.optim._extras import StepOptions
from hybridopt.rules.adagrad import RULE


class Adagrad(FusedStep, torch.optim.Adagrad):
    """`torch.optim.Adagrad` with a compiled step: same arguments, same results, same state dict.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize,
            differentiable, fused: as in torch.
        options: `implementation`, `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`,
            `seed`, `flatten`, all by keyword; see `StepOptions`.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([1.0, -1.0], requires_grad=True)
        >>> optimizer = hybridopt.optim.Adagrad([x], lr=0.1)
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
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.Adagrad.__init__(
            self,
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        self._configure(options, foreach, fused)

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return group["lr"], group["lr_decay"], group["eps"], group["weight_decay"]

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return (group["maximize"], bool(group["weight_decay"] != 0))
