"""Population methods driven by hand, on functions of whole generations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hybridopt import ParameterVector
from hybridopt.optimizer import Answer
from hybridopt.population._base import PopulationMethod
from hybridopt.start import Start

Floats = npt.NDArray[np.float64]
Losses = Callable[[Floats], Floats]


def bowl(x: Floats) -> Floats:
    """Badly scaled, minimum 0 at 0.5."""
    return ((1 + np.arange(x.shape[1])) * (x - 0.5) ** 2).sum(axis=1)


def valley(x: Floats) -> Floats:
    """Rosenbrock, minimum 0 at (1, ..., 1)."""
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(axis=1)


def rastrigin(x: Floats) -> Floats:
    """About 10 local minima a weight in (-5, 5), minimum 0 at 0.25."""
    z = x - 0.25
    return 10 * x.shape[1] + (z * z - 10 * np.cos(2 * np.pi * z)).sum(axis=1)


def begin(
    method: PopulationMethod, x0: Any, box: tuple[float, float] = (-math.inf, math.inf), **known: Any
) -> tuple[Any, np.random.Generator]:
    """A strategy before its first generation, and its generator."""
    x = np.array(x0, dtype=float)
    start = Start(x, np.full(len(x), box[0]), np.full(len(x), box[1]), np.full(len(x), 2.0**-52), 3, **known)
    rng = np.random.Generator(np.random.PCG64(start.seed))
    return method.begin(start, rng), rng


def generations(
    method: PopulationMethod, losses: Losses, x0: Any, box: tuple[float, float] | None = None, seed: int = 3
) -> Iterator[tuple[Floats, Floats, Any]]:
    """Points, losses and step of one generation after the other, until the method ends: 10 000 at most."""
    run = method.start(ParameterVector(torch.tensor(np.array(x0, dtype=float)), bounds=box), seed)
    for _ in range(10_000):
        x = run.ask().x
        assert x is not None
        told = losses(x)
        step = run.tell(Answer(losses=told))
        assert step is not None
        yield x, told, step
        if step.reason is not None:
            return
    raise AssertionError(f"{method} does not end")


def first(count: int, *given: Any, **named: Any) -> list[Floats]:
    """The points of the first generations."""
    found = []
    for x, _, _ in generations(*given, **named):
        found.append(x)
        if len(found) == count:
            break
    return found


def solved(
    method: PopulationMethod,
    losses: Losses,
    n: int,
    budget: int,
    target: float,
    box: tuple[float, float] | None = None,
    seeds: int = 10,
) -> int:
    """How many of the seeds reach the target within the budget of evaluations, from random starts in (-2, 2)."""
    count = 0
    for seed in range(seeds):
        left = budget
        for _, told, _ in generations(
            method, losses, np.random.default_rng(seed).uniform(-2, 2, n).clip(*(box or (-9, 9))), box, seed
        ):
            if told[:left].min(initial=math.inf) <= target:
                count += 1
                break
            left -= len(told)
            if left <= 0:
                break
    return count
