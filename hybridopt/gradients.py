"""Gradients for a blocking solver: autograd where it is right in fact, differences otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hybridopt.ask import Ask
from hybridopt.differences import Differences, narrow
from hybridopt.errors import MissingGradient, NonFiniteLoss
from hybridopt.start import Start

__all__ = [
    "ConstraintQuantity",
    "Derivative",
    "Differences",
    "GradientMode",
    "Jacobian",
    "ResidualQuantity",
    "narrow",
]

FloatArray: TypeAlias = npt.NDArray[np.float64]
Names: TypeAlias = tuple[tuple[str, int, int], ...]
GradientMode = Literal["auto", "autograd", "differences", "none"]
_TOLERANCE = 0.1  # largest error seen of right gradients: 0.014 (trained ReLU nets of 9000 float32 weights)


class Quantity(Protocol):
    """What is differentiated: m numbers that depend on a point, as questions to the objective."""

    what: str
    """For messages."""

    def value(self, x: FloatArray, *, keep_graph: bool = False, probe: bool = False) -> FloatArray:
        """The numbers at `x`, shape (m,); where they are not finite, inf. `keep_graph`: `slope` may follow."""
        ...

    def slope(self, x: FloatArray) -> tuple[FloatArray | None, bool]:
        """Their Jacobian at the point just asked, shape (m, n), None without a graph; and whether of a surrogate."""
        ...

    def rows(self, points: FloatArray) -> FloatArray:
        """The numbers at all rows of `points`, shape (k, m), as probes."""
        ...

    def ignored(self, slope: FloatArray, names: Names) -> frozenset[str]:
        """What the Jacobian says has no effect at all, though it should have one."""
        ...


class LossQuantity:
    """The loss: one number."""

    what = "gradient"

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def value(self, x: FloatArray, *, keep_graph: bool = False, probe: bool = False) -> FloatArray:
        """See `Quantity.value`."""
        return np.array([self._ask.value(x, keep_graph=keep_graph, probe=probe)])

    def slope(self, x: FloatArray) -> tuple[FloatArray | None, bool]:
        """See `Quantity.slope`."""
        answer = self._ask.gradient(x)
        return (None if answer.gradient is None else answer.gradient[None]), answer.surrogate

    def rows(self, points: FloatArray) -> FloatArray:
        """See `Quantity.rows`."""
        return self._ask.values(points, probe=True)[:, None]

    def both(self, x: FloatArray) -> tuple[FloatArray, FloatArray | None]:
        """`value` and `slope` in one question."""
        answer = self._ask.value_and_gradient(x)
        return np.array([answer.loss]), None if answer.gradient is None else answer.gradient[None]

    def ignored(self, slope: FloatArray, names: Names) -> frozenset[str]:
        """Tensors that the loss does not depend on."""
        return _flat(slope, names)


def _flat(slope: FloatArray, names: Names) -> frozenset[str]:
    """Tensors on which none of the numbers depends."""
    return frozenset(repr(name) for name, a, b in names if not slope[:, a:b].any())


class ResidualQuantity:
    """The residuals, whose half squared norm is the loss."""

    what = "Jacobian"

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def value(self, x: FloatArray, *, keep_graph: bool = False, probe: bool = False) -> FloatArray:
        """See `Quantity.value`."""
        return self._ask.residuals(x, keep_graph=keep_graph, probe=probe)

    def slope(self, x: FloatArray) -> tuple[FloatArray | None, bool]:
        """See `Quantity.slope`."""
        return self._ask.jacobian(x), False

    def rows(self, points: FloatArray) -> FloatArray:
        """See `Quantity.rows`."""
        return np.array([self.value(x, probe=True) for x in points])

    def ignored(self, slope: FloatArray, names: Names) -> frozenset[str]:
        """Tensors that no residual depends on."""
        return _flat(slope, names)


class ConstraintQuantity:
    """All constraint functions."""

    what = "constraint Jacobian"

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def value(self, x: FloatArray, *, keep_graph: bool = False, probe: bool = False) -> FloatArray:
        """See `Quantity.value`."""
        return self._ask.constraints(x, keep_graph=keep_graph)

    def slope(self, x: FloatArray) -> tuple[FloatArray | None, bool]:
        """See `Quantity.slope`."""
        return self._ask.constraint_jacobian(x), False

    def rows(self, points: FloatArray) -> FloatArray:
        """See `Quantity.rows`."""
        return self._ask.constraints(points)

    def ignored(self, slope: FloatArray, names: Names) -> frozenset[str]:
        """Functions that no weight has an effect on (a constraint need not depend on every tensor)."""
        return frozenset(f"constraint function {i}" for i in np.flatnonzero(~slope.any(axis=1)))


class Jacobian:
    """The `fun` and `jac` of m numbers that a solver calls; see `Derivative`, which is the one for the loss.

    Args:
        of: what is differentiated.
        ask: for notes.
        start, mode, step, finite_start: see `Derivative`.
        both: numbers and Jacobian at a point in one question, for a solver that always wants both; else `of` is asked
            for the Jacobian only when the solver is.
    """

    def __init__(
        self,
        of: Quantity,
        ask: Ask,
        start: Start,
        mode: GradientMode,
        step: float | None = None,
        *,
        finite_start: bool = True,
        both: Callable[[FloatArray], tuple[FloatArray, FloatArray | None]] | None = None,
    ) -> None:
        self._of = of
        self._both = both
        self._ask = ask
        self._start = start
        self._finite_start = finite_start and not math.isfinite(start.loss)
        self.mode: GradientMode = mode
        self._differences = Differences(start, step)
        self._x: FloatArray | None = None
        self._value: FloatArray = np.array([math.inf])
        self._slope: FloatArray | None = None
        self._ahead = False  # whether `jac` had to ask for the value that `fun` will want next
        self.secant: tuple[FloatArray, FloatArray, FloatArray] | None = None
        """What the check saw: a point, a step from it, and the change of the Jacobian along that step."""

    def fun(self, x: FloatArray) -> FloatArray:
        """The numbers at `x`, shape (m,). See `Derivative.fun`."""
        x = self._start.clip(x)
        if self._ahead and self._x is not None and np.array_equal(self._x, x):
            self._ahead = False
            return self._value.copy()
        if self.mode == "auto":
            self._decide(x)
            return self._value.copy()
        self._look(x, self._both)
        return self._value.copy()

    def _look(
        self, x: FloatArray, both: Callable[[FloatArray], tuple[FloatArray, FloatArray | None]] | None
    ) -> None:
        first, slope = self._x is None, None
        if both is not None and self.mode == "autograd":
            self._value, slope = both(x)
        else:
            self._value = self._of.value(x, keep_graph=self.mode == "autograd")
        if first and self._finite_start and not np.isfinite(self._value).all() and self.mode != "none":
            raise NonFiniteLoss.at_start(math.inf)
        self._x, self._slope, self._ahead = np.array(x), slope, False

    def jac(self, x: FloatArray) -> FloatArray:
        """Their Jacobian at `x`, shape (m, n)."""
        x = self._start.clip(x)
        if self._x is None or not np.array_equal(self._x, x):
            self.fun(x)
            self._ahead = True
        if self._slope is not None:
            return self._slope.copy()
        if not np.isfinite(self._value).all():
            return np.zeros((len(self._value), len(x)))
        if self.mode == "autograd":
            slope = self._of.slope(x)[0]
            if slope is None:
                raise MissingGradient(
                    f"{self._of.what}: the loss has no graph to the weights; use gradients='differences', a "
                    "surrogate=, or a method that needs no gradients"
                )
        else:
            slope = self._differences.jacobian(self._of.rows, x, self._value)
        self._slope = slope
        return slope.copy()

    def _decide(self, x: FloatArray) -> None:
        """Settle `auto` at the first point whose value is finite."""
        self.mode = "autograd"
        known = self._of.what in self._start.checked
        both = self._both if known else None
        self._look(x, both)
        value = self._value.copy()
        if not np.isfinite(value).all():
            self.mode = "auto"
            return
        slope, surrogate = self._of.slope(x) if both is None else (self._slope, False)
        if slope is None:
            self._refuse("the loss has no graph to the weights", quiet=True)
            return
        self._slope = slope
        fault = "" if surrogate or known else self._fault(x, value, slope)
        if fault:
            self._refuse(fault)

    def _fault(self, x: FloatArray, value: FloatArray, slope: FloatArray) -> str:
        """What is wrong with autograd's Jacobian at `x`, by one step along its signs; empty if nothing is.

        The change of the value is compared with the trapezoid of the Jacobians at both ends (error O(step³)), so that
        a right one is accepted near an optimum too. Weights without a gradient are moved as well: a loss that
        changes with them gives the lie to a gradient that lacks them.
        """
        names = self._start.names
        flat = self._of.ignored(slope, names)
        trial = self._trial(x, slope.sum(axis=0))
        other = self._of.value(trial, keep_graph=True, probe=True)
        if not np.isfinite(other).all():
            return _zero(flat)  # nothing can be said; the solver will see for itself
        there = self._of.slope(trial)[0]
        if there is None:
            return "at another point the loss has no graph to the weights"
        flat &= self._of.ignored(there, names)
        if flat:
            return _zero(flat)
        self.secant = (np.array(x), trial - x, there - slope)
        expected = (slope + there) @ (trial - x) / 2
        actual = other - value
        eps = float(self._start.eps.max())
        moved = max(np.linalg.norm(actual), np.linalg.norm(expected))
        tolerance = _TOLERANCE * moved + 100 * eps * max(np.linalg.norm(value), np.linalg.norm(other))
        if np.linalg.norm(actual - expected) <= tolerance:
            self._ask.checked.add(self._of.what)
            return ""
        partial = [repr(name) for name, a, b in names if not slope[:, a:b].any(axis=0).all()]
        hint = f" (it is 0 for some weights of {_list(partial)})" if partial else ""
        return f"autograd's {self._of.what} disagrees with the change of the loss along it{hint}"

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
        self.mode = "differences"
        self._slope = None
        self._ask.note(
            f"autograd refused: {why}; using differences (gradients='differences')", warn=not quiet
        )


class Derivative:
    """The `fun` and `jac` that a gradient-using solver calls.

    Modes: `"autograd"` trusts the loss's graph; `"differences"` computes difference quotients whose step fits the
    weights' dtype; `"auto"` looks at the first point with a finite loss and uses autograd only if its gradient is
    present, agrees with one directional difference (counted: one more evaluation and one backward), and is not
    exactly 0 for a whole tensor at both ends of that difference, unless the user gave a surrogate, or the same method
    found it right before it was begun again (`Start.checked`); `"none"` leaves the solver to itself.

    Args:
        ask: the solver's window to the loss.
        start: bounds, dtypes and names.
        mode: see above.
        step: absolute difference step in solver coordinates; None = from each weight's dtype.
        finite_start: whether a first loss that is not finite is an error, unless a predecessor found a finite one
            there (a search that only now and then follows gradients sets it to False).
        together: the solver always wants loss and gradient of a point (L-BFGS-B, TNC): with autograd both are one
            question, for which the budget must have room, and a gradient that is not finite is as a loss that is not:
            an error at the start, a rejected point later. Else the gradient is asked, and paid, when it is wanted,
            and one that is not finite ends the run.
        finite: a rejected point is told as a loss above the highest so far, not as inf, after which the line searches
            of L-BFGS-B and TNC go back to where they came from, or to nan, and believe that they have converged.
    """

    def __init__(
        self,
        ask: Ask,
        start: Start,
        mode: GradientMode,
        step: float | None = None,
        *,
        finite_start: bool = True,
        together: bool = False,
        finite: bool = False,
    ) -> None:
        self._ask = ask
        self._finite = finite
        loss = LossQuantity(ask)
        both = loss.both if together else None
        self._loss = Jacobian(loss, ask, start, mode, step, finite_start=finite_start, both=both)

    @property
    def mode(self) -> GradientMode:
        """As given; `"auto"` until it is settled."""
        return self._loss.mode

    @property
    def none(self) -> bool:
        """Whether the solver gets no gradient from us."""
        return self.mode == "none"

    def check_hessian(self) -> None:
        """Compare autograd's second derivatives, once, with the change of the gradient that the check of `auto` saw."""
        if self._loss.secant is None:
            return
        (x, step, change), self._loss.secant = self._loss.secant, None
        product = self._ask.hessian_vector(x, step)
        if np.linalg.norm(product - change[0]) > 0.3 * max(np.linalg.norm(product), np.linalg.norm(change)):
            self._ask.note(
                "autograd's second derivatives disagree with the change of the gradient (a kink, or an operation whose "
                "backward cannot be differentiated); scipy.bfgs and scipy.lbfgsb need none",
                warn=True,
            )

    def fun(self, x: FloatArray) -> float:
        """The loss at `x`, shape (n,), or where it has strayed out of the bounds, at the nearest point inside.

        Raises:
            NonFiniteLoss: at the first point (with `finite_start`); a method that follows gradients cannot begin
                there.
        """
        loss = float(self._loss.fun(x)[0])
        if math.isfinite(loss):
            self._ask.highest = max(self._ask.highest, loss)
        elif self._finite and math.isfinite(self._ask.highest):
            return self._ask.highest + abs(self._ask.highest) + 1.0
        return loss

    def jac(self, x: FloatArray) -> FloatArray:
        """The gradient at `x`, shape (n,)."""
        gradient: FloatArray = self._loss.jac(x)[0]
        return gradient


def _zero(names: Set[str]) -> str:
    return f"autograd gives a gradient of exactly 0, or none, for {_list(sorted(names))}" if names else ""


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
