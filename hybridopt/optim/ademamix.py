"""AdEMAMix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from hybridopt.errors import MethodError
from hybridopt.optim._extras import StepOptions
from hybridopt.optim.own import RuleOptimizer
from hybridopt.rules.ademamix import RULE


class AdEMAMix(RuleOptimizer):
    """Adam whose momentum is mixed with a second, very slow one, so that gradients thousands of steps old still count.

    Pagliardini et al. 2024 (arXiv 2409.03137), algorithm 1; for long runs with a warm-up. In runs shorter than some
    multiples of the slow memory, 1 / (1 - beta3) steps, use AdamW. Three states of memory.

    Args:
        params: weights or parameter groups, real and dense.
        lr: step size.
        betas: decay of the fast moment, of the second moment, and of the slow moment (beta3, the paper's order).
        eps: added to the root.
        weight_decay: decoupled.
        alpha: weight of the slow moment, which is not corrected for its bias; the paper uses 4 to 10.
        T_alpha_beta3: steps over which alpha grows linearly from 0, and beta3 from beta1, as the paper schedules
            them; wants to be the length of the run. None: no warm-up, which the paper found unstable for large alpha.
        maximize: ascend.
        foreach, fused: `True` is another spelling of `implementation="foreach"`, `"fused"`.
        options: `implementation`, `state_dtype`, `stochastic_rounding`, `kahan_sum`, `max_grad_norm`, `nonfinite`,
            `seed`, `flatten`, all by keyword; see `StepOptions`.

    Raises:
        MethodError: a hyperparameter is out of range, or a weight is complex or has a sparse gradient.

    Example:
        >>> import torch, hybridopt
        >>> from hybridopt.optim.ademamix import AdEMAMix
        >>> x = torch.tensor([1.0, -1.0], requires_grad=True)
        >>> optimizer = hybridopt.optim.AdEMAMix([x], lr=0.05, T_alpha_beta3=1000)
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
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 5.0,
        T_alpha_beta3: int | None = None,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        if (
            not lr >= 0
            or not weight_decay >= 0
            or not eps >= 0
            or not alpha >= 0
            or len(betas) != 3
            or not all(0 <= beta < 1 for beta in betas)
            or not betas[2] > 0
            or not (T_alpha_beta3 is None or T_alpha_beta3 >= 1)
        ):
            raise MethodError(
                "AdEMAMix: expected lr, eps, weight_decay and alpha >= 0, three betas in [0, 1), the third > 0, and "
                f"T_alpha_beta3 >= 1 or None, got lr={lr}, eps={eps}, weight_decay={weight_decay}, alpha={alpha}, "
                f"betas={betas}, T_alpha_beta3={T_alpha_beta3}"
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "alpha": alpha,
                "T_alpha_beta3": T_alpha_beta3,
                "maximize": maximize,
            },
            foreach=foreach,
            fused=fused,
            **options,
        )

    def _hyper(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        beta1, beta2, beta3 = group["betas"]
        options = (group["alpha"], group["eps"], group["weight_decay"])
        return (
            group["lr"],
            beta1,
            beta2,
            beta3,
            *options,
            _memory(beta1),
            _memory(beta3),
            group["T_alpha_beta3"] or 1,
        )

    def _flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        return (group["maximize"],)


def _memory(beta: float) -> float:
    """Steps after which a moment keeps 1/e of what it held; 0 for one that remembers nothing."""
    return -1 / math.log(beta) if beta > 0 else 0.0
