"""Hyperparameters of several kinds as one vector: numbers, whole numbers, choices, some only under a condition."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridopt.coordinates import FloatArray
from hybridopt.errors import BoundsError, SelectionError, nearest
from hybridopt.vector import ParameterVector

__all__ = ["Categorical", "Float", "Int", "Space", "Value", "When"]

Value: TypeAlias = str | int | float | bool | None
When: TypeAlias = tuple[str, Value | tuple[Value, ...]] | None
_PLAIN = str | int | float | bool | None


@dataclass(frozen=True)
class Float:
    """A number between `low` and `high`, both included; `log`: searched by its logarithm."""

    low: float
    high: float
    log: bool = False
    when: When = None
    """(name, value) or (name, (value, ...)): it counts only where that earlier parameter has (one of) the values."""


@dataclass(frozen=True)
class Int:
    """A whole number from `low` to `high`, both included; `log`: searched by its logarithm."""

    low: int
    high: int
    log: bool = False
    when: When = None
    """As in `Float`."""


@dataclass(frozen=True)
class Categorical:
    """One of several values without an order: strings, numbers, bools or None.

    It takes one coordinate between 0 and 1 for each choice; the largest wins, the first of equal ones.
    """

    choices: Sequence[Value]
    when: When = None
    """As in `Float`."""

    def __post_init__(self) -> None:
        if isinstance(self.choices, Iterable) and not isinstance(self.choices, str):  # `Space` refuses others
            object.__setattr__(self, "choices", tuple(self.choices))


Parameter: TypeAlias = Float | Int | Categorical


class Space:
    """Named hyperparameters, and the way from a flat vector to their values and back.

    `vector()` is an ordinary `ParameterVector` with one tensor for each parameter, so every method searches a space as
    it does weights; `values(x)` says what a point stands for. A parameter whose condition does not hold keeps its
    coordinates, which then do nothing, and is left out of the values.

    Args:
        parameters: `Float`, `Int` or `Categorical` by name, in the order of the flat vector.

    Raises:
        SelectionError: a name, a choice or a condition that is none.
        BoundsError: low >= high, or a logarithm of what is not positive.

    Example:
        >>> from hybridopt import Categorical, Float, Int, Space
        >>> space = Space({
        ...     "lr": Float(1e-5, 1, log=True),
        ...     "width": Int(4, 128),
        ...     "optimizer": Categorical(["sgd", "adam"]),
        ...     "momentum": Float(0, 0.99, when=("optimizer", "sgd")),
        ... })
        >>> vector = space.vector()
        >>> vector.n, space.values(vector.read())
        (5, {'lr': 0.0031622776601683794, 'width': 66, 'optimizer': 'sgd', 'momentum': 0.495})
        >>> space.values(space.x({"lr": 0.1, "width": 8, "optimizer": "adam"}))
        {'lr': 0.1, 'width': 8, 'optimizer': 'adam'}
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters: dict[str, Parameter] = dict(parameters)
        if not self.parameters:
            raise SelectionError("space: expected at least one parameter, got none")
        seen: dict[str, Parameter] = {}
        for name, parameter in self.parameters.items():
            _check(name, parameter, seen)
            seen[name] = parameter
        sizes = [len(p.choices) if isinstance(p, Categorical) else 1 for p in self.parameters.values()]
        ends = np.cumsum([0, *sizes]).tolist()
        self.slices: dict[str, slice] = {
            name: slice(a, b) for name, a, b in zip(self.parameters, ends, ends[1:], strict=False)
        }
        """Where each parameter's coordinates are in the flat vector."""
        self.n: int = ends[-1]
        self._middle = np.full(self.n, 0.5)
        for name, parameter in self.parameters.items():
            if not isinstance(parameter, Categorical):
                self._middle[self.slices[name]] = _middle(parameter)

    def __repr__(self) -> str:
        return f"Space({self.parameters!r})"

    def describe(self) -> dict[str, dict[str, Any]]:
        """The space as plain data, for a record or a comparison of two."""
        return {
            name: {"kind": type(p).__name__.lower(), **_plain(dataclasses.asdict(p))}
            for name, p in self.parameters.items()
        }

    # -- points -------------------------------------------------------------------------------------------------

    def vector(self, start: Mapping[str, Value] | None = None) -> ParameterVector:
        """A new vector of float64 tensors, one for each parameter, standing at `start` (default: the middle).

        The middle of a logarithm is the geometric one; of a choice it is the first.

        Raises:
            SelectionError, BoundsError: see `x`.
        """
        x = self._middle if start is None else self.x(start)
        tensors = {name: torch.tensor(x[part]) for name, part in self.slices.items()}
        boxes = {
            name: (0.0, 1.0) if isinstance(p, Categorical) else (float(p.low), float(p.high))
            for name, p in self.parameters.items()
        }
        vector = ParameterVector(
            tensors,
            bounds=boxes,
            integer=lambda name, _: isinstance(self.parameters[name], Int),
            log=lambda name, _: getattr(self.parameters[name], "log", False),
        )
        vector.choices = frozenset(name for name, p in self.parameters.items() if isinstance(p, Categorical))
        return vector

    def values(self, x: npt.ArrayLike | Tensor | Mapping[str, Tensor]) -> dict[str, Value]:
        """What a point stands for: float, int or the choice, of the parameters that count there.

        Args:
            x: shape (n,), as `ParameterVector.read` returns it; or the tensors themselves, as a loss gets them.
        """
        if isinstance(x, Mapping):
            x = torch.cat([x[name].detach().reshape(-1).to("cpu", torch.float64) for name in self.parameters])
        flat = np.asarray(x, dtype=np.float64)
        if flat.shape != (self.n,):
            raise ValueError(f"x: expected shape ({self.n},), one number per coordinate, got {flat.shape}")
        found: dict[str, Value] = {}
        for name, parameter in self.parameters.items():
            if _counts(parameter, found):
                found[name] = _read(parameter, flat[self.slices[name]])
        return found

    def x(self, values: Mapping[str, Value]) -> FloatArray:
        """The point that stands for `values`, shape (n,); parameters that do not count there get their middle.

        Raises:
            SelectionError: a parameter that counts is missing, one is unknown or does not count, or a value is no
                choice.
            BoundsError: a number is out of range, or not whole where it must be.
        """
        unknown = [name for name in values if name not in self.parameters]
        if unknown:
            near = nearest(str(unknown[0]), self.parameters)
            raise SelectionError(f"space: {unknown[0]!r} is no parameter{near}")
        x = self._middle.copy()
        known: dict[str, Value] = {}
        for name, parameter in self.parameters.items():
            counts = _counts(parameter, known)
            if counts != (name in values):
                problem = f"expected a value for {name!r}" if counts else f"{name!r} needs {parameter.when}"
                raise SelectionError(f"space: {problem}, got {dict(values)}")
            if counts:
                known[name] = values[name]
                x[self.slices[name]] = _write(name, parameter, values[name])
        return x

    def sample(self, rng: np.random.Generator) -> FloatArray:
        """A random point, shape (n,): uniform, logarithms uniform as such, whole numbers and choices equally likely."""
        vector = self.vector()
        low, high = vector.coordinates.box()
        return vector.decode(low + rng.random(self.n) * (high - low))


