"""Gradients for a blocking solver: autograd where it is right in fact, differences otherwise."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hybridopt.errors import MissingGradient, NonFiniteLoss
from hybridopt.solver import Ask, Start

FloatArray: TypeAlias = npt.NDArray[np.float64]
GradientMode = Literal["auto", "autograd", "differences", "none"]
_TOLERANCE = 0.1  # largest error seen of right gradients: 0.014 (trained ReLU nets of 9000 float32 weights)


class Derivative:
    """The `fun` and `jac` that a gradient-using solver calls.

    Modes: `"autograd"` trusts the loss's graph; `"differences"` computes difference quotients whose step fits the
    weights' dtype; `"auto"` looks at the first point with a finite loss and uses autograd only if its gradient is
    present, agrees with one directional difference (counted: one more evaluation and one backward), and is not
    exactly 0 for a whole tensor at both ends of that difference, unless the user gave a surrogate; `"none"` leaves
    the solver to itself.

    Args:
        ask: the solver's window to the loss.
        start: bounds, dtypes and names.
        mode: see above.
        step: absolute difference step in solver coordinates; None = from each weight's dtype.
        finite_start: whether a first loss that is not finite is an error, unless a predecessor found a finite one
            there (a search that only now and then follows gradients sets it to False).
    """

    def __init__(
        self,
        ask: Ask,
        start: Start,
        mode: GradientMode,
        step: float | None = None,
        *,
        finite_start: bool = True,
    ) -> None:
        self._ask = ask
        self._start = start
        self._finite_start = finite_start and not math.isfinite(start.loss)
        self._mode: GradientMode = mode
        self._differences = Differences(start, step)
        self._x: FloatArray | None = None
        self._loss = math.inf
        self._gradient: FloatArray | None = None
        self._ahead = False  # whether `jac` had to ask for the value that `fun` will want next

    @property
    def none(self) -> bool:
        """Whether the solver gets no gradient from us."""
        return self._mode == "none"

    def fun(self, x: FloatArray) -> float:
        """The loss at `x`, shape (n,), or where it has strayed out of the bounds, at the nearest point inside.

        Raises:
            NonFiniteLoss: at the first point (with `finite_start`); a method that follows gradients cannot begin
                there.
        """
        x = self._start.clip(x)
        if self._ahead and self._x is not None and np.array_equal(self._x, x):
            self._ahead = False
            return self._loss
        if self._mode == "auto":
            self._decide(x)
            return self._loss
        first = self._x is None
        self._loss = self._ask.value(x, keep_graph=self._mode == "autograd")
        if first and self._finite_start and not math.isfinite(self._loss) and not self.none:
            raise NonFiniteLoss(
                "loss: expected a finite loss at the start point of a method that follows gradients; change the "
                "initial weights, or put a gradient-free method before it"
            )
        self._x, self._gradient, self._ahead = np.array(x), None, False
        return self._loss

    def jac(self, x: FloatArray) -> FloatArray:
        """The gradient at `x`, shape (n,)."""
        x = self._start.clip(x)
        if self._x is None or not np.array_equal(self._x, x):
            self.fun(x)
            self._ahead = True
        if self._gradient is not None:
            return self._gradient.copy()
        if not math.isfinite(self._loss):
            return np.zeros(len(x))
        if self._mode == "autograd":
            gradient = self._ask.gradient(x).gradient
            if gradient is None:
                raise MissingGradient(
                    "gradient: the loss has no graph to the weights; use gradients='differences', a surrogate=, or "
                    "a method that needs no gradients"
                )
        else:
            gradient = self._differences.gradient(self._ask, x, self._loss)
        self._gradient = gradient
        return gradient.copy()

    def _decide(self, x: FloatArray) -> None:
        """Settle `auto` at the first point whose loss is finite."""
        self._mode = "autograd"
        loss = self.fun(x)
        if not math.isfinite(loss):
            self._mode = "auto"
            return
        answer = self._ask.gradient(x)
        if answer.gradient is None:
            self._refuse("the loss has no graph to the weights", quiet=True)
            return
        self._gradient = answer.gradient
        fault = "" if answer.surrogate else self._fault(x, loss, answer.gradient)
        if fault:
            self._refuse(fault)

    def _fault(self, x: FloatArray, loss: float, gradient: FloatArray) -> str:
        """What is wrong with autograd's gradient at `x`, by one step along its signs; empty if nothing is.

        The change of the loss is compared with the trapezoid of the gradients at both ends (error O(step³)), so that
        a right gradient is accepted near an optimum too. Weights without a gradient are moved as well: a loss that
        changes with them gives the lie to a gradient that lacks them.
        """
        flat = [name for name, a, b in self._start.names if not gradient[a:b].any()]
        trial = self._trial(x, gradient)
        other = self._ask.value(trial, keep_graph=True, probe=True)
        if not math.isfinite(other):
            return _zero(flat)  # nothing can be said; the solver will see for itself
        there = self._ask.gradient(trial).gradient
        if there is None:
            return "at another point the loss has no graph to the weights"
        flat = [name for name, a, b in self._start.names if name in flat and not there[a:b].any()]
        if flat:
            return _zero(flat)
        expected = float((gradient + there) @ (trial - x)) / 2
        actual = other - loss
        eps = float(self._start.eps.max())
        tolerance = _TOLERANCE * max(abs(actual), abs(expected)) + 100 * eps * max(abs(loss), abs(other))
        if abs(actual - expected) <= tolerance:
            return ""
        partial = [name for name, a, b in self._start.names if not gradient[a:b].all()]
        hint = f" (it is 0 for some weights of {_list(partial)})" if partial else ""
        return f"autograd's gradient disagrees with the change of the loss along it{hint}"

    def _trial(self, x: FloatArray, gradient: FloatArray) -> FloatArray:
        """A point one step along the signs of the gradient, up or down as the bounds allow; the rest moves too."""
        start = self._start
        # a step of one length for any number of weights: thousands moved by the full step leave the parabola
        size = float(start.eps.max()) ** (1 / 3) * np.maximum(1.0, np.abs(x)) / math.sqrt(len(x))
        rest = np.where(start.upper - x >= x - start.lower, size, -size)
        up, down = (
            np.clip(
                x + np.where(gradient == 0, rest, side * size * np.sign(gradient)), start.lower, start.upper
            )
            for side in (1.0, -1.0)
        )
        trial: FloatArray = up if abs(gradient @ (up - x)) >= abs(gradient @ (down - x)) else down
        return trial

    def _refuse(self, why: str, quiet: bool = False) -> None:
        self._mode = "differences"
        self._gradient = None
        self._ask.note(
            f"autograd refused: {why}; using differences (gradients='differences')", warn=not quiet
        )


class Differences:
    """Difference quotients with a step that fits the weights' dtype; one batched question a side.

    float64 weights: forward, absolute step sqrt(eps) = 1.49e-8, as SciPy's default. Narrower weights: central,
    step eps^(1/3) × max(1, |x|). A side outside the bounds is not asked; a side whose loss is not finite is
    replaced by the other one, and a weight without any finite side gets 0.

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
            return np.full(len(x), self._step)
        if self._central:
            return np.asarray(np.cbrt(self._start.eps) * np.maximum(1.0, np.abs(x)))
        return np.asarray(np.sqrt(self._start.eps))

    def gradient(self, ask: Ask, x: FloatArray, loss: float) -> FloatArray:
        """The gradient at `x`, shape (n,), whose loss is known; n evaluations, or 2n for central differences."""
        h = self._steps(x)
        vanishing = (x + h) - x == 0
        sign = np.where(x >= 0, 1.0, -1.0)  # SciPy's rule
        h = np.where(vanishing, np.sqrt(self._start.eps) * sign * np.maximum(1.0, np.abs(x)), h)
        up, down = self._room(x, np.abs(h))
        if self._central:
            plus, minus = self._side(ask, x, up, loss), self._side(ask, x, -down, loss)
        else:
            one = self._one_sided(x, h)
            plus = self._side(ask, x, one, loss)
            failed = np.isnan(plus.change) & (one != 0)
            back = np.where(failed, np.where(one > 0, -down, up), 0.0)
            minus = self._side(ask, x, back, loss)
        return _slope(plus, minus)

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
        return up, down

    def _side(self, ask: Ask, x: FloatArray, h: FloatArray, loss: float) -> _Side:
        """Change of the loss for each weight moved alone by h; nan where not asked or not finite."""
        change = np.full(len(x), math.nan)
        chosen = np.flatnonzero(h)
        moved = (x + h) - x
        if len(chosen):
            points = np.repeat(x[None, :], len(chosen), axis=0)
            points[np.arange(len(chosen)), chosen] = x[chosen] + h[chosen]
            losses = ask.values(self._start.clip(points), probe=True)
            change[chosen] = np.where(np.isfinite(losses), losses - loss, math.nan)
        return _Side(change, moved)


class _Side:
    def __init__(self, change: FloatArray, moved: FloatArray) -> None:
        self.change = change
        self.moved = moved


def _slope(plus: _Side, minus: _Side) -> FloatArray:
    have_plus, have_minus = ~np.isnan(plus.change), ~np.isnan(minus.change)
    result = np.zeros(len(plus.change))
    both = have_plus & have_minus
    only_plus, only_minus = have_plus & ~have_minus, have_minus & ~have_plus
    result[both] = (plus.change[both] - minus.change[both]) / (plus.moved[both] - minus.moved[both])
    result[only_plus] = plus.change[only_plus] / plus.moved[only_plus]
    result[only_minus] = minus.change[only_minus] / minus.moved[only_minus]
    return result


def narrow(start: Start) -> bool:
    """Whether any weight's dtype has fewer digits than float64."""
    return bool((start.eps > np.finfo(np.float64).eps).any())


def _zero(names: list[str]) -> str:
    return f"autograd gives a gradient of exactly 0, or none, for {_list(names)}" if names else ""


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
