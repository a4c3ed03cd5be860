"""Adan (Xie et al. 2022, "Adan: Adaptive Nesterov Momentum Algorithm", algorithm 1), with bias correction."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(
    step: float, lr: float, beta1: float, beta2: float, beta3: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    """Betas are decay rates (0.98, 0.92, 0.99); the paper writes 1 - beta."""
    first = xp.where(step < 1.5, 0.0, 1.0)  # the first gradient has no predecessor
    bias1, bias2, bias3 = 1 - beta1**step, 1 - beta2**step, xp.sqrt(1 - beta3**step)
    return (
        1 - beta1,
        beta2,
        1 - beta2,
        1 - beta3,
        lr / bias1,
        lr * beta2 / bias2,
        bias3,
        eps,
        1 + lr * weight_decay,
        first,
    )


def _update(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_diff: Any,
    exp_avg_sq: Any,
    previous: Any,
    rate1: Any,
    beta2: Any,
    rate2: Any,
    rate3: Any,
    step1: Any,
    step2: Any,
    correction: Any,
    eps: Any,
    shrink: Any,
    first: Any,
    *,
    maximize: bool,
) -> tuple[Any, ...]:
    if maximize:
        g = -g
    change = (g - previous) * first
    exp_avg = exp_avg + (g - exp_avg) * rate1
    exp_avg_diff = exp_avg_diff + (change - exp_avg_diff) * rate2
    ahead = g + change * beta2
    exp_avg_sq = exp_avg_sq + (ahead * ahead - exp_avg_sq) * rate3
    root = xp.sqrt(exp_avg_sq) / correction + eps
    p = (p - (exp_avg * step1 + exp_avg_diff * step2) / root) / shrink
    return p, exp_avg, exp_avg_diff, exp_avg_sq, g


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(State("exp_avg"), State("exp_avg_diff"), State("exp_avg_sq"), State("previous_grad")),
    hyper=("lr", "beta1", "beta2", "beta3", "eps", "weight_decay"),
)
