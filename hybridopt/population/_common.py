"""Small pieces that several population methods need: checks of options, first points, ranks, signs of the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from hybridopt.errors import MethodError
from hybridopt.ledger import Reason
from hybridopt.optimizer import HandOver
from hybridopt.population._base import FloatArray
from hybridopt.rows import Rows
from hybridopt.start import Ending, Start


def require_at_least(method: Any, **lowest: float) -> None:
    """Raise `MethodError` if an option (None is left alone) is below its lowest value."""
    for option, low in lowest.items():
        value = getattr(method, option)
        if value is not None and not value >= low:
            raise MethodError(f"{method.name}: expected {option} >= {low}, got {value!r}")


def require_positive(method: Any, *options: str) -> None:
    """Raise `MethodError` if an option (None is left alone) is not a positive finite number."""
    for option in options:
        value = getattr(method, option)
        if value is not None and not 0 < value < np.inf:
            raise MethodError(f"{method.name}: expected a positive finite {option}, got {value!r}")


def spread(start: Start, sigma: float | None) -> FloatArray:
    """Initial standard deviation of each weight, shape (n,), in solver coordinates.

    `sigma` where it is given. Else 0.3 × the range of a bounded weight and 0.5 for an unbounded one, or what a
    predecessor handed over, but a tenth of the former at least: one that has converged hands over next to nothing. A
    handed-over shape is put on either.
    """
    width = start.upper - start.lower
    size = np.where(np.isfinite(width), 0.3 * width, 0.5)
    if sigma is not None:
        size = np.full(start.n, float(sigma))
    elif start.sigma is not None:
        size = np.maximum(start.sigma, size / 10)
    if start.covariance is None:
        return size
    C = start.covariance
    stds: FloatArray = size * np.sqrt(C if C.ndim == 1 else C.diagonal())
    return stds


def correlated(start: Start) -> FloatArray | None:
    """The lower Cholesky factor of the correlations that a predecessor handed over, shape (n, n).

    None where there are none, or where they are not positive definite.
    """
    C = start.covariance
    if C is None or C.ndim == 1:
        return None
    stds = np.sqrt(C.diagonal())
    try:
        factor: FloatArray = np.linalg.cholesky(C / np.outer(stds, stds))
    except np.linalg.LinAlgError:
        return None
    return factor


def handed(covariance: FloatArray) -> HandOver:
    """A distribution, by its covariance, shape (n, n), or variances, shape (n,), as a successor may take it over."""
    variances = covariance if covariance.ndim == 1 else covariance.diagonal()
    if not ((variances > 0) & np.isfinite(variances)).all():
        return HandOver()
    size = float(np.exp(np.log(variances).mean()))
    return HandOver(sigma=size**0.5, covariance=covariance / size)


def handed_points(x: FloatArray, losses: FloatArray) -> HandOver:
    """Points whose losses are finite, shape (k, n), as a successor may take them over, the best first; their spread."""
    order = np.argsort(losses, kind="stable")[: int(np.isfinite(losses).sum())]
    if not len(order):
        return HandOver()
    points = x[order]
    return HandOver(sigma=handed(points.var(axis=0)).sigma, points=points, losses=losses[order])


def first_points(start: Start, popsize: int, rng: np.random.Generator) -> FloatArray:
    """A first population, shape (popsize, n): the start, then points drawn uniformly from the box.

    Good points that a predecessor handed over take a tenth of the places: more of them, close together, would end the
    search where it begins. (So would all points about the start, as far as the predecessor says: PSO to DE on
    Rastrigin-10 then finds the minimum in 0 of 10 runs instead of 9.)
    """
    x = start.lower + rng.random((popsize, start.n)) * (start.upper - start.lower)
    x[0] = start.x0
    if start.points is not None:
        known = start.points[(start.points != start.x0).any(1)][: max(1, popsize // 10)]
        x[1 : 1 + len(known)] = known
    return start.clip(x)


def in_box(start: Start, u: FloatArray, otherwise: FloatArray) -> FloatArray:
    """Points `u` of the unit cube put into the box, shape (..., n); weights without one as in `otherwise`."""
    boxed = np.isfinite(start.lower) & np.isfinite(start.upper)
    with np.errstate(invalid="ignore"):
        x: FloatArray = np.where(boxed, start.lower + u * (start.upper - start.lower), otherwise)
    return x


def mirror(start: Start, x: FloatArray) -> FloatArray:
    """Points outside the bounds reflected at them, as often as it takes, shape (..., n)."""
    if not start.bounded:
        return x
    lower, upper = start.lower, start.upper
    low, high = np.isfinite(lower), np.isfinite(upper)
    with np.errstate(invalid="ignore"):
        width = upper - lower
        folded = width - np.abs(np.mod(x - lower, 2 * width) - width)  # a triangle wave
        x = np.where(low & high, lower + folded, x)
        x = np.where(low & ~high, lower + np.abs(x - lower), x)
        x = np.where(high & ~low, upper - np.abs(upper - x), x)
    return start.clip(x)


def share_by_rank(losses: FloatArray, table: FloatArray) -> FloatArray:
    """`table[k]` for the k-th lowest loss, shape (popsize,); equal losses share the mean of theirs.

    So rejected points (+inf) all count alike, and a flat generation teaches nothing if the table's sum is 0.
    """
    values, inverse = np.unique(losses, return_inverse=True)
    order = np.argsort(losses, kind="stable")
    summed = np.bincount(inverse[order], weights=table, minlength=len(values))
    shared: FloatArray = (summed / np.bincount(inverse))[inverse]
    return shared


def agree(losses: FloatArray, tolfun: float) -> bool:
    """Whether losses differ, but by no more than `tolfun` × max(1, |lowest|; all equal is a plateau."""
    lowest = float(losses.min())
    return 0 < float(losses.max()) - lowest <= tolfun * max(1.0, abs(lowest))


def end(reason: Reason, message: str, x: Rows, losses: FloatArray) -> Ending:
    """An `Ending` at the best of some points."""
    lowest = int(np.argmin(losses))
    return Ending(reason, message, float(losses[lowest]), x[lowest].copy())
