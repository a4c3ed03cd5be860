"""What every method begins and ends with: plain data in solver coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hybridopt.coordinates import Mask, nearest_whole
from hybridopt.ledger import Reason
from hybridopt.optimizer import HandOver
from hybridopt.vector import ParameterVector

FloatArray: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Start:
    """What a solver begins with: plain data in solver coordinates, kept in the state, so replay needs no model."""

    x0: FloatArray
    """Shape (n,), float64."""
    lower: FloatArray
    """Shape (n,); -inf where unbounded."""
    upper: FloatArray
    """Shape (n,); inf where unbounded."""
    eps: FloatArray
    """Shape (n,): machine epsilon of each weight's dtype."""
    seed: int
    sigma: float | None = None
    """Typical distance to the optimum, as handed over by a predecessor."""
    names: tuple[tuple[str, int, int], ...] = ()
    """(name, first, last + 1) of each tensor, for messages."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of the same tensors; empty = not known."""
    loss: float = math.inf
    """The loss at `x0` where it is known: found by a predecessor, or before the solver was started anew; else inf."""
    covariance: FloatArray | None = None
    """Shape (n,) or (n, n), as handed over by a predecessor; see `HandOver`."""
    points: FloatArray | None = None
    """Good points, shape (k, n), inside the bounds, as handed over by a predecessor."""
    losses: FloatArray | None = None
    """Their losses, shape (k,)."""
    integer: Mask | None = None
    """Shape (n,): coordinates that stand for the nearest whole number, unscaled (`cells`); None = none."""
    log: Mask | None = None
    """Shape (n,): coordinates that are logarithms; None = none."""
    choices: tuple[tuple[int, int], ...] = ()
    """(first, last + 1) of coordinates of which only the largest counts, the first of equal ones."""
    constrained: bool = False
    """Whether there are constraints beside the bounds (`Ask.limits`)."""
    checked: frozenset[str] = frozenset()
    """Derivatives of autograd that this method, begun before elsewhere, found right; see `HandOver`."""
    device: str | None = None
    """Where all weights live if that is a GPU and points may be drawn there; not saved, since a run may move."""

    @property
    def n(self) -> int:
        """Number of weights."""
        return len(self.x0)

    @property
    def bounded(self) -> bool:
        """Whether any weight has a bound."""
        return bool(np.isfinite(self.lower).any() or np.isfinite(self.upper).any())

    def pairs(self) -> list[tuple[float, float]]:
        """Bounds as a list of (low, high)."""
        return list(zip(self.lower.tolist(), self.upper.tolist(), strict=True))

    def clip(self, x: FloatArray) -> FloatArray:
        """`x`, shape (..., n), brought inside the bounds (solvers stray by a rounding error); unbounded: `x` itself."""
        return np.asarray(np.clip(x, self.lower, self.upper)) if self.bounded else x

    def meant(self, x: FloatArray) -> FloatArray:
        """What points stand for, shape (..., n): whole numbers as such, 1 for what is chosen, 0 for the rest."""
        if self.integer is None and not self.choices:
            return x
        x = np.array(self.rounded(x))
        for first, last in self.choices:
            chosen = x[..., first:last].argmax(axis=-1, keepdims=True)
            x[..., first:last] = np.arange(last - first) == chosen
        return x

    def rounded(self, x: FloatArray) -> FloatArray:
        """Points, shape (..., n), whose whole numbers are as such; without any, `x` itself."""
        if self.integer is None:
            return x
        x = np.array(x)
        x[..., self.integer] = nearest_whole(
            x[..., self.integer],
            self.lower[self.integer],
            self.upper[self.integer],
            None if self.log is None else self.log[self.integer],
        )
        return x

    @classmethod
    def at(cls, vector: ParameterVector, seed: int, warm: HandOver | None) -> Start:
        """The start on a vector: the handed-over point, clipped to the bounds, or where the weights stand."""
        x0 = vector.encode(vector.read()) if warm is None or warm.x is None else warm.x
        lower, upper = vector.coordinates.box()
        names = tuple((name, s.start, s.stop) for name, s in vector.slices.items())
        clipped = np.clip(x0, lower, upper)
        start = cls(
            clipped,
            lower,
            upper,
            vector.eps,
            seed,
            names=names,
            shapes=tuple(tuple(tensor.shape) for tensor in vector.tensors),
            integer=vector.integer,
            log=vector.log,
            choices=tuple((s.start, s.stop) for name, s in vector.slices.items() if name in vector.choices),
            constrained=vector.constrained,
            device=_home(vector),
        )
        if warm is None:
            return start
        points, losses = warm.points, warm.losses
        if points is not None and losses is not None:
            points = start.clip(points)
            losses = np.where((points == warm.points).all(axis=1), losses, math.inf)
        loss = warm.loss if np.array_equal(clipped, x0) else math.inf
        return replace(
            start,
            sigma=warm.sigma,
            loss=loss,
            covariance=warm.covariance,
            points=points,
            losses=losses,
            checked=warm.checked,
        )

    _ARRAYS = ("x0", "lower", "upper", "eps")
    _OPTIONAL = ("covariance", "points", "losses", "integer", "log")
    _PLAIN = ("seed", "sigma", "loss", "constrained")

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers."""
        arrays: dict[str, Any] = {name: torch.tensor(getattr(self, name)) for name in self._ARRAYS}
        for name in self._OPTIONAL:
            value = getattr(self, name)
            arrays[name] = None if value is None else torch.tensor(value)
        plain = {name: getattr(self, name) for name in self._PLAIN}
        names, choices = [list(part) for part in self.names], [list(part) for part in self.choices]
        shapes, checked = [list(shape) for shape in self.shapes], sorted(self.checked)
        return arrays | plain | {"names": names, "shapes": shapes, "choices": choices, "checked": checked}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Start:
        """The start that was saved."""
        saved = {name: state[name] for name in (*cls._ARRAYS, *cls._OPTIONAL)}
        parts: dict[str, Any] = {
            name: None if value is None else value.numpy().copy() for name, value in saved.items()
        }
        parts |= {name: state[name] for name in cls._PLAIN}
        names = tuple((name, first, last) for name, first, last in state["names"])
        shapes = tuple(map(tuple, state["shapes"]))
        choices = tuple((first, last) for first, last in state["choices"])
        return cls(**parts, names=names, shapes=shapes, choices=choices, checked=frozenset(state["checked"]))


def _home(vector: ParameterVector) -> str | None:
    """The GPU on which all weights live, unless coordinates are whole numbers or logarithms, which NumPy decodes."""
    devices = {tensor.device for tensor in vector.tensors}
    if len(devices) > 1 or vector.integer is not None or vector.log is not None:
        return None
    device = devices.pop()
    return str(device) if device.type == "cuda" else None


class Ending(NamedTuple):
    """How a solver ended, by its status code, never by its text."""

    reason: Reason
    message: str
    loss: float
    x: FloatArray
