"""What a solver saw on its way and a successor can use: the best points, the curvature of the last gradients."""

from __future__ import annotations

import bisect
import math
from collections import deque
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hybridopt.optimizer import HandOver

FloatArray: TypeAlias = npt.NDArray[np.float64]

POINTS = 32  # best points kept
PAIRS = 10  # changes of point and gradient kept, as L-BFGS does
ROOM = 2**20  # numbers that the points may take together: fewer points of many weights
DENSE = 512  # weights up to which a full covariance is handed over


class Trail:
    """The lowest points and the latest gradients of one method; nothing to save, a replay walks it again."""

    def __init__(self, n: int) -> None:
        self._room = max(1, min(POINTS, ROOM // n))
        self._losses: list[float] = []
        self._points: list[FloatArray] = []
        self._gradients: deque[tuple[FloatArray, FloatArray]] = deque(maxlen=PAIRS + 1)

    def note(self, x: FloatArray, loss: float) -> None:
        """A point and its loss, shape (n,)."""
        if not math.isfinite(loss) or (len(self._losses) == self._room and loss >= self._losses[-1]):
            return
        at = bisect.bisect_right(self._losses, loss)
        self._losses.insert(at, loss)
        self._points.insert(at, x.copy())
        del self._losses[self._room :], self._points[self._room :]

    def note_gradient(self, x: FloatArray, gradient: FloatArray) -> None:
        """A point and its gradient, each of shape (n,)."""
        self._gradients.append((x.copy(), gradient.copy()))

    def hand_over(self) -> HandOver:
        """Points and, where there were gradients, the covariance that they imply.

        No `sigma`: after a solver's local searches its lowest points lie as close together as difference steps
        (annealing on Rosenbrock-20: 4e-7), which is no distance still to go.
        """
        points = losses = covariance = None
        if len(self._points) > 1:
            points, losses = np.array(self._points), np.array(self._losses)
        if len(self._gradients) > 1:
            x, g = (np.array(side) for side in zip(*self._gradients, strict=True))
            covariance = inverse_curvature(np.diff(x, axis=0), np.diff(g, axis=0))
        return HandOver(covariance=covariance, points=points, losses=losses)


def inverse_curvature(moved: FloatArray, turned: FloatArray) -> FloatArray | None:
    """A relative covariance, as in `HandOver`, from changes of the point and of the gradient, oldest first.

    The limited-memory BFGS approximation of the inverse Hessian from the pairs of positive curvature, in compact form
    (Byrd, Nocedal & Schnabel 1994, theorem 2.2): (n, n) up to `DENSE` weights, above that its diagonal. None where no
    pair tells anything.

    Args:
        moved, turned: shape (k, n).
    """
    curvature = np.einsum("kn,kn->k", moved, turned)
    size = np.linalg.norm(moved, axis=1) * np.linalg.norm(turned, axis=1)
    good = curvature > 1e-10 * size
    if not good.any():
        return None
    moved, turned, curvature = moved[good], turned[good], curvature[good]
    n, k = moved.shape[1], len(moved)
    gamma = curvature[-1] / (turned[-1] @ turned[-1])
    both = np.concatenate([moved, gamma * turned]).T  # (n, 2k)
    product = moved @ turned.T
    upper = np.linalg.inv(np.triu(product))
    middle = np.zeros((2 * k, 2 * k))
    middle[:k, :k] = upper.T @ (np.diag(curvature) + gamma * turned @ turned.T) @ upper
    middle[:k, k:], middle[k:, :k] = -upper.T, -upper
    if n > DENSE:
        return relative(gamma + np.einsum("nk,nk->n", both @ middle, both))
    return relative(gamma * np.eye(n) + both @ middle @ both.T)


def relative(covariance: FloatArray, spread: float = 1e4) -> FloatArray | None:
    """A covariance, (n,) or (n, n), made relative: geometric mean of its diagonal 1.

    Variances further than `spread` from it are drawn in, since they come from few samples. None if it is not a positive
    finite one.
    """
    diagonal = covariance if covariance.ndim == 1 else np.diagonal(covariance)
    if not np.isfinite(covariance).all() or not (diagonal > 0).all():
        return None
    if covariance.ndim == 1:
        made = np.exp(
            np.clip(np.log(covariance) - np.log(covariance).mean(), -math.log(spread), math.log(spread))
        )
        result: FloatArray = made / np.exp(np.log(made).mean())
        return result
    values, vectors = np.linalg.eigh(covariance)
    middle = math.exp(float(np.log(np.maximum(values, 1e-300)).mean()))
    values = np.clip(values, middle / spread, middle * spread)
    full: FloatArray = (vectors * values) @ vectors.T
    return full / math.exp(float(np.log(np.diagonal(full)).mean()))
