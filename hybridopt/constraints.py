"""What the weights must satisfy beside their bounds: functions of the model, and linear forms of the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridopt.errors import ObjectiveError
from hybridopt.forms import Form, Loss, bind_loss
from hybridopt.vector import FloatArray, ParameterVector


@dataclass(frozen=True, eq=False)
class Constraint:
    """`lower <= function(...) <= upper`, number by number; an equality where the two are the same.

    Args:
        function: of the same form as the loss (`function(model)`, `f(x)`, `f(params)`); returns a tensor or array of
            any shape, always of the same size.
        lower, upper: numbers, or arrays of the function's size. By default the function must not be negative.
        tolerance: by how much the function may lie outside, and the point still counts as keeping the constraint;
            times max(1, |bound|). None = 1e-6, or 100 times the machine epsilon of the weights' dtype if that is more.
            (Solvers stop within some 1e-6 to 1e-10 of a bound that holds them back.)

    A function that returns nan or inf counts as broken, with a warning of the first.

    Raises:
        ObjectiveError: lower > upper, or one that is no number.

    Example:
        >>> import hybridopt, torch
        >>> f = lambda x: ((x - 3) ** 2).sum()
        >>> disc = hybridopt.Constraint(lambda x: (x**2).sum(), -float("inf"), 2.0)
        >>> hybridopt.minimize(f, torch.zeros(2), "slsqp", budget=100, constraints=disc).x.round(3).tolist()
        [1.0, 1.0]
    """

    function: Callable[..., Any] | None
    lower: Any = 0.0
    upper: Any = math.inf
    tolerance: float | None = None
    matrix: Any = None
    """Of a linear constraint, see `linear`."""
    weights: str | None = None

    def __post_init__(self) -> None:
        lower, upper = _side("lower", self.lower), _side("upper", self.upper)
        fit = len({1, lower.size, upper.size}) <= 2
        if fit and (lower > upper).any():
            raise ObjectiveError(
                f"constraint: expected lower <= upper, got {self.lower!r} and {self.upper!r}"
            )

    @classmethod
    def linear(
        cls,
        matrix: Any,
        lower: Any = -math.inf,
        upper: Any = math.inf,
        *,
        weights: str | None = None,
        tolerance: float | None = None,
    ) -> Constraint:
        """`lower <= matrix @ w <= upper` for the flat weights `w`; costs no forward.

        Args:
            matrix: shape (k, n), or (n,) for one row.
            lower, upper, tolerance: as in the class.
            weights: `w` are only the weights of the tensors whose names match this glob pattern; None = all.

        Example:
            >>> import hybridopt, torch
            >>> f = lambda x: ((x - torch.tensor([3.0, 1.0])) ** 2).sum()
            >>> share = hybridopt.Constraint.linear([1, 1], 1, 1)
            >>> hybridopt.minimize(f, torch.zeros(2), "slsqp", budget=100, constraints=share).x.round(3).tolist()
            [1.5, -0.5]
        """
        return cls(
            None, lower, upper, tolerance, np.atleast_2d(np.asarray(matrix, dtype=np.float64)), weights
        )


class Constraints:
    """The constraints of an objective, one after another in one vector of k numbers.

    Args:
        given: a callable, a `Constraint`, a list of these, or a mapping from names to them.
        vector: the weights.

    Raises:
        ObjectiveError: a constraint is none of these, a closure, or its matrix does not fit the weights.
    """

    def __init__(self, given: Any, vector: ParameterVector) -> None:
        if isinstance(given, Mapping):
            pairs = list(given.items())
        elif isinstance(given, Iterable) and not callable(given):
            pairs = [(str(i), part) for i, part in enumerate(given)]
        else:
            pairs = [("0", given)]
        self._vector = vector
        self.parts = [_Part(str(name), part, vector) for name, part in pairs]
        self.forwards = sum(part.loss is not None for part in self.parts)
        """How many functions there are to call."""
        self._warned = False

    def values(self) -> list[Tensor | FloatArray]:
        """Each part's numbers where the weights stand: tensors with their graph, arrays of linear ones."""
        x = self._vector.read() if self.forwards < len(self.parts) else None
        return [part.call(x) for part in self.parts]

    def limits(self) -> FloatArray:
        """Lower, upper, and whether linear in solver coordinates, shape (3, k); known after `values`."""
        straight = self._vector.integer is None and self._vector.log is None
        rows = [
            np.array([lower, upper, np.full(len(lower), float(straight and part.loss is None))])
            for part in self.parts
            for lower, upper in [part.sides]
        ]
        return np.concatenate(rows, axis=1) if rows else np.empty((3, 0))

    def violation(self, values: FloatArray) -> float:
        """The largest amount by which `values`, shape (k,), lie outside; 0 if all are within their tolerance."""
        worst, first = 0.0, 0
        for part in self.parts:
            lower, upper = part.sides
            c = values[first : first + len(lower)]
            first += len(lower)
            for bound, outside in ((lower, lower - c), (upper, c - upper)):
                allowed = part.tolerance * np.maximum(1.0, np.abs(bound))
                # nan is outside, too
                broken = np.where(
                    np.isinf(bound) | (outside <= allowed), 0.0, np.nan_to_num(outside, nan=np.inf)
                )
                worst = max(worst, float(broken.max(initial=0.0)))
            if not np.isfinite(c).all():
                worst = math.inf
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"constraint {part.name!r}: nan or inf counts as broken; later ones without a warning",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        return worst


