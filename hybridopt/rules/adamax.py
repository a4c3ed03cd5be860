"""Adamax (Kingma & Ba 2015, section 7.1), as torch writes it."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(
    step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    return lr / (1 - beta1**step), 1 - beta1, beta2, eps, weight_decay


def _update(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_inf: Any,
    step_size: Any,
    rate: Any,
    beta2: Any,
    eps: Any,
    weight_decay: Any,
    *,
    maximize: bool,
    decay: bool,
) -> tuple[Any, ...]:
    if maximize:
        g = -g
    if decay:
        g = xp.fma(p, weight_decay, g)
    exp_avg = xp.fma(g - exp_avg, rate, exp_avg)
    exp_inf = xp.maximum(exp_inf * beta2, xp.abs(g) + eps)
    return p - step_size * exp_avg / exp_inf, exp_avg, exp_inf


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(
        State("exp_avg"),
        State("exp_inf"),
    ),
    hyper=("lr", "beta1", "beta2", "eps", "weight_decay"),
)
