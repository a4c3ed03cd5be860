"""Averaged SGD (Polyak & Juditsky 1992), as torch writes it."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(
    step: float, eta: float, mu: float, lr: float, lambd: float, alpha: float, t0: float, weight_decay: float
) -> tuple[float, ...]:
    """This step uses the rates that the last one left in `eta` and `mu`."""
    next_eta = xp.default(lr / (1 + lambd * lr * step) ** alpha)
    next_mu = xp.default(1 / xp.maximum(1, step - t0))
    return 1 - lambd * eta, eta, mu, weight_decay, next_eta, next_mu


def _update(
    p: Any, g: Any, ax: Any, keep: Any, eta: Any, mu: Any, weight_decay: Any, *, maximize: bool, decay: bool
) -> tuple[Any, ...]:
    if maximize:
        g = -g
    if decay:
        g = xp.fma(p, weight_decay, g)
    p = xp.fma(g, -eta, p * keep)
    # p, in words that read ax: else the loop of mu == 1 would write an average that it has not read, which is a third
    # slower on a processor that fetches memory ahead only where it reads
    copied = xp.where(p == p, p, p + ax)
    return p, xp.where(mu == 1, copied, ax + (p - ax) * mu)


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(State("ax"),),
    hyper=("lr", "lambd", "alpha", "t0", "weight_decay"),
    scalar_state=("eta", "mu"),
)
