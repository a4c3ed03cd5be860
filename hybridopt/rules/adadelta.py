"""Adadelta (Zeiler 2012), as torch writes it."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(step: float, lr: float, rho: float, eps: float, weight_decay: float) -> tuple[float, ...]:
    return lr, rho, 1 - rho, eps, weight_decay


def _update(
    p: Any,
    g: Any,
    square_avg: Any,
    acc_delta: Any,
    lr: Any,
    rho: Any,
    rate: Any,
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
    square_avg = xp.fma(rate * g, g, square_avg * rho)
    delta = xp.sqrt(acc_delta + eps) / xp.sqrt(square_avg + eps) * g
    return xp.fma(delta, -lr, p), square_avg, xp.fma(rate * delta, delta, acc_delta * rho)


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(
        State("square_avg"),
        State("acc_delta"),
    ),
    hyper=("lr", "rho", "eps", "weight_decay"),
)
