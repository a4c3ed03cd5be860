"""What CMA-ES learns about the shape of its distribution: N(0, C) with C full, diagonal, or of limited memory."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular
from scipy.linalg.blas import daxpy, dgemm, dscal, dsyr, dsyrk, dtrmm
from scipy.linalg.lapack import dpotrf, dsyevd

from hybridopt.population._base import FloatArray, Plain
from hybridopt.rows import Rows, combined, square, squared_lengths

IntArray: TypeAlias = npt.NDArray[np.intp]

FULL, SEPARABLE, LIMITED = "full", "separable", "limited"
SMALL = 24  # rows of C; below, one product of whole matrices takes less time than what it saves by halves
HISTORY = 20_000  # generations whose losses are kept


class Constants(NamedTuple):
    """Weights and learning rates, in the letters of Hansen's tutorial (arXiv 1604.00772)."""

    mu: int
    weights: FloatArray
    """Shape (popsize,), by rank: the first mu sum to 1; the others are negative, or 0 unless `active`."""
    better: FloatArray
    """Shape (popsize,): the same with 0 for the others."""
    shares: FloatArray
    """Shape (popsize,): c_mu times the weight, and n times that where it is negative."""
    active: bool
    weight_sum: float
    mu_eff: float
    c_1: float
    c_mu: float
    c_c: float
    gain_c: float
    """What makes a step added to p_c as large as what has faded: root of c_c (2 - c_c) mu_eff; `gain_sigma` alike."""
    c_sigma: float
    gain_sigma: float
    d_sigma: float
    chi: float
    """E‖N(0, I)‖."""
    gap: int
    """Generations between two factorisations of C."""
    late: int
    """Generations over which the losses must agree at the end (B.3)."""


@functools.lru_cache(64)
def constants(n: int, popsize: int, kind: str, active: bool) -> Constants:
    """Table 1 of the tutorial, and what separable and limited-memory variants put in its place."""
    raw = math.log((popsize + 1) / 2) - np.log(np.arange(1, popsize + 1))  # eq. 49
    mu = popsize // 2
    mu_eff = float(raw[:mu].sum() ** 2 / (raw[:mu] ** 2).sum())
    c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)  # eq. 57
    c_mu = min(1 - c_1, 2 * (0.25 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff))  # eq. 58
    if kind == SEPARABLE:  # n parameters instead of n²/2 are learnt faster (Ros & Hansen 2008)
        c_1 *= (n + 2) / 3
        c_mu = min(1 - c_1, c_mu * (n + 2) / 3)
    c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)  # eq. 56
    c_sigma = (mu_eff + 2) / (n + mu_eff + 5)  # eq. 55
    d_sigma = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_sigma
    if kind == LIMITED:  # Loshchilov et al. 2019, Algorithm 1, line 3; at most 1/2 for few weights
        c_sigma, d_sigma = min(2 * popsize / n, 0.5), 1.0
    weights = raw.copy()
    weights[:mu] /= raw[:mu].sum()
    below = np.minimum(raw[mu:], 0.0)
    weights[mu:] = 0.0
    if active and below.any():
        mu_eff_below = float(below.sum() ** 2 / (below**2).sum())
        size = min(  # eq. 50-53
            1 + c_1 / c_mu,
            1 + 2 * mu_eff_below / (mu_eff + 2),
            (1 - c_1 - c_mu) / (n * c_mu),
        )
        weights[mu:] = size * below / -below.sum()
    weights.flags.writeable = False
    return Constants(
        mu=mu,
        weights=weights,
        better=np.where(weights > 0, weights, 0.0),
        shares=c_mu * np.where(weights < 0, n * weights, weights),
        active=bool(weights[-1] < 0),
        weight_sum=float(weights.sum()),
        mu_eff=mu_eff,
        c_1=c_1,
        c_mu=c_mu,
        c_c=c_c,
        gain_c=math.sqrt(c_c * (2 - c_c) * mu_eff),
        c_sigma=c_sigma,
        gain_sigma=math.sqrt(c_sigma * (2 - c_sigma) * mu_eff),
        d_sigma=d_sigma,
        chi=math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n)),
        gap=max(1, int(1 / (2 * n * (c_1 + c_mu)))),
        late=min(10 + math.ceil(30 * n / popsize), HISTORY),
    )


