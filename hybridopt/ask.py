"""What a blocking solver sees of the world."""

from __future__ import annotations

import math
import warnings
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hybridopt.carrier import Question
from hybridopt.optimizer import Answer, Kind, Request

FloatArray: TypeAlias = npt.NDArray[np.float64]


class Ask:
    """What a solver sees of the world: it asks, and waits for the answer.

    Points are float64 arrays in solver coordinates; what is passed is copied, and what is returned may be written
    into. A loss that is not finite comes back as +inf.
    """

    def __init__(self, question: Question, notes: list[str], checked: set[str] | None = None) -> None:
        self.question = question
        self.checked = set() if checked is None else checked
        """Which of autograd's derivatives were found right (`HandOver.checked`); a solver adds to it."""
        self.highest = -math.inf
        """The highest finite loss that `Derivative` told its solver; -inf before the first."""
        self._notes = notes

    def value(self, x: FloatArray, *, keep_graph: bool = False, probe: bool = False) -> float:
        """The loss at `x`, shape (n,). `keep_graph`: a `gradient` question about it may follow."""
        return self.question(Request(Kind.VALUE, _own(x), probe, False, keep_graph)).loss

    def gradient(self, x: FloatArray) -> Answer:
        """The gradient at `x`, whose value (with `keep_graph`) was the last question; `.gradient` may be None."""
        return self.question(Request(Kind.GRADIENT, _own(x)))

    def value_and_gradient(self, x: FloatArray) -> Answer:
        """Both at `x`, shape (n,), in one question; `.gradient` is None if the loss has no graph to the weights."""
        return self.question(Request(Kind.VALUE_AND_GRADIENT, _own(x)))

    def values(self, population: FloatArray, *, probe: bool = False) -> FloatArray:
        """The losses of all rows of `population`, shape (popsize, n)."""
        losses = self.question(Request(Kind.POPULATION, _own(population), probe)).losses
        assert losses is not None
        return losses

    # -- residuals ----------------------------------------------------------------------------------------------

    def residuals(self, x: FloatArray, *, keep_graph: bool = False, probe: bool = False) -> FloatArray:
        """The residuals at `x`, shape (m,), all inf if their loss is not finite."""
        return self._array(Request(Kind.RESIDUALS, _own(x), probe, False, keep_graph))

    def jacobian(self, x: FloatArray) -> FloatArray | None:
        """The Jacobian of the residuals asked last, at `x`, shape (m, n); None if they have no graph."""
        return self.question(Request(Kind.JACOBIAN, _own(x))).array

    # -- constraints --------------------------------------------------------------------------------------------

    def limits(self, x: FloatArray) -> FloatArray:
        """Lower, upper and whether linear (1 or 0) of each constraint function, shape (3, k); evaluates them at `x`."""
        return self._array(Request(Kind.LIMITS, _own(x)))

    def constraints(self, x: FloatArray, *, keep_graph: bool = False) -> FloatArray:
        """All constraint functions, shape (k,) at one point, (popsize, k) at all rows of `x`."""
        return self._array(Request(Kind.CONSTRAINTS, _own(x), keep_graph=keep_graph))

    def constraint_jacobian(self, x: FloatArray) -> FloatArray | None:
        """Their Jacobian at `x`, shape (k, n); None if one of them has no graph."""
        return self.question(Request(Kind.CONSTRAINT_JACOBIAN, _own(x))).array

    # -- second derivatives -------------------------------------------------------------------------------------

    def hessian(self, x: FloatArray) -> FloatArray:
        """The Hessian of the loss at `x`, shape (n, n)."""
        return self._array(Request(Kind.HESSIAN, _own(x)))

    def hessian_vector(self, x: FloatArray, direction: FloatArray) -> FloatArray:
        """The Hessian at `x` times a direction, shape (n,)."""
        return self._array(Request(Kind.HESSIAN_VECTOR, _own(x), direction=_own(direction)))

    # -----------------------------------------------------------------------------------------------------------

    def note(self, text: str, *, warn: bool = False) -> None:
        """Record something the user should know (`Result.notes`); a revived solver does not warn again."""
        if text not in self._notes:
            self._notes.append(text)
            if warn:
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _array(self, request: Request) -> FloatArray:
        array = self.question(request).array
        assert array is not None
        return array


def _own(x: FloatArray) -> FloatArray:
    return np.array(x, dtype=np.float64, order="C")
