"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._base import FusedStep
from hybridopt.optim._implementation import Implementation
from hybridopt.rules.adagrad import RULE


class Adagrad(FusedStep, torch.optim.Adagrad):
    """`torch.optim.Adagrad` with a compiled step: same arguments, same results, same state dict.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize,
            differentiable, fused: as in torch.
        implementation: `"auto"` (default): compiled where it can be, else torch's default; `"fused"`: the same,
            with one warning where it cannot; `"foreach"`, `"reference"`: torch's own.

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
        implementation: Implementation = "auto",
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
        self._choose(implementation, foreach, fused)

    def _hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return float(group["lr"]), group["lr_decay"], group["eps"], float(group["weight_decay"])

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return (group["maximize"], bool(group["weight_decay"] != 0))
