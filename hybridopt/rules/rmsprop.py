"""RMSprop (Hinton 2012; centered: Graves 2013), as torch writes it."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(
    step: float, lr: float, alpha: float, eps: float, weight_decay: float, momentum: float
) -> tuple[float, ...]:
    return lr, alpha, 1 - alpha, eps, weight_decay, momentum


def _update(
    p: Any,
    g: Any,
    square_avg: Any,
    momentum_buffer: Any,
    grad_avg: Any,
    lr: Any,
    alpha: Any,
    rate: Any,
    eps: Any,
    weight_decay: Any,
    momentum: Any,
    *,
    maximize: bool,
    decay: bool,
    centered: bool,
    heavy: bool,
) -> tuple[Any, ...]:
    if maximize:
        g = -g
    if decay:
        g = xp.fma(p, weight_decay, g)
    square_avg = xp.fma(rate * g, g, square_avg * alpha)
    if centered:
        grad_avg = xp.fma(g - grad_avg, rate, grad_avg)
        root = xp.sqrt(xp.fma(-grad_avg, grad_avg, square_avg))
    else:
        root = xp.sqrt(square_avg)
    if heavy:
        momentum_buffer = momentum_buffer * momentum + g / (root + eps)
        p = xp.fma(momentum_buffer, -lr, p)
    else:
        p = p - lr * g / (root + eps)
    return p, square_avg, momentum_buffer, grad_avg


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(
        State("square_avg"),
        State("momentum_buffer", "heavy"),
        State("grad_avg", "centered"),
    ),
    hyper=("lr", "alpha", "eps", "weight_decay", "momentum"),
)
