"""What a comparison runs on: a loss, a start, and what methods may know about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from hybridopt.batch import Choice
from hybridopt.errors import HybridoptError


class ProblemError(HybridoptError, ValueError):
    """A problem is unknown, cannot be built, or is not fresh at every call."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A loss with its start. It is used up by one run, which moves the weights: build a new one for the next.

    Args:
        name: for tables.
        loss: as in `hybridopt.Objective`: `loss(model)`, `f(x)`, `f(params)` or `closure()`.
        target: the model, tensor(s), array, dict, groups or `ParameterVector` at the start point.
        bounds: what methods that need a box search in; methods that need none run without. None = there is no
            box, and a method that needs one is refused.
        surrogate: a differentiable stand-in, used for gradients only.
        select: which of a model's weights are optimized; None = all that require gradients.
        integer: which of the weights stand for whole numbers, as `hybridopt.minimize` takes it; None = none.
        batch: how populations are evaluated, see `hybridopt.Objective`; `"loop"` for a loss that counts its calls.
        best_known: the lowest loss that anybody has reported, or None.
        minima: other losses at which good methods end rightly: local minima that the literature lists.
        residuals: for a sum of squares, the function (of what `loss` takes) that returns the residuals r, shape
            (m,), where loss = |r|²/2: what `hybridopt.minimize(residuals=True)` takes in place of `loss`.
        constraints: what the weights must satisfy beside the bounds, as `hybridopt.minimize` takes it.
        score: what the weights are good for, where that is not the loss: a function of the target, e.g. the share
            of test images a network gets right. No method may see it; higher is better.
        description: one sentence.

    Example:
        >>> import numpy as np
        >>> from hybridopt.problems import Problem
        >>> Problem("bowl", lambda x: float((x**2).sum()), np.ones(2), bounds=(-2, 2))
        Problem('bowl')
    """

    name: str
    loss: Callable[..., Any]
    target: Any
    bounds: Any = None
    surrogate: Callable[..., Any] | None = None
    select: Any = None
    integer: Any = None
    batch: Choice = "auto"
    best_known: float | None = None
    minima: tuple[float, ...] = ()
    residuals: Callable[..., Any] | None = None
    constraints: Any = None
    score: Callable[[Any], float] | None = None
    description: str = ""

    def __repr__(self) -> str:
        return f"Problem({self.name!r})"


Build: TypeAlias = Callable[[int], Problem]
"""Builds a problem from a seed: at every call a fresh one, for the same seed the same."""
