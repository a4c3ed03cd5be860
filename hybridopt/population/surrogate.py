"""CMA-ES that evaluates only as much of a generation as a linear-quadratic model needs to rank the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import dposv, dpotrf, dpotrs, dtrtri, dtrtrs

from hybridopt.optimizer import HandOver
from hybridopt.options import check_options
from hybridopt.population._base import FloatArray, PopulationMethod, Strategy
from hybridopt.population._common import require_at_least, require_positive, spread
from hybridopt.population._covariance import Full
from hybridopt.population.cmaes import CMAES, Search
from hybridopt.start import Ending, Start

IntArray: TypeAlias = npt.NDArray[np.int64]

TRUSTED = 0.85  # Kendall's tau from which the model's ranking stands for the losses'
RECENT = 15  # newest points, at least, on which that is judged
HEAVIEST = 20  # weight of the best point in the regression; that of the worst is 1
SPARE = 1.1  # points a coefficient from which a model is used
KEPT = 0.75  # part of the points that enter the regression, the best
LOOK = 0.25  # part of a generation that is evaluated, at least, unless one of its points is the best so far
LARGEST = 700  # coefficients of a model, at most


@dataclass(frozen=True)
class LQCMAES(PopulationMethod):
    """CMA-ES with a global surrogate: lq-CMA-ES (Hansen, GECCO 2019).

    For expensive losses: with values alone, some ten to some hundred evaluations a weight. Where the loss is nearly
    quadratic it needs 3 to 10 times fewer evaluations than CMA-ES, elsewhere about as many. A model is fitted to the
    latest points by weighted least squares, linear first, then with squares, then fully quadratic as soon as there are
    1.1 points a coefficient. Of each generation the points that the model likes best are evaluated, and the model is
    fitted again, until its order of the latest points agrees with that of their losses (Kendall's tau >= 0.85); the
    rest of the generation then counts with what the model says. The model's minimum joins each generation. A step is
    the evaluation of a part of a generation. A fit costs about n⁴ operations (n = 10: 0.3 ms), for more than some 35
    weights n³, since then the model has squares only; so for cheap losses of many weights take `cmaes`.

    We differ: unless one of them is the best point so far, a quarter of each generation is evaluated, whatever the
    model says (else a search could follow a wrong model for long); a model begins anew with a restart; its minimum
    joins only where it has one.

    Args:
        sigma: initial standard deviation in solver coordinates, shared by all weights; None = handed over by a
            predecessor, else a tenth of the range of each bounded weight, 1/6 for unbounded ones.
        popsize, restarts, max_restarts: as in `cmaes`.

    Raises:
        MethodError: an option of the wrong type or sign.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.population.surrogate import LQCMAES
        >>> def loss(x):                                # an ellipsoid of condition 10⁶, turned
        ...     return float(np.sum(10 ** np.array([0, 3, 6]) * (np.cumsum(x) - 1) ** 2))
        >>> hybridopt.minimize(loss, np.zeros(3), LQCMAES(sigma=0.5), budget=100, seed=1).best_loss < 1e-8
        True
    """

    skips_start: ClassVar[bool] = True
    name: ClassVar[str] = "lq_cmaes"

    sigma: float | None = None
    popsize: int | None = None
    restarts: Literal["none", "ipop", "bipop"] = "none"
    max_restarts: int = 9

    def __post_init__(self) -> None:
        check_options(self)
        require_positive(self, "sigma")
        require_at_least(self, popsize=2, max_restarts=0)

    @property
    def inner(self) -> CMAES:
        """The search that is spared evaluations."""
        return CMAES(self.sigma, self.popsize, restarts=self.restarts, max_restarts=self.max_restarts)

    def memory(self, n: int) -> int:
        """Bytes of the search's matrices and of the regression's."""
        rows = 2 * _sizes(n)[-1]
        return self.inner.memory(n) + 8 * rows * (n + 3 * _sizes(n)[-1])

    def begin(self, start: Start, rng: np.random.Generator) -> Strategy:
        """See `PopulationMethod.begin`."""
        return Surrogate(self, start)


@dataclass(init=False)
class Surrogate(Strategy):
    """lq-CMA-ES between two parts of a generation."""

    search: Search
    x: FloatArray
    """Points that the model learns from, shape (k, n), in solver coordinates; the newest last."""
    losses: FloatArray
    """Theirs, shape (k,), finite."""
    generation: FloatArray | None
    """The points of the present generation, shape (popsize, n)."""
    known: FloatArray
    """Their losses, shape (popsize,); nan = not evaluated."""
    predicted: FloatArray
    """What the model says of them."""
    asked: int
    """How many were asked and not yet told."""

    def __init__(self, method: LQCMAES, start: Start) -> None:
        inner = method.inner
        if method.sigma is None and start.sigma is None and start.covariance is None:
            stds = spread(start, None) / 3  # a model soon says whether to take larger steps
            inner = replace(inner, sigma=float(stds.max()))
            start = replace(start, covariance=(stds / stds.max()) ** 2)
        self.search = Search(inner, start)
        self.x, self.losses = np.empty((0, start.n)), np.empty(0)
        self.generation, self.known, self.predicted = None, np.empty(0), np.empty(0)
        self.asked = 0
        self._model: tuple[FloatArray, Model] | None = None  # that of these points

    def ask(self, rng: np.random.Generator) -> FloatArray:
        """See `Strategy.ask`: those points that the model likes best, 1.5 times as many in all as before."""
        if self.asked:  # nothing was told, since no loss was finite
            self.known[self._next(self.asked)] = np.inf
            if not np.isnan(self.known).any():
                if np.isfinite(self.known).any():
                    self._end_generation(self.known, rng)  # if it ended here, it ends after the next one
                self.generation = None
        if self.generation is None:
            self.generation = np.asarray(self.search.ask(rng))
            self.known = np.full(len(self.generation), np.nan)
            model = self._fitted()
            self._inject(model.minimum)
            self.predicted = model(self.generation)
            self.asked = 1 + max(len(self.known) // 50, 4 - len(self.x))
        else:
            self.asked = math.ceil((~np.isnan(self.known)).sum() / 2)
        at = self._next(self.asked)
        self.asked = len(at)
        return self.generation[at]

    def _next(self, count: int) -> IntArray:
        """Indices of the `count` points to evaluate now."""
        order = np.argsort(self.predicted, kind="stable")
        return order[np.isnan(self.known[order])][:count]

    def _inject(self, x: FloatArray | None) -> None:
        """Put a point into the generation, moved towards its mean where it is too far for a normal draw.

        Hansen, "Injecting external solutions into CMA-ES", arXiv 1110.4181, 2011, eq. 3.
        """
        search = self.search
        if x is None or search.stretch is not None or not isinstance(search.shape, Full):
            return
        assert self.generation is not None
        assert search.y is not None
        assert search.z is not None
        n = len(x)
        y = (search.space.outside(search.start.clip(x)) - search.mean) / search.sigma
        z = solve_triangular(search.shape.U, y, trans="T", check_finite=False)
        shrink = min(1.0, (math.sqrt(n) + 2 * n / (n + 2)) / max(float(np.linalg.norm(z)), 1e-300))
        search.y[0], search.z[0] = shrink * y, shrink * z
        self.generation[0] = search.space.inside((search.mean + search.sigma * search.y[0])[None])[0]

    def tell(self, x: FloatArray, losses: FloatArray, rng: np.random.Generator) -> Ending | None:
        """See `Strategy.tell`: Algorithm 1."""
        assert self.generation is not None
        self.known[self._next(self.asked)] = losses
        self.asked = 0
        finite = np.isfinite(losses)
        most = 2 * _sizes(x.shape[1])[-1]
        self.x = np.concatenate([self.x, x[finite]])[-most:]
        self.losses = np.concatenate([self.losses, losses[finite]])[-most:]
        evaluated = ~np.isnan(self.known)
        judged = self.known
        if not evaluated.all():
            model = self._fitted()
            self.predicted = model(self.generation)
            recent = max(RECENT, int(min(1.2 * evaluated.sum(), KEPT * len(self.known))))
            stale = self.known[evaluated].min() > self.losses.min()
            if stale and evaluated.sum() < LOOK * len(self.known):
                return None
            if tau(model(self.x[-recent:]), self.losses[-recent:]) < TRUSTED:
                return None
            # as if the best of those evaluated had the loss that it has
            judged = self.predicted + (self.known[evaluated].min() - self.predicted[evaluated].min())
            judged[np.isposinf(self.known)] = np.inf  # the model knows nothing of rejected points
        ending = self._end_generation(judged, rng)
        return None if ending is None else ending._replace(loss=math.inf)  # the run knows the true lowest

    def _end_generation(self, losses: FloatArray, rng: np.random.Generator) -> Ending | None:
        """Let the search learn from all of a generation."""
        assert self.generation is not None
        searches = self.search.restarted
        ending = self.search.tell(self.generation, losses, rng)
        self.generation = None
        if self.search.restarted > searches:
            self.x, self.losses = self.x[:0], self.losses[:0]
        return ending

    def _fitted(self) -> Model:
        """The model of the points known, fitted once."""
        if self._model is None or self._model[0] is not self.x:
            self._model = self.x, Model.fitted(self.x, self.losses)
        return self._model[1]

    def favourite(self) -> FloatArray | None:
        """See `Strategy.favourite`."""
        return self.search.favourite()

    def hand_over(self) -> HandOver:
        """See `Strategy.hand_over`."""
        return self.search.hand_over()


class Model:
    """A polynomial of degree 2 at most: loss(x) = features((x - centre) W) · coefficients.

    Args:
        centre: shape (n,).
        W: shape (n,), or (n, n), upper triangular: takes what the points have of spread, and of correlation.
        coefficients: of 1, z; then z²; then z_i z_j, i < j.
    """

    def __init__(self, centre: FloatArray, W: FloatArray, coefficients: FloatArray) -> None:
        self.centre, self.W, self.coefficients = centre, W, coefficients

    @classmethod
    def fitted(cls, x: FloatArray, losses: FloatArray) -> Model:
        """By least squares to the best points, weighted by rank; constant if there are too few points."""
        n = x.shape[1]
        best = np.argsort(losses, kind="stable")[: math.ceil(KEPT * len(losses))]
        x, losses = x[best], losses[best]
        size = max((s for s in _sizes(n) if s * SPARE <= len(x)), default=0)
        if size == 0 or not losses[-1] > losses[0]:
            return cls(np.zeros(n), np.ones(n), np.zeros(1))
        centre = x[0]
        away = x - centre
        spread = np.sqrt((away**2).mean(0))
        W = 1 / np.where(spread > 0, spread, 1)
        if size > 2 * n + 1:
            factor, failed = dpotrf(away.T @ away / len(x))
            if not failed:
                W = dtrtri(factor)[0]
        model = cls(centre, W, np.zeros(size))
        weights = _weights(HEAVIEST, len(x))
        A = model._features(x)
        A *= weights
        normal = A @ A.T
        normal.flat[:: size + 1] += 1e-13 * normal.trace()  # points in a plane leave some coefficients open
        _, coefficients, failed = dposv(normal, A @ ((losses - losses[0]) * weights))
        if not failed:
            model.coefficients = coefficients
        return model

    def _features(self, x: FloatArray) -> FloatArray:
        """Shape (size, k)."""
        size, n = len(self.coefficients), x.shape[1]
        z = (x - self.centre).T
        z = z * self.W[:, None] if self.W.ndim == 1 else self.W.T @ z
        features = np.empty((size, len(x)))
        features[0] = 1
        features[1 : n + 1] = z[: size - 1]
        if size > n + 1:
            np.multiply(z, z, out=features[n + 1 : 2 * n + 1])
        if size > 2 * n + 1:
            i, j = _pairs(n)
            np.multiply(z[i], z[j], out=features[2 * n + 1 :])
        return features

    def __call__(self, x: FloatArray) -> FloatArray:
        """The losses at the rows of `x` but for a constant, shape (k,)."""
        losses: FloatArray = self.coefficients @ self._features(x)
        return losses

    @property
    def minimum(self) -> FloatArray | None:
        """Where it is lowest; None if nowhere."""
        c, n = self.coefficients, len(self.centre)
        if len(c) <= n + 1:
            return None
        H = np.diag(2 * c[n + 1 : 2 * n + 1])
        if len(c) > 2 * n + 1:
            i, j = _pairs(n)
            H[i, j] = H[j, i] = c[2 * n + 1 :]
        factor, indefinite = dpotrf(H)
        if indefinite:
            return None
        z = -dpotrs(factor, c[1 : n + 1])[0]
        step = z / self.W if self.W.ndim == 1 else dtrtrs(self.W, z, trans=1)[0]
        x: FloatArray = self.centre + step
        return x if np.isfinite(x).all() else None


@cache
def _pairs(n: int) -> tuple[IntArray, IntArray]:
    """All i < j below n."""
    return np.triu_indices(n, 1)


@cache
def _weights(heaviest: float, k: int) -> FloatArray:
    """Of k points in the regression, the best first."""
    return np.linspace(heaviest, 1, k)


@cache
def _sizes(n: int) -> list[int]:
    """Coefficients of the linear, the diagonal and the full model, as far as they are affordable."""
    sizes = [n + 1, 2 * n + 1, (n + 1) * (n + 2) // 2]
    return [size for k, size in enumerate(sizes) if k == 0 or size <= LARGEST]


def tau(a: FloatArray, b: FloatArray) -> float:
    """Kendall's rank correlation of two rows of numbers, shape (k,) each; 0 where there is none."""
    i, j = _pairs(len(a))
    agreement = np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
    return float(agreement.mean()) if len(i) else 0.0
