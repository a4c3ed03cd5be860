"""NAdam (Dozat 2016), as torch writes it."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(
    step: float,
    mu_product: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    momentum_decay: float,
) -> tuple[float, ...]:
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    product = xp.stored(mu_product * xp.stored(mu))
    now = lr * (1 - mu) / (1 - product)
    ahead = lr * mu_next / (1 - product * mu_next)
    second = 1 - beta2**step
    return now, ahead, second, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, 1 - lr * weight_decay, product


def _update(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    now: Any,
    ahead: Any,
    second: Any,
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
    root = xp.sqrt(exp_avg_sq / second) + eps
    return p - now * g / root - ahead * exp_avg / root, exp_avg, exp_avg_sq


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(
        State("exp_avg"),
        State("exp_avg_sq"),
    ),
    hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "momentum_decay"),
    scalar_state=("mu_product",),
)
