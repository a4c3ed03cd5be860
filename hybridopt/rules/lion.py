"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2)."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(step: float, lr: float, beta1: float, beta2: float, weight_decay: float) -> tuple[float, ...]:
    return lr, beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay


def _update(
    p: Any,
    g: Any,
    exp_avg: Any,
    lr: Any,
    beta1: Any,
    rate1: Any,
    beta2: Any,
    rate2: Any,
    keep: Any,
    *,
    maximize: bool,
) -> tuple[Any, ...]:
    if maximize:
        g = -g
    direction = xp.sign(exp_avg * beta1 + g * rate1)
    return p * keep - direction * lr, exp_avg * beta2 + g * rate2


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(State("exp_avg"),),
    hyper=("lr", "beta1", "beta2", "weight_decay"),
)
