"""Lion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from hybridopt.errors import MethodError
from hybridopt.optim._extras import StepOptions
from hybridopt.optim.own import RuleOptimizer
from hybridopt.rules.lion import RULE


class Lion(RuleOptimizer):
    """The sign of a momentum, decoupled weight decay: one state, steps of equal size in every weight.

    Chen et al. 2023; wants a learning rate 3 to 10 times smaller than AdamW's and a weight decay as much larger.

    Args:
        params: weights or parameter groups, real and dense.
        lr: step size, in weights (every weight moves by it).
        betas: decay of the direction and of the momentum.
        weight_decay: decoupled.
        maximize: ascend.
        foreach, fused: `True` is another spelling of `implementation="foreach"`, `"fused"`.
        options: `implementation`, `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`,
            `seed`, `flatten`, all by keyword; see `StepOptions`.

    Raises:
        MethodError: a hyperparameter is out of range, or a weight is complex or has a sparse gradient.

    Example:
        >>> import torch, hybridopt
        >>> x = torch.tensor([1.0, -1.0], requires_grad=True)
        >>> optimizer = hybridopt.optim.Lion([x], lr=0.05)
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
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise MethodError(
                f"Lion: expected lr >= 0, weight_decay >= 0 and betas in [0, 1), got lr={lr}, betas={betas}, "
                f"weight_decay={weight_decay}"
            )
        super().__init__(
            params,
            {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, "maximize": maximize},
            foreach=foreach,
            fused=fused,
            **options,
        )

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        return group["lr"], *group["betas"], group["weight_decay"]

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return (group["maximize"],)
