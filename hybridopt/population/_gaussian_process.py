"""A Gaussian process: what some values say of all others (Rasmussen & Williams, 2006, chapters 2 and 5)."""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotri, dpotrs, dtrtrs
from scipy.optimize import fmin_l_bfgs_b
from scipy.special import erfcx, ndtr

from hybridopt.population._base import FloatArray

ROOT5 = math.sqrt(5)
LENGTHS = (1e-2, 1e2)  # of a lengthscale, in units of the box
NOISES = (1e-8, 1.0)  # of the noise's variance, as a part of the process's
PRIOR_LENGTH = (
    0.5,
    1.0,
)  # median for one coordinate, it grows with the root of n; deviation of the logarithm
PRIOR_NOISE = (math.exp(-6), 2.0)  # median; deviation of the logarithm


class GaussianProcess:
    """A process of mean 0 with the Matérn kernel of order 5/2, a lengthscale for each coordinate, and noise.

    Its variance is estimated together with the mean of one observation of variance 1, so that it never vanishes.

    Args:
        x: shape (k, n), in the unit cube.
        y: shape (k,), of mean 0 and variance 1.
        parameters: shape (n + 1,), natural logarithms of the lengthscales and of the noise's variance as a part of the
            process's.
    """

    def __init__(self, x: FloatArray, y: FloatArray, parameters: FloatArray) -> None:
        self.parameters = parameters
        self.lengths = np.exp(parameters[:-1])
        self._z = x / self.lengths
        noise, failed = math.exp(parameters[-1]), 1
        r = _distances(self._z, self._z)
        kernel = _matern(r, np.exp(-r))
        while failed:  # rounding may leave points that are close together no positive definite matrix
            self._L, failed = dpotrf(kernel + noise * np.eye(len(y)), 1, 1)
            noise *= 10
        self._weights: FloatArray = dpotrs(self._L, y, 1)[0]
        self.variance = (float(y @ self._weights) + 1) / (len(y) + 1)

    @classmethod
    def fitted(
        cls, x: FloatArray, y: FloatArray, guess: FloatArray | None, anew: bool = True
    ) -> GaussianProcess:
        """With the parameters of highest posterior density found from `guess` and, `anew`, from half the box."""
        n = x.shape[1]
        usual = np.log(np.append(np.full(n, PRIOR_LENGTH[0]), 1e-3))
        bounds = [(math.log(low), math.log(high)) for low, high in [LENGTHS] * n + [NOISES]]
        starts = [start for start in (guess, usual if anew else None) if start is not None]
        found = [fmin_l_bfgs_b(misfit, p, args=(x, y), bounds=bounds, maxiter=50)[:2] for p in starts]
        return cls(x, y, min(found, key=lambda pair: float(pair[1]))[0])

    def __call__(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation (without noise) at the rows of `x`, shape (m,) each; k² m operations."""
        r = _distances(self._z, x / self.lengths)
        kernel = _matern(r, np.exp(-r))
        half, _ = dtrtrs(self._L, kernel, lower=1)
        rest = np.maximum(1 - np.einsum("ij,ij->j", half, half), 1e-12)
        return self._weights @ kernel, np.sqrt(self.variance * rest)


def misfit(parameters: FloatArray, x: FloatArray, y: FloatArray) -> tuple[float, FloatArray]:
    """Minus the logarithm of the parameters' posterior density but for a constant, and its gradient, shape (n + 1,).

    Rasmussen & Williams, eq. 5.8 and 5.9, with the best variance put in. k³ operations.
    """
    k, n = x.shape
    z, noise = x / np.exp(parameters[:-1]), math.exp(parameters[-1])
    r = _distances(z, z)
    decay = np.exp(-r)
    L, failed = dpotrf(_matern(r, decay) + noise * np.eye(k), 1, 1)
    if failed:
        return 1e25, np.zeros(n + 1)
    weights = dpotrs(L, y, 1)[0]
    variance = (y @ weights + 1) / (k + 1)
    lower = dpotri(L, 1)[0]
    inverse = np.tril(lower) + np.tril(lower, -1).T
    slope = (inverse - np.outer(weights, weights) / variance) / 2  # with respect to the matrix
    # times (z_i - z_j)²: with respect to the logarithm of a length
    change = slope * (5 / 3) * (1 + r) * decay
    gradient = np.empty(n + 1)
    gradient[:-1] = 2 * (change.sum(1) @ (z * z) - np.einsum("ij,ij->j", z, change @ z))
    gradient[-1] = noise * slope.trace()
    middle = np.log(np.append(np.full(n, PRIOR_LENGTH[0] * math.sqrt(n)), PRIOR_NOISE[0]))
    deviations = np.append(np.full(n, PRIOR_LENGTH[1]), PRIOR_NOISE[1])
    away = (parameters - middle) / deviations
    value = (k + 1) / 2 * math.log(variance) + np.log(L.diagonal()).sum() + away @ away / 2
    return float(value), gradient + away / deviations


def log_expected_improvement(mean: FloatArray, std: FloatArray, lowest: float) -> FloatArray:
    """Logarithm of E max(0, lowest - y) for normal y, also where that is 0 in float64 (Ament et al., NeurIPS 2023).

    Args:
        mean, std: of y, shape (m,); std > 0.
        lowest: what shall be improved on.
    """
    u = (lowest - mean) / std
    density = -u * u / 2 - math.log(2 * math.pi) / 2
    near, far = u > -1, u < -1e3
    value = density - 2 * np.log(np.maximum(-u, 1))  # far out, where phi(u) + u Phi(u) = phi(u) / u²
    value[near] = np.log(np.exp(density[near]) + u[near] * ndtr(u[near]))
    between = ~(near | far)
    v = -u[between]
    value[between] = density[between] + np.log1p(-v * erfcx(v / math.sqrt(2)) * math.sqrt(math.pi / 2))
    return np.asarray(value + np.log(std))


def _distances(a: FloatArray, b: FloatArray) -> FloatArray:
    """Root of 5 times those of the rows of two matrices from each other, shape (len(a), len(b))."""
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.asarray(ROOT5 * np.sqrt(np.maximum(squares, 0.0)))


def _matern(r: FloatArray, decay: FloatArray) -> FloatArray:
    """The kernel (eq. 4.17) at `_distances` r, whose exp(-r) is `decay`."""
    kernel: FloatArray = (1 + r + r * r / 3) * decay
    return kernel