class _Part:
    """One constraint, bound to the weights."""

    def __init__(self, name: str, given: Any, vector: ParameterVector) -> None:
        constraint = given if isinstance(given, Constraint) else Constraint(given)
        self.name = name
        self._given = constraint
        self.size: int | None = None
        self.sides: tuple[FloatArray, FloatArray] = (np.empty(0), np.empty(0))
        """Lower and upper, shape (size,); known after the first call."""
        eps = float(vector.eps.max())
        self.tolerance = max(1e-6, 100 * eps) if constraint.tolerance is None else float(constraint.tolerance)
        if not 0 <= self.tolerance < math.inf:
            raise ObjectiveError(
                f"constraint {name!r}: expected tolerance >= 0, got {constraint.tolerance!r}"
            )
        self.loss: Loss | None = None
        self.matrix: FloatArray | None = None
        """Shape (size, n), of a linear constraint."""
        if constraint.function is not None:
            if not callable(constraint.function):
                raise ObjectiveError(
                    f"constraint {name!r}: expected a function of the model, or a hybridopt.Constraint, got "
                    f"{type(constraint.function).__name__}"
                )
            self.loss = bind_loss(constraint.function, vector)
            if self.loss.form is Form.CLOSURE:
                raise ObjectiveError(
                    f"constraint {name!r}: expected a function of the model (or weights), got one without arguments"
                )
        else:
            self.matrix = _over_all(name, constraint, vector)
            self.settle(len(self.matrix))

    def call(self, x: FloatArray | None) -> Tensor | FloatArray:
        """Its numbers, shape (size,), where the weights stand (at `x`)."""
        if self.loss is None:
            assert self.matrix is not None
            assert x is not None
            return np.asarray(self.matrix @ x)
        told = self.loss.call()
        if not isinstance(told, Tensor):
            told = torch.as_tensor(self._numbers(told))
        if told.dtype == torch.bool:
            raise ObjectiveError(
                f"constraint {self.name!r}: expected numbers that say by how much it is kept, got True or False; "
                "return what is compared, e.g. 1 - x.sum() for x.sum() <= 1"
            )
        values = told.reshape(-1)
        if self.size is None:
            self.settle(len(values))
        elif len(values) != self.size:
            raise ObjectiveError(
                f"constraint {self.name!r}: expected {self.size} numbers at every call, got {len(values)}"
            )
        return values

    def _numbers(self, told: Any) -> npt.NDArray[Any]:
        """What the function returned, if that is no tensor, as float64 or bool."""
        try:
            array = np.asarray(told)
            # None would become nan
            if any(part is None for part in array.flat):
                raise TypeError
            return array if array.dtype == bool else np.asarray(told, dtype=np.float64)
        except (TypeError, ValueError, RuntimeError):
            hint = "; join tensors by torch.stack" if isinstance(told, list | tuple) else ""
            hint = "; is its return missing?" if told is None else hint
            raise ObjectiveError(
                f"constraint {self.name!r}: expected a tensor or numbers, got {told!r}{hint}"
            ) from None

    def settle(self, size: int) -> None:
        """Fix how many numbers it has, and its limits."""
        sides = []
        for word, given in (("lower", self._given.lower), ("upper", self._given.upper)):
            side = _side(word, given)
            if side.size not in (1, size):
                raise ObjectiveError(
                    f"constraint {self.name!r}: expected {word} to be one number, or one for each of {size}, got "
                    f"{given!r}"
                )
            sides.append(np.broadcast_to(side, (size,)).copy())
        self.size, self.sides = size, (sides[0], sides[1])


def _side(word: str, given: Any) -> FloatArray:
    """A lower or upper limit, flat: one number, or several."""
    try:
        side = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=np.float64)
    except (TypeError, ValueError):
        side = np.array(math.nan)
    if np.isnan(side).any():
        raise ObjectiveError(
            f"constraint: expected {word} to be numbers, got {given!r}; -inf or inf where there is none"
        )
    return side.reshape(-1)


def _over_all(name: str, constraint: Constraint, vector: ParameterVector) -> FloatArray:
    """A linear constraint's matrix with a column for every weight."""
    chosen: npt.NDArray[np.bool_] = np.ones(vector.n, dtype=bool)
    if constraint.weights is not None:
        found = vector.matching(constraint.weights)
        if not found:
            raise ObjectiveError(
                f"constraint {name!r}: no weights match {constraint.weights!r}; their names are "
                f"{', '.join(vector.names[:10])}"
            )
        chosen[:] = False
        for tensor in found:
            chosen[vector.slices[tensor]] = True
    matrix = np.asarray(constraint.matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] != chosen.sum() or not np.isfinite(matrix).all():
        raise ObjectiveError(
            f"constraint {name!r}: expected a matrix of finite numbers with {int(chosen.sum())} columns, one a "
            f"weight, got shape {matrix.shape}"
        )
    whole = np.zeros((len(matrix), vector.n))
    whole[:, chosen] = matrix
    return whole
