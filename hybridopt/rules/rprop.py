"""Resilient backpropagation (Riedmiller & Braun 1993, without backtracking), as torch writes it."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(
    step: float, etaminus: float, etaplus: float, step_size_min: float, step_size_max: float
) -> tuple[float, ...]:
    return etaminus, etaplus, step_size_min, step_size_max


def _update(
    p: Any,
    g: Any,
    prev: Any,
    step_size: Any,
    etaminus: Any,
    etaplus: Any,
    step_size_min: Any,
    step_size_max: Any,
    *,
    maximize: bool,
) -> tuple[Any, ...]:
    if maximize:
        g = -g
    agreement = g * prev
    grown = xp.where(
        agreement > 0, step_size * etaplus, xp.where(agreement < 0, step_size * etaminus, step_size)
    )
    step_size = xp.minimum(xp.maximum(grown, step_size_min), step_size_max)
    g = xp.where(agreement < 0, step_size * 0, g)  # not g * 0: that is nan for an infinite gradient
    return p - xp.sign(g) * step_size, g, step_size


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(
        State("prev"),
        State("step_size"),
    ),
    hyper=("etaminus", "etaplus", "step_size_min", "step_size_max"),
)
