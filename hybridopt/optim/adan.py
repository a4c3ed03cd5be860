"""Adan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from hybridopt.errors import MethodError
from hybridopt.optim._extras import StepOptions
from hybridopt.optim.own import RuleOptimizer
from hybridopt.rules.adan import RULE


class Adan(RuleOptimizer):
    """Adam with Nesterov momentum in three moments: of the gradient, of its change, and of both squared.

    Xie et al. 2022; four states of memory.

    Args:
        params: weights or parameter groups, real and dense.
        lr: step size.
        betas: decay of the moments of the gradient, of its change, and of their square (1 - beta in the paper).
        eps: added to the root.
        weight_decay: decoupled, applied as a division by 1 + lr * weight_decay.
        maximize: ascend.
        foreach, fused: `True` is another spelling of `implementation="foreach"`, `"fused"`.
        options: `implementation`, `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`,
            `seed`, `flatten`, all by keyword; see `StepOptions`.

    Raises:
        MethodError: a hyperparameter is out of range, or a weight is complex or has a sparse gradient.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([1.0, -1.0], requires_grad=True)
        >>> optimizer = hybridopt.optim.Adan([x], lr=0.05)
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     loss = (x**2).sum()
        ...     loss.backward()
        ...     optimizer.step()
        >>> loss.item() < 0.5
        True
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0 or not all(0 <= beta < 1 for beta in betas) or not eps >= 0:
            raise MethodError(
                f"Adan: expected lr >= 0, weight_decay >= 0 and betas in [0, 1), got lr={lr}, betas={betas}, "
                f"weight_decay={weight_decay}"
            )
        super().__init__(
            params,
            {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "maximize": maximize},
            foreach=foreach,
            fused=fused,
            **options,
        )

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return group["lr"], *group["betas"], group["eps"], group["weight_decay"]

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return (group["maximize"],)
