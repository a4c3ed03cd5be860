"""AdEMAMix (Pagliardini et al. 2024, "The AdEMAMix Optimizer: Better, Faster, Older", algorithm 1)."""

from __future__ import annotations

from typing import Any

from hybridopt.rules._rule import Rule, State, xp


def _scalars(
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    memory_start: float,
    memory_end: float,
    warmup: float,
) -> tuple[float, ...]:
    # The paper's warm-up of beta3 (section 3) in another form: the memory -1/log(beta) grows linearly in t / T from
    # beta1's to beta3's. `warmup` is T in steps; 1 means none.
    done = xp.minimum(step / warmup, 1.0)
    warming = xp.exp(-1 / (memory_start * (1 - done) + memory_end * done))
    slow = xp.where(done < 1, xp.minimum(warming, beta3), beta3)
    return (
        lr / (1 - beta1**step),
        lr * alpha * done,
        xp.sqrt(1 - beta2**step),
        beta1,
        1 - beta1,
        slow,
        1 - slow,
        beta2,
        1 - beta2,
        eps,
        1 - lr * weight_decay,
    )


def _update(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_slow: Any,
    exp_avg_sq: Any,
    fast_step: Any,
    slow_step: Any,
    correction: Any,
    beta1: Any,
    rate1: Any,
    slow: Any,
    rate3: Any,
    beta2: Any,
    rate2: Any,
    eps: Any,
    keep: Any,
    *,
    maximize: bool,
) -> tuple[Any, ...]:
    if maximize:
        g = -g
    exp_avg = exp_avg * beta1 + g * rate1
    exp_avg_slow = exp_avg_slow * slow + g * rate3
    exp_avg_sq = exp_avg_sq * beta2 + g * g * rate2
    root = xp.sqrt(exp_avg_sq) / correction + eps
    p = p * keep - (exp_avg * fast_step + exp_avg_slow * slow_step) / root
    return p, exp_avg, exp_avg_slow, exp_avg_sq


RULE = Rule(
    update=_update,
    scalars=_scalars,
    state=(State("exp_avg"), State("exp_avg_slow"), State("exp_avg_sq")),
    hyper=(
        "lr",
        "beta1",
        "beta2",
        "beta3",
        "alpha",
        "eps",
        "weight_decay",
        "memory_start",
        "memory_end",
        "warmup",
    ),
)
