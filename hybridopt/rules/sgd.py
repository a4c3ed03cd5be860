"""Stochastic gradient descent with momentum (Sutskever et al. 2013, as torch writes it)."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(
    step: float, lr: float, momentum: float, dampening: float, weight_decay: float
) -> tuple[float, ...]:
    return lr, momentum, 1 - dampening, weight_decay


def _update(
    p: Any,
    g: Any,
    momentum_buffer: Any,
    lr: Any,
    momentum: Any,
    gain: Any,
    weight_decay: Any,
    *,
    maximize: bool,
    decay: bool,
    heavy: bool,
    nesterov: bool,
) -> tuple[Any, ...]:
    if maximize:
        g = -g
    if decay:
        g = xp.fma(p, weight_decay, g)
    if heavy:
        momentum_buffer = xp.fma(g, gain, momentum_buffer * momentum)
        if nesterov:
            g = xp.fma(momentum_buffer, momentum, g)
        else:
            g = momentum_buffer
    return xp.fma(g, -lr, p), momentum_buffer


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(State("momentum_buffer", "heavy"),),
    hyper=("lr", "momentum", "dampening", "weight_decay"),
    counts=False,
)