class Steps(NamedTuple):
    """What a generation tried."""

    order: IntArray
    """Shape (popsize,): which row is the best, the second, ..."""
    z: Rows
    """Shape (popsize, n): normal numbers."""
    y: Rows
    """Shape (popsize, n): the steps made of them."""
    z_w: FloatArray
    """Shape (n,): weighted mean of z; `y_w` of y."""
    y_w: FloatArray


class Covariance(Plain, abc.ABC):
    """The shape of the distribution."""

    @abc.abstractmethod
    def transform(self, z: Rows) -> Rows:
        """Steps y ~ N(0, C), shape (popsize, n), of z ~ N(0, I)."""

    @abc.abstractmethod
    def adapt(self, k: Constants, steps: Steps, h_sigma: bool) -> None:
        """Make the steps of a generation's better half more likely.

        Args:
            k: weights and rates.
            steps: of a generation; its y may be overwritten.
            h_sigma: False where p_sigma is so long that p_c should not follow yet.
        """

    def refresh(self, k: Constants) -> None:
        """Bring up to date what `transform` needs, if it is time. If C is not positive definite, it stays."""

    @abc.abstractmethod
    def deviations(self) -> FloatArray:
        """Root of C's diagonal, shape (n,)."""

    @abc.abstractmethod
    def condition(self) -> float:
        """Of C; inf when it is no longer positive definite."""


def follow(p: FloatArray, rate: float, gain: float, step: FloatArray) -> None:
    """Move an evolution path: a fading sum of recombined steps, distributed as a single step is (eq. 43, 45).

    For few weights a call of BLAS, by positional arguments, takes a quarter of the time of a NumPy expression.
    """
    dscal(1 - rate, p)
    daxpy(step, p, len(p), gain)


def _shrinkage(k: Constants, h_sigma: bool) -> float:
    """What is left of the old C (eq. 47)."""
    late = 0.0 if h_sigma else k.c_c * (2 - k.c_c)
    return 1 + k.c_1 * late - k.c_1 - k.c_mu * k.weight_sum


def _shares(k: Constants, steps: Steps) -> FloatArray:
    """c_mu w_i°, what each y yᵀ counts in C, shape (popsize,) (eq. 46).

    ‖C^-1/2 y‖ = ‖z‖ whatever root of C is used.
    """
    squares = squared_lengths(steps.z)
    squares[steps.order[: k.mu]] = 1.0
    shares = np.empty(len(squares))
    shares[steps.order] = k.shares
    shares /= squares
    return shares


