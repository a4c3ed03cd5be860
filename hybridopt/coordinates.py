"""Solver coordinates: how a weight becomes the number that a solver moves, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hybridopt.errors import StateError

FloatArray: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Weights <-> solver coordinates, one number each: logarithm, then division by a scale; back with rounding.

    Coordinates of whole numbers stay continuous, so that any solver can move them; the weight they stand for is the
    nearest whole number, halves to the even one.

    Every array but the last has shape (n,); None = for no weight.
    """

    lower: FloatArray
    """Of the weights: nothing is decoded to less; -inf where unbounded."""
    upper: FloatArray
    scale: FloatArray | None = None
    """1 where `integer`."""
    integer: Mask | None = None
    log: Mask | None = None
    tiny: FloatArray | float = 0.0
    """What no weight that is `log` is less than, shape (their number,).

    The smallest normal number of its dtype; `LEAST_WHOLE` where it is `integer`.
    """
    huge: FloatArray | float = np.inf
    """The largest finite number of the dtype of each, shape (their number,): none is more."""

    def encode(self, x: FloatArray) -> FloatArray:
        """Weights -> solver coordinates, shape (..., n); the same object where they are the same numbers."""
        if self.log is not None:
            x = np.array(x)
            x[..., self.log] = np.log(np.maximum(x[..., self.log], self.tiny))
        return x if self.scale is None else x / self.scale

    def decode(self, z: FloatArray) -> FloatArray:
        """Solver coordinates -> weights, shape (..., n), kept inside the bounds against rounding."""
        if self.scale is None and self.integer is None and self.log is None:
            return z
        x = np.array(z) if self.scale is None else z * self.scale
        if self.log is not None:
            with np.errstate(over="ignore"):
                x[..., self.log] = np.clip(np.exp(x[..., self.log]), self.tiny, self.huge)
        if self.integer is not None:
            x[..., self.integer] = np.rint(x[..., self.integer])
        clipped: FloatArray = np.clip(x, self.lower, self.upper)
        return clipped

    def box(self) -> tuple[FloatArray, FloatArray]:
        """The bounds in solver coordinates. Those of whole numbers lie half a number further out.

        So the outermost whole numbers have as much room as the others. Where one is `log`, it is at least 1.
        """
        lower, upper = self.lower, self.upper
        if self.integer is not None:
            lower, upper = (
                np.where(self.integer, lower - 0.5, lower),
                np.where(self.integer, upper + 0.5, upper),
            )
        low, high = self.encode(lower), self.encode(upper)
        free = np.isinf(lower)
        if self.integer is not None and self.log is not None:
            free &= ~(self.integer & self.log)
        return np.where(free, lower, low), np.where(np.isinf(upper), upper, high)

    def slope(self, x: FloatArray) -> FloatArray | None:
        """Change of each weight with its solver coordinate at the weights `x`, shape (..., n); None where it is 1.

        By the chain rule a gradient in weights times this is one in solver coordinates. 0 for whole numbers.
        """
        if self.integer is None and self.log is None:
            return self.scale
        slope = (
            np.ones(np.shape(x)) if self.scale is None else np.broadcast_to(self.scale, np.shape(x)).copy()
        )
        if self.log is not None:
            slope[..., self.log] *= x[..., self.log]
        if self.integer is not None:
            slope[..., self.integer] = 0.0
        return slope

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Bounds and scale, by which a saved solver's numbers become weights: a number where all are alike."""
        return {name: _plain(getattr(self, name)) for name in ("lower", "upper", "scale")}

    def resumed(self, state: Mapping[str, Any], measured: bool) -> Coordinates:
        """The coordinates in which a saved run goes on: these ones, or with its scale where that was `measured`.

        Args:
            state: from `state_dict`.
            measured: whether the scale was read from where the weights stand, which now is elsewhere.

        Raises:
            StateError: bounds or scale are others.
        """
        for name in ("lower", "upper", "scale"):
            if name == "scale" and measured and state[name] is not None:
                continue
            saved, given = state[name], _plain(getattr(self, name))
            if not _equal(saved, given):
                what = "scale" if name == "scale" else "bounds"
                raise StateError(
                    f"state: it was saved with other {what} ({name} {_brief(saved)}, here {_brief(given)}), under "
                    f"which the solver's numbers were other weights; pass the same {what}="
                )
        if not measured or self.scale is None:
            return self
        saved = state["scale"]
        scale = np.full_like(self.scale, saved) if isinstance(saved, float) else saved.numpy().copy()
        return replace(self, scale=scale)


def _plain(numbers: FloatArray | None) -> Any:
    if numbers is None:
        return None
    alike = len(numbers) > 0 and bool((numbers == numbers[0]).all())
    return float(numbers[0]) if alike else torch.tensor(numbers)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _brief(numbers: Any) -> str:
    if isinstance(numbers, torch.Tensor):
        return f"between {numbers.min().item():g} and {numbers.max().item():g}"
    return "none" if numbers is None else f"{numbers:g}"


LEAST_WHOLE = math.nextafter(0.5, 1)
"""Rounded to 1: a whole number that is searched by its logarithm is at least 1."""


def cells(z: FloatArray, log: Mask | None) -> tuple[FloatArray, FloatArray]:
    """The ends of the interval of solver coordinates that stands for the same whole number as `z`, shape (..., n).

    Args:
        z: solver coordinates of whole numbers.
        log: shape (n,), which of them are logarithms (of at least 1); None = none.
    """
    whole = _whole(z, log)
    return _encoded(whole - 0.5, log), _encoded(whole + 0.5, log)


def to_next(z: FloatArray, log: Mask | None) -> FloatArray:
    """How far it is from the whole numbers `z` (`nearest_whole`) to the next ones, shape (..., n).

    As far down it is to the ones before, if there are any (with logarithms: to what is rounded to them).
    """
    return _encoded(_whole(z, log) + 1.0, log) - z


def _whole(z: FloatArray, log: Mask | None) -> FloatArray:
    """The whole numbers that coordinates stand for, bounds aside; logarithms are of at least 1."""
    whole: FloatArray = np.rint(_numbers(z, log))
    return whole if log is None else np.where(log, np.maximum(whole, 1.0), whole)


def nearest_whole(z: FloatArray, lower: FloatArray, upper: FloatArray, log: Mask | None) -> FloatArray:
    """Solver coordinates of the whole numbers that `z` stands for, shape (..., n).

    Args:
        z: solver coordinates of whole numbers.
        lower, upper: their box (`Coordinates.box`), shape (n,).
        log: shape (n,), which of them are logarithms (of at least 1); None = none.
    """
    low, high, number = (_numbers(v, log) for v in (lower, upper, z))
    return _encoded(np.clip(np.rint(number), np.ceil(low), np.floor(high)), log)


def _numbers(z: FloatArray, log: Mask | None) -> FloatArray:
    """What unscaled solver coordinates stand for before they are rounded, shape (..., n)."""
    return z if log is None else np.where(log, np.exp(np.where(log, z, 0.0)), z)


def _encoded(numbers: FloatArray, log: Mask | None) -> FloatArray:
    """Back from `_numbers`."""
    if log is None:
        return numbers
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(log, np.log(numbers), numbers)
