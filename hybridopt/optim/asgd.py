"""ASGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._base import FusedStep
from hybridopt.optim._implementation import Implementation
from hybridopt.rules.asgd import RULE


class ASGD(FusedStep, torch.optim.ASGD):
    """`torch.optim.ASGD` with a compiled step: same arguments, same results, same state dict.

    Args:
        params, lr, lambd, alpha, t0, weight_decay, foreach, maximize, differentiable, capturable: as in
            torch.
        fused: `True` is another spelling of `implementation="fused"` (torch has no fused ASGD).
        implementation: `"auto"` (default): compiled where it can be, else torch's default; `"fused"`: the same,
            with one warning where it cannot; `"foreach"`, `"reference"`: torch's own.

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
        implementation: Implementation = "auto",
    ) -> None:
        torch.optim.ASGD.__init__(
            self, params, lr, lambd, alpha, t0, weight_decay, foreach, maximize, differentiable, capturable
        )
        self._choose(implementation, foreach, fused)

    def _hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return float(group["lr"]), group["lambd"], group["alpha"], group["t0"], group["weight_decay"]

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return (group["maximize"], bool(group["weight_decay"] != 0))