@dataclass
class Full(Covariance):
    """The whole matrix, sampled by its Cholesky factor: C = Uᵀ U, y = Uᵀ z."""

    p_c: FloatArray
    C: FloatArray
    """Shape (n, n); only its upper triangle is kept."""
    U: FloatArray
    """Shape (n, n), upper triangular: the factor of C, or of a C not more than `gap` generations old."""
    age: int = 0
    """Generations since U was computed."""
    definite: bool = True

    @classmethod
    def round(cls, n: int) -> Full:
        """C = I."""
        return cls(np.zeros(n), np.eye(n), np.eye(n))

    @classmethod
    def of(cls, factor: FloatArray) -> Full:
        """C = factor factorᵀ, from its lower Cholesky factor."""
        return cls(np.zeros(len(factor)), factor @ factor.T, np.ascontiguousarray(factor.T))

    def transform(self, z: Rows) -> Rows:
        """See `Covariance.transform`: n² popsize operations."""
        z = np.asarray(z)
        y: FloatArray = dtrmm(1.0, self.U.T, z.T, 0, 1).T  # from the left, lower triangle
        return y

    def adapt(self, k: Constants, steps: Steps, h_sigma: bool) -> None:
        """See `Covariance.adapt`: n² popsize operations in place."""
        follow(self.p_c, k.c_c, k.gain_c if h_sigma else 0.0, steps.y_w)  # eq. 45
        y, shares, shrinkage = np.asarray(steps.y), _shares(k, steps), _shrinkage(k, h_sigma)
        # eq. 47; the transposes are what Fortran calls a matrix and its lower triangle
        if len(self.C) < SMALL:
            C = dgemm(1.0, y.T, y.T * shares, shrinkage, self.C.T, 0, 1, 1)
        else:
            y, shares = y.take(steps.order, 0), shares.take(steps.order)
            y *= np.sqrt(np.abs(shares))[:, None]
            C = dsyrk(1.0, y[: k.mu].T, shrinkage, self.C.T, 0, 1, 1)
            if k.active:
                C = dsyrk(-1.0, y[k.mu :].T, 1.0, C, 0, 1, 1)
        self.C = dsyr(k.c_1, self.p_c, 1, 1, 0, len(C), C, 1).T
        self.age += 1

    def refresh(self, k: Constants) -> None:
        """See `Covariance.refresh`: n³/3 operations every `gap` generations."""
        if self.age < k.gap:
            return
        L, failed = dpotrf(self.C.T, 1, 1)
        self.definite = not failed
        if not failed:
            self.U, self.age = L.T, 0

    def deviations(self) -> FloatArray:
        """See `Covariance.deviations`."""
        return np.sqrt(self.C.diagonal())

    def condition(self) -> float:
        """See `Covariance.condition`: n³ operations."""
        if not self.definite:
            return math.inf
        values, _, failed = dsyevd(self.C.T, 0, 1)
        return float(values[-1] / values[0]) if not failed and values[0] > 0 else math.inf

    # -- learning-rate adaptation asks for changes of C in the coordinates of z ---------------------------------

    def whitened(self) -> FloatArray:
        """C seen from the distribution that was sampled: U^-T C U^-1, the identity if nothing had changed."""
        C = np.triu(self.C) + np.triu(self.C, 1).T
        half = solve_triangular(self.U, C, trans="T", check_finite=False)
        seen: FloatArray = solve_triangular(self.U, half.T, trans="T", check_finite=False)
        return seen

    def become(self, seen: FloatArray) -> float:
        """Take Uᵀ `seen` U, divided by the n-th root of its determinant, as C; the root of that divisor."""
        C = self.U.T @ (seen + seen.T) @ self.U / 2
        L, failed = dpotrf(C, lower=1, clean=1)
        self.definite = not failed
        size = 1.0
        if not failed:
            size = float(np.exp(np.log(L.diagonal()).mean()))
            self.C, self.U, self.age = np.ascontiguousarray(C / size**2), np.ascontiguousarray(L.T / size), 0
        return size


@dataclass
class Separable(Covariance):
    """A diagonal C (Ros & Hansen, PPSN 2008)."""

    p_c: FloatArray
    variances: FloatArray

    @classmethod
    def round(cls, n: int) -> Separable:
        """C = I."""
        return cls(np.zeros(n), np.ones(n))

    def transform(self, z: Rows) -> Rows:
        """See `Covariance.transform`."""
        return z * np.sqrt(self.variances)

    def adapt(self, k: Constants, steps: Steps, h_sigma: bool) -> None:
        """See `Covariance.adapt`: the diagonal of eq. 47."""
        follow(self.p_c, k.c_c, k.gain_c if h_sigma else 0.0, steps.y_w)
        square(steps.y)
        change = combined(_shares(k, steps), steps.y)
        self.variances = _shrinkage(k, h_sigma) * self.variances + k.c_1 * self.p_c**2 + change

    def deviations(self) -> FloatArray:
        """See `Covariance.deviations`."""
        return np.sqrt(self.variances)

    def condition(self) -> float:
        """See `Covariance.condition`."""
        low = float(self.variances.min())
        return float(self.variances.max()) / low if low > 0 else math.inf


