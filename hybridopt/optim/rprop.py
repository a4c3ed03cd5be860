"""Rprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hybridopt.optim._base import FusedStep
from hybridopt.optim._extras import StepOptions
from hybridopt.rules.rprop import RULE


class Rprop(FusedStep, torch.optim.Rprop):
    """`torch.optim.Rprop` with a compiled step: same arguments, same results, same state dict.

    Args:
        params, lr, etas, step_sizes, capturable, foreach, maximize, differentiable: as in torch.
        fused: `True` is another spelling of `implementation="fused"` (torch has no fused Rprop).
        options: `implementation`, `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`,
            `seed`, `flatten`, all by keyword; see `StepOptions`.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([1.0, -1.0], requires_grad=True)
        >>> optimizer = hybridopt.optim.Rprop([x], lr=0.1)
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
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-06, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        torch.optim.Rprop.__init__(
            self,
            params,
            lr,
            etas,
            step_sizes,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
        self._configure(options, foreach, fused)

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return *group["etas"], *group["step_sizes"]

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return (group["maximize"],)
