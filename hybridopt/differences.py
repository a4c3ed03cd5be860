"""Difference quotients with a step that fits the weights' dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hybridopt.ask import Ask
from hybridopt.coordinates import to_next
from hybridopt.start import Start

FloatArray: TypeAlias = npt.NDArray[np.float64]


class Differences:
    """Difference quotients with a step that fits the weights' dtype; one batched question a side.

    float64 weights: forward, absolute step sqrt(eps) = 1.49e-8, as SciPy's default. Narrower weights: central,
    step eps^(1/3) × max(1, |x|). A side outside the bounds is not asked; a side whose loss is not finite is
    replaced by the other one, and a weight without any finite side gets 0. A whole number is moved by 1 from the one
    that its coordinate stands for.

    Args:
        start: bounds and dtypes.
        step: absolute step in solver coordinates for all weights; None = as above.
    """

    def __init__(self, start: Start, step: float | None = None) -> None:
        self._start = start
        self._central = narrow(start)
        self._step = step

    def _steps(self, x: FloatArray) -> FloatArray:
        if self._step is not None:
            h = np.full(len(x), self._step)
        elif self._central:
            h = np.asarray(np.cbrt(self._start.eps) * np.maximum(1.0, np.abs(x)))
        else:
            h = np.asarray(np.sqrt(self._start.eps))
        if self._start.integer is None:
            return h
        return np.where(self._start.integer, to_next(x, self._start.log), h)

    def gradient(self, ask: Ask, x: FloatArray, loss: float) -> FloatArray:
        """The gradient at `x`, shape (n,), whose loss is known; n evaluations, or 2n for central differences."""
        gradient: FloatArray = self.jacobian(
            lambda points: ask.values(points, probe=True)[:, None], x, np.array([loss])
        )[0]
        return gradient

    def jacobian(
        self, rows: Callable[[FloatArray], FloatArray], x: FloatArray, value: FloatArray
    ) -> FloatArray:
        """The Jacobian, shape (m, n), of what `rows` tells at several points, shape (k, m); `value` is that at `x`."""
        x = self._start.rounded(x)  # where the value is the same
        h = self._steps(x)
        vanishing = (x + h) - x == 0
        sign = np.where(x >= 0, 1.0, -1.0)  # SciPy's rule
        h = np.where(vanishing, np.sqrt(self._start.eps) * sign * np.maximum(1.0, np.abs(x)), h)
        up, down = self._room(x, np.abs(h))
        if self._central:
            plus, minus = self._side(rows, x, up, value), self._side(rows, x, -down, value)
        else:
            one = self._one_sided(x, h)
            plus = self._side(rows, x, one, value)
            failed = np.isnan(plus.change[:, 0]) & (one != 0)
            back = np.where(failed, np.where(one > 0, -down, up), 0.0)
            minus = self._side(rows, x, back, value)
        return _slope(plus, minus).T

    def _one_sided(self, x: FloatArray, h: FloatArray) -> FloatArray:
        """The step itself where it stays in the box, else back, else to the farther bound: SciPy's rule."""
        lower, upper = self._start.lower, self._start.upper
        below, above = x - lower, upper - x
        fitting = np.abs(h) <= np.maximum(below, above)
        violated = (x + h < lower) | (x + h > upper)
        return np.where(fitting, np.where(violated, -h, h), np.where(above >= below, above, -below))

    def _room(self, x: FloatArray, h: FloatArray) -> tuple[FloatArray, FloatArray]:
        up = np.minimum(h, np.maximum(self._start.upper - x, 0.0))
        down = np.minimum(h, np.maximum(x - self._start.lower, 0.0))
        if self._central and self._start.bounded:  # a sliver of room on one side tells nothing
            up, down = np.where(up < 0.1 * h, 0.0, up), np.where(down < 0.1 * h, 0.0, down)
        if self._start.integer is not None:
            whole = self._start.integer
            up, down = np.where(whole & (up < h), 0.0, up), np.where(whole & (down < h), 0.0, down)
        return up, down

    def _side(
        self, rows: Callable[[FloatArray], FloatArray], x: FloatArray, h: FloatArray, value: FloatArray
    ) -> _Side:
        """Change of the value, shape (n, m), for each weight moved alone by h; nan where not asked or not finite."""
        change = np.full((len(x), len(value)), math.nan)
        chosen = np.flatnonzero(h)
        moved = (x + h) - x
        if len(chosen):
            points = np.repeat(x[None, :], len(chosen), axis=0)
            points[np.arange(len(chosen)), chosen] = x[chosen] + h[chosen]
            values = rows(self._start.clip(points))
            finite = np.isfinite(values).all(axis=1, keepdims=True)
            change[chosen] = np.where(finite, values - value, math.nan)
        return _Side(change, moved)


class _Side:
    def __init__(self, change: FloatArray, moved: FloatArray) -> None:
        self.change = change
        self.moved = moved


def _slope(plus: _Side, minus: _Side) -> FloatArray:
    """The quotients, shape (n, m)."""
    have_plus, have_minus = ~np.isnan(plus.change[:, 0]), ~np.isnan(minus.change[:, 0])
    result = np.zeros(plus.change.shape)
    both = have_plus & have_minus
    only_plus, only_minus = have_plus & ~have_minus, have_minus & ~have_plus
    result[both] = (plus.change[both] - minus.change[both]) / (plus.moved[both] - minus.moved[both])[:, None]
    result[only_plus] = plus.change[only_plus] / plus.moved[only_plus, None]
    result[only_minus] = minus.change[only_minus] / minus.moved[only_minus, None]
    return result


def narrow(start: Start) -> bool:
    """Whether any weight's dtype has fewer digits than float64."""
    return bool((start.eps > np.finfo(np.float64).eps).any())