@dataclass
class Limited(Covariance):
    """A product of rank-one changes of the identity along m evolution paths of different memory.

    LM-MA-ES (Loshchilov, Glasmachers & Beyer, IEEE TEVC 23(2), 2019, Algorithm 1). O(m n) memory.
    """

    M: FloatArray
    """Shape (m, n): paths in the coordinates of z; the first fades fastest."""
    generations: int = 0

    @classmethod
    def round(cls, n: int) -> Limited:
        """C = I, m = 4 + 3 ln n."""
        return cls(np.zeros((4 + int(3 * math.log(n)), n)))

    def transform(self, z: Rows) -> Rows:
        """See `Covariance.transform`, on the host, where M is: two products of popsize × m × n.

        Line 12 of the algorithm, d <- (1 - c_j) d + c_j M_j (M_jᵀ d) for each j in turn, only ever adds multiples of
        M's rows to d. So d = a z + z Mᵀ T M (rows) with an m × m matrix T that the rows' scalar products alone decide.
        """
        a, T = self._sum()
        M = self.M[: len(T)]
        z = np.asarray(z)
        y: FloatArray = a * z
        y += (z @ M.T @ T) @ M
        return y

    def _sum(self) -> tuple[float, FloatArray]:
        """The a and T of `transform`, for the first min(generations, m) rows of M."""
        m, n = min(self.generations, len(self.M)), self.M.shape[1]
        products = self.M[:m] @ self.M[:m].T
        T = np.zeros((m, m))
        a = 1.0
        for j in range(m):
            c = min(1 / (1.5**j * n), 0.5)
            seen = T[:, :j] @ products[:j, j]  # M_jᵀ d, as multiples of z Mᵀ
            seen[j] += a
            T[:, :j] *= 1 - c
            T[:, j] = c * seen
            a *= 1 - c
        return a, T

    def adapt(self, k: Constants, steps: Steps, h_sigma: bool) -> None:
        """See `Covariance.adapt`: line 18."""
        popsize, n = steps.z.shape
        rates = np.minimum(popsize / (n * 4.0 ** np.arange(len(self.M))), 0.5)
        self.M *= (1 - rates)[:, None]
        self.M += np.outer(np.sqrt(rates * (2 - rates) * k.mu_eff), steps.z_w)
        self.generations += 1

    def deviations(self) -> FloatArray:
        """See `Covariance.deviations`: of (a I + Mᵀ T M)ᵀ (a I + Mᵀ T M), m² n operations."""
        a, T = self._sum()
        M = self.M[: len(T)]
        inner = a * (T + T.T) + T.T @ (M @ M.T) @ T
        variances: FloatArray = a * a + np.einsum("ij,ij->j", M, inner @ M)
        return np.sqrt(variances)

    def condition(self) -> float:
        """See `Covariance.condition`: the changes are small and positive definite, so it is not looked at."""
        return 1.0


@dataclass
class Rate(Plain):
    """A learning rate eta <= 1 that follows the signal-to-noise ratio of what is learnt (LRA-CMA-ES).

    Nomura, Akimoto & Ono, GECCO 2023, equations 13-19.
    """

    beta: float
    """Memory of the averages."""
    E: FloatArray
    V: float = 0.0
    eta: float = 1.0

    def follow(self, change: FloatArray) -> float:
        """The new eta, of a step `change` in coordinates in which it is noise of unit covariance."""
        alpha, gamma, beta = 1.4, 0.1, self.beta
        self.E = (1 - beta) * self.E + beta * change
        self.V = (1 - beta) * self.V + beta * float((change * change).sum())
        squared = float((self.E * self.E).sum())
        noise = self.V - squared
        ratio = (squared - beta / (2 - beta) * self.V) / noise if noise > 0 else math.inf
        lack = min(max(ratio / (alpha * self.eta) - 1, -1.0), 1.0)
        self.eta = min(self.eta * math.exp(min(gamma * self.eta, beta) * lack), 1.0)
        return self.eta


SHAPES: Mapping[str, type[Full | Separable | Limited]] = {
    FULL: Full,
    SEPARABLE: Separable,
    LIMITED: Limited,
}
