"""Points that a user gives a population to begin with, beside those that a predecessor hands over."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from hybridopt.errors import BoundsError, MethodError
from hybridopt.optimizer import HandOver
from hybridopt.vector import ParameterVector

Points: TypeAlias = tuple[tuple[float, ...], ...]


def read_points(label: str, given: Any) -> Points:
    """The option `initial` as plain data, which can be hashed and printed.

    Args:
        label: the method, for messages.
        given: k points of n numbers each: nested sequences, an array or a tensor.

    Raises:
        MethodError: it has another shape, or a number is not finite.
    """
    try:
        points = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.full(1, np.nan)
    if points.shape == (0,):
        return ()
    if points.ndim != 2 or not np.isfinite(points).all():
        raise MethodError(
            f"{label}: expected initial to be points of n finite numbers each, as in ((1.0, 2.0), (0.5, -1.0)), "
            f"got {given!r}"
        )
    return tuple(tuple(point) for point in points.tolist())


def with_points(
    label: str, initial: Points, vector: ParameterVector, warm: HandOver | None
) -> HandOver | None:
    """What is handed over, with the points of `initial` before its own.

    Args:
        label: the method, for messages.
        initial: points of as many numbers as `vector` has weights, in their order and their units.
        vector: what they are points of.
        warm: what a predecessor hands over; None = nothing.

    Raises:
        MethodError: a point has not one number for each weight, or one that is not positive where its logarithm is
            searched.
        BoundsError: a point lies outside the bounds.
    """
    if not initial:
        return warm
    x = np.array(initial)
    if x.shape[1] != vector.n:
        raise MethodError(
            f"{label}: expected initial points of {vector.n} numbers, one for each weight, got {x.shape[1]}"
        )
    if vector.log is not None and (x[:, vector.log] <= 0).any():
        raise MethodError(
            f"{label}: expected initial points to be positive where the logarithm of a weight is searched"
        )
    for i, point in enumerate(initial):
        if vector.outside(x[i]):
            raise BoundsError(
                f"{label}: expected initial points inside the bounds, number {i + 1} is {point}"
            )
    warm = HandOver() if warm is None else warm
    points, losses = vector.encode(x), np.full(len(x), np.inf)
    if warm.points is not None and warm.losses is not None:
        points, losses = np.concatenate([points, warm.points]), np.concatenate([losses, warm.losses])
    return warm._replace(points=points, losses=losses)
