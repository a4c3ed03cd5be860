"""ADOPT (Taniguchi et al. 2024, "Modified Adam Can Converge with Any β2 with the Optimal Rate", algorithm 2)."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(
    step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    # the first step only measures the second moment; from then on the normalised gradient is clipped at t^(1/4),
    # where t counts the steps since (the authors' repository, clip_lambda)
    first = xp.where(step < 1.5, 1.0, 0.0)
    limit = xp.maximum(step - 1, 1) ** 0.25
    return lr, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, 1 - lr * weight_decay, first, limit


def _update(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    lr: Any,
    rate1: Any,
    beta2: Any,
    rate2: Any,
    eps: Any,
    weight_decay: Any,
    keep: Any,
    first: Any,
    limit: Any,
    *,
    maximize: bool,
    decay: bool,
    decoupled: bool,
) -> tuple[Any, ...]:
    if maximize:
        g = -g
    start = first > 0
    if decay:
        if decoupled:
            p = xp.where(start, p, p * keep)
        else:
            g = g + p * weight_decay
    scaled = g / xp.maximum(xp.sqrt(exp_avg_sq), eps)
    scaled = xp.minimum(xp.maximum(scaled, -limit), limit)
    exp_avg = xp.where(start, exp_avg, exp_avg + (scaled - exp_avg) * rate1)
    exp_avg_sq = xp.where(start, g * g, exp_avg_sq * beta2 + g * g * rate2)
    return xp.where(start, p, p - exp_avg * lr), exp_avg, exp_avg_sq


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(State("exp_avg"), State("exp_avg_sq")),
    hyper=("lr", "beta1", "beta2", "eps", "weight_decay"),
)
