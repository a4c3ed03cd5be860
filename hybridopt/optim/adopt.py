"""ADOPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from hybridopt.errors import MethodError
from hybridopt.optim._extras import StepOptions
from hybridopt.optim.own import RuleOptimizer
from hybridopt.rules.adopt import RULE


class ADOPT(RuleOptimizer):
    """Adam whose second moment is one step older than the gradient it scales, so that any beta2 converges.

    Taniguchi et al. 2024. The first step only measures the second moment and moves no weight.

    Args:
        params: weights or parameter groups, real and dense.
        lr: step size.
        betas: decay of the first and second moment.
        eps: lower limit of the root of the second moment.
        weight_decay: see `decouple`.
        maximize: ascend.
        decouple: shrink the weights by lr * weight_decay instead of adding weight_decay * weight to the gradient.
        foreach, fused: `True` is another spelling of `implementation="foreach"`, `"fused"`.
        options: `implementation`, `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`,
            `seed`, `flatten`, all by keyword; see `StepOptions`.

    Raises:
        MethodError: a hyperparameter is out of range, or a weight is complex or has a sparse gradient.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([1.0, -1.0], requires_grad=True)
        >>> optimizer = hybridopt.optim.ADOPT([x], lr=0.05)
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
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        decouple: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0 or not all(0 <= beta < 1 for beta in betas) or not eps > 0:
            raise MethodError(
                f"ADOPT: expected lr >= 0, weight_decay >= 0 and betas in [0, 1), got lr={lr}, betas={betas}, "
                f"weight_decay={weight_decay}"
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "decouple": decouple,
            },
            foreach=foreach,
            fused=fused,
            **options,
        )

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return group["lr"], *group["betas"], group["eps"], group["weight_decay"]

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return group["maximize"], group["weight_decay"] != 0, group["decouple"]
