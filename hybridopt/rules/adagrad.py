"""Adagrad (Duchi et al. 2011), as torch writes it."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(step: float, lr: float, lr_decay: float, eps: float, weight_decay: float) -> tuple[float, ...]:
    return lr / (1 + (step - 1) * lr_decay), eps, weight_decay


def _update(
    p: Any, g: Any, total: Any, lr: Any, eps: Any, weight_decay: Any, *, maximize: bool, decay: bool
) -> tuple[Any, ...]:
    if maximize:
        g = -g
    if decay:
        g = xp.fma(p, weight_decay, g)
    total = xp.fma(g, g, total)
    return p - lr * g / (xp.sqrt(total) + eps), total


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(State("sum"),),
    hyper=("lr", "lr_decay", "eps", "weight_decay"),
)