def _counts(parameter: Parameter, values: Mapping[str, Value]) -> bool:
    """Whether the condition holds; one that rests on a parameter which does not count never does."""
    if parameter.when is None:
        return True
    name, wanted = parameter.when
    return name in values and values[name] in (wanted if isinstance(wanted, tuple) else (wanted,))


def _middle(parameter: Float | Int) -> float:
    low, high = parameter.low, parameter.high
    middle = math.sqrt(low * high) if parameter.log else (low + high) / 2
    return float(round(middle)) if isinstance(parameter, Int) else middle


def _read(parameter: Parameter, x: FloatArray) -> Value:
    if isinstance(parameter, Categorical):
        return parameter.choices[int(np.argmax(x))]
    return round(float(x[0])) if isinstance(parameter, Int) else float(x[0])


def _write(name: str, parameter: Parameter, value: Value) -> Any:
    if isinstance(parameter, Categorical):
        if value not in parameter.choices:
            raise SelectionError(f"space: {name!r}: expected one of {parameter.choices}, got {value!r}")
        return np.eye(len(parameter.choices))[parameter.choices.index(value)]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and parameter.low <= value <= parameter.high):  # type: ignore[operator]
        raise BoundsError(
            f"space: {name!r}: expected a number from {parameter.low} to {parameter.high}, got {value!r}"
        )
    if isinstance(parameter, Int) and value != int(value):  # type: ignore[arg-type]
        raise BoundsError(f"space: {name!r}: expected a whole number, got {value!r}")
    return value


def _check(name: Any, parameter: Any, before: Mapping[str, Parameter]) -> None:
    """Raise if a parameter cannot be one."""
    if not isinstance(name, str) or not name or set(name) & set("*?[]"):
        raise SelectionError(f"space: expected names that are text without any of '*?[]', got {name!r}")
    if isinstance(parameter, Categorical):
        choices = parameter.choices
        plain = isinstance(choices, tuple) and all(isinstance(c, _PLAIN) for c in choices)
        if not plain or len(choices) < 2 or len(set(choices)) < len(choices):
            raise SelectionError(
                f"space: {name!r}: expected two or more different choices that are text, numbers, bools or None, got "
                f"{choices!r}"
            )
    elif isinstance(parameter, Float | Int):
        ends: list[Any] = [parameter.low, parameter.high]
        low, high = ends
        real = all(isinstance(end, numbers.Real) for end in ends)
        if not (real and -math.inf < low < high < math.inf) or (parameter.log and low <= 0):
            above = "0 < low < high" if parameter.log else "low < high"
            raise BoundsError(f"space: {name!r}: expected finite {above}, got ({low!r}, {high!r})")
        if isinstance(parameter, Int) and not (low == int(low) and high == int(high)):
            raise BoundsError(f"space: {name!r}: expected whole numbers, got ({low}, {high})")
    else:
        raise SelectionError(f"space: {name!r}: expected a Float, Int or Categorical, got {parameter!r}")
    if parameter.when is not None:
        _check_when(name, parameter.when, before)


def _check_when(name: str, when: Any, before: Mapping[str, Parameter]) -> None:
    if not (isinstance(when, tuple) and len(when) == 2 and when[0] in before):
        raise SelectionError(
            f"space: {name!r}: expected when=(an earlier parameter, its value or a tuple of values), got {when!r}"
        )
    parent = before[when[0]]
    wanted = when[1] if isinstance(when[1], tuple) else (when[1],)
    if isinstance(parent, Float) or not wanted:
        raise SelectionError(f"space: {name!r}: a condition is on choices or whole numbers, got {when!r}")
    for value in wanted:
        _write(when[0], parent, value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
