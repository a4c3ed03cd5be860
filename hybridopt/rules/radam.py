"""RAdam (Liu et al. 2020), as torch writes it."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(
    step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    second = 1 - beta2**step
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / second
    # before rho passes 5 the variance is intractable: the step is then plain momentum (eq. in algorithm 2)
    safe = xp.maximum(rho, 5)
    rectified = xp.sqrt((safe - 4) * (safe - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * safe))
    adaptive = xp.where(rho > 5, 1.0, 0.0)
    return (
        1 - beta1**step,
        lr,
        xp.sqrt(second),
        rectified,
        adaptive,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        weight_decay,
        1 - lr * weight_decay,
    )


def _update(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    first: Any,
    lr: Any,
    second: Any,
    rectified: Any,
    adaptive: Any,
    rate1: Any,
    beta2: Any,
    rate2: Any,
    eps: Any,
    weight_decay: Any,
    keep: Any,
    *,
    maximize: bool,
    decay: bool,
    decoupled: bool,
) -> tuple[Any, ...]:
    if maximize:
        g = -g
    if decay:
        if decoupled:
            p = p * keep
        else:
            g = xp.fma(p, weight_decay, g)
    exp_avg = xp.fma(g - exp_avg, rate1, exp_avg)
    exp_avg_sq = xp.fma(rate2 * g, g, exp_avg_sq * beta2)
    move = exp_avg / first * lr
    scaled = move * (1 / (xp.sqrt(exp_avg_sq) + eps) * second) * rectified
    return p - xp.where(adaptive > 0, scaled, move), exp_avg, exp_avg_sq


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(
        State("exp_avg"),
        State("exp_avg_sq"),
    ),
    hyper=("lr", "beta1", "beta2", "eps", "weight_decay"),
)
