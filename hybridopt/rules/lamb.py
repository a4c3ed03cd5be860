"""LAMB's elementwise part (You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2)."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(step: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> tuple[float, ...]:
    return 1 - beta1**step, xp.sqrt(1 - beta2**step), beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay


def _update(
    direction: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    weight: Any,
    bias1: Any,
    bias2: Any,
    beta1: Any,
    rate1: Any,
    beta2: Any,
    rate2: Any,
    eps: Any,
    weight_decay: Any,
    *,
    maximize: bool,
    decay: bool,
) -> tuple[Any, ...]:
    """What is updated is the direction r + lambda x; the weight is read only, its norm decides how far to go."""
    if maximize:
        g = -g
    exp_avg = exp_avg * beta1 + g * rate1
    exp_avg_sq = exp_avg_sq * beta2 + g * g * rate2
    direction = exp_avg / bias1 / (xp.sqrt(exp_avg_sq) / bias2 + eps)
    if decay:
        direction = direction + weight * weight_decay
    return direction, exp_avg, exp_avg_sq, weight


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(State("exp_avg"), State("exp_avg_sq"), State("weight")),
    hyper=("beta1", "beta2", "eps", "weight_decay"),
)
