"""Adam (Kingma & Ba 2015), AdamW (Loshchilov & Hutter 2019) and AMSGrad (Reddi et al. 2018), as torch writes them."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(
    step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    step_size = lr / (1 - beta1**step)
    correction = xp.sqrt(1 - beta2**step)
    # torch divides the root by the correction; here the quotient is extended by it, which saves a division an element
    return (
        step_size * correction,
        eps * correction,
        1 - beta1,
        beta2,
        1 - beta2,
        weight_decay,
        1 - lr * weight_decay,
    )


def _update(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    max_exp_avg_sq: Any,
    step_size: Any,
    eps: Any,
    rate1: Any,
    beta2: Any,
    rate2: Any,
    weight_decay: Any,
    keep: Any,
    *,
    amsgrad: bool,
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
    if amsgrad:
        max_exp_avg_sq = xp.maximum(max_exp_avg_sq, exp_avg_sq)
        root = xp.sqrt(max_exp_avg_sq)
    else:
        root = xp.sqrt(exp_avg_sq)
    return p - step_size * exp_avg / (root + eps), exp_avg, exp_avg_sq, max_exp_avg_sq


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(State("exp_avg"), State("exp_avg_sq"), State("max_exp_avg_sq", "amsgrad")),
    hyper=("lr", "beta1", "beta2", "eps", "weight_decay"),
)
