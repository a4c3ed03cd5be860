"""CMA-ES (Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, 2016) with plain state."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

import numpy as np
from scipy.linalg.blas import daxpy

from hybridopt.errors import MethodError
from hybridopt.ledger import Reason
from hybridopt.optimizer import HandOver
from hybridopt.options import check_options
from hybridopt.population._base import FloatArray, PopulationMethod, Strategy
from hybridopt.population._boundary import Space
from hybridopt.population._common import correlated, handed, require_at_least, require_positive, spread
from hybridopt.population._covariance import (
    FULL,
    HISTORY,
    LIMITED,
    SEPARABLE,
    SHAPES,
    Constants,
    Covariance,
    Full,
    Rate,
    Steps,
    constants,
    follow,
)
from hybridopt.population._large import drawn_on, empty, fill_normal
from hybridopt.population._margin import Margin
from hybridopt.rows import Rows, combined, placed
from hybridopt.start import Ending, Start


@dataclass(frozen=True)
class CMAES(PopulationMethod):
    """Samples generations from a normal distribution whose mean, step size and covariance it learns.

    The first choice without gradients for 2 to some hundred weights with interacting effects, losses that are noisy,
    bent or have many minima. One step is one generation. Only the order of the losses counts. For thousands of weights
    choose `covariance="limited"` (interactions along few directions) or `"separable"` (none; its generations of 4096
    weights or more are drawn and kept on the GPU if the model is on one); where gradients are to be had, a gradient
    method needs far fewer evaluations.

    Weights and rates are the tutorial's, tolerances pycma's. We differ: samples are drawn with the Cholesky factor A of
    C instead of its symmetric root, and the path for the step size adds A^-1 y = z (Krause, Arbonès & Igel, NIPS
    2016): without selection both paths have the same distribution; with it they differ while C still turns, since the
    triangular factor turns along. On BBOB the evaluations needed are the same. The factor is renewed every
    1/(2 n (c_1 + c_mu)) generations (B.2 says 1/(10 n ...); pycma does as we do). Bounds: the search itself has none;
    what it samples is mapped into the box (`Space`), so that the evaluated point always lies inside. Weights that stand
    for whole numbers keep a chance to leave theirs (`Margin`). The start is evaluated beside the first generation,
    which alone is learnt from, unless its loss is known. Where losses are random, each generation also evaluates
    the mean, which is what the method then names as its point; see `learning_rate_adaptation` and popsize for noise.

    It also ends, as stalled, when the loss is flat, when best and median losses stagnate, when the step size has grown
    10 000-fold, and at the limit of rounding (tutorial, B.3).

    Args:
        sigma: initial standard deviation in solver coordinates, shared by all weights; None = handed over by a
            predecessor, else 0.3 × the range of each bounded weight, 0.5 for unbounded ones.
        popsize: points a generation; None = 4 + 3 ln n. More points look further: noise, many minima.
        covariance: "full": n² numbers and n² popsize operations a generation; "separable": n and n popsize (Ros &
            Hansen 2008); "limited": m n and m n popsize with m = 4 + 3 ln n (LM-MA-ES, Loshchilov et al. 2019).
        active: learn from the worse half of a generation too ("limited" never does).
        restarts: "ipop": start again with twice the popsize when the search has ended (Auger & Hansen 2005); "bipop":
            take turns with small searches of small sigma, so that both spend alike (Hansen 2009). A restart begins
            at a random point: uniform in the box, normal about the start where there is none.
        max_restarts: after so many restarts the next end is the end.
        learning_rate_adaptation: learn slower where the signal is weak (LRA-CMA-ES, Nomura et al. 2023): for noise and
            many minima with a small popsize; slower on easy losses. With "full" only; O(n³) a generation.
        tolfun: converged when the last generation's losses and the best of each of the last 10 + 30 n / popsize
            generations differ by no more than this (absolute).
        tolfunhist: the same for those best losses alone.
        tolx: converged when every weight's standard deviation is below this, in solver coordinates; those of whole
            numbers do not count, since they never are.
        tolcond: stalled when the condition number of C is above this.

    Raises:
        MethodError: an option of the wrong type or sign, or two that do not go together.
        MemoryLimit: its matrices of n² doubles do not fit.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.population import CMAES
        >>> f = lambda x: float(((x - 1) ** 2).sum())
        >>> r = hybridopt.minimize(f, np.zeros(3), CMAES(sigma=0.5), budget=1000, seed=1)
        >>> r.best_loss < 1e-8
        True
    """

    name: ClassVar[str] = "cmaes"
    skips_start: ClassVar[bool] = True
    memory_advice: ClassVar[str] = (
        "use covariance=separable or =limited, or select fewer weights (select=...)"
    )

    sigma: float | None = None
    popsize: int | None = None
    covariance: Literal["full", "separable", "limited"] = "full"
    active: bool = True
    restarts: Literal["none", "ipop", "bipop"] = "none"
    max_restarts: int = 9
    learning_rate_adaptation: bool = False
    tolfun: float = 1e-11
    tolfunhist: float = 1e-12
    tolx: float = 1e-11
    tolcond: float = 1e14

    def __post_init__(self) -> None:
        check_options(self)
        require_positive(self, "sigma")
        require_at_least(self, popsize=2, max_restarts=0, tolfun=0, tolfunhist=0, tolx=0, tolcond=1)
        if self.learning_rate_adaptation and self.covariance != FULL:
            raise MethodError(
                f"{self.name}: learning_rate_adaptation works with covariance='full' only, got {self.covariance!r}"
            )

    def points(self, n: int) -> int:
        """Points a generation (eq. 48)."""
        return 4 + int(3 * math.log(n)) if self.popsize is None else self.popsize

    def memory(self, n: int) -> int:
        """Bytes of the covariance and its work copies, and of one generation."""
        rows = 4 * self.points(n) + 20
        if self.covariance == FULL:
            rows += (8 if self.learning_rate_adaptation else 4) * n
        elif self.covariance == LIMITED:
            rows += 4 + int(3 * math.log(n))
        return 8 * n * rows

    def begin(self, start: Start, rng: np.random.Generator) -> Strategy:
        """See `PopulationMethod.begin`."""
        return Search(self, start)


@dataclass(init=False)
class Search(Strategy):
    """CMA-ES between generations. A restart begins all fields up to `medians` anew."""

    popsize: int
    generation: int
    sigma: float
    mean: FloatArray
    """In coordinates without bounds, as all points and steps here (`Space`)."""
    stretch: FloatArray | None
    """By which the steps in each coordinate are multiplied so that whole numbers are left; None = there are none."""
    p_sigma: FloatArray
    shape: Covariance
    rate_mean: Rate | None
    rate_shape: Rate | None
    z: Rows | None
    """Normal numbers of the generation that was asked and not yet told, and the steps made of them."""
    y: Rows | None
    bests: list[float]
    """Lowest loss of each late generation."""
    medians: list[float]

    best_loss: float
    best_x: FloatArray
    """In solver coordinates."""
    restarted: int
    large: int
    """Popsize of the last search that was not small."""
    small: bool
    spent_large: int
    """Evaluations of the restarts with a growing popsize."""
    spent_small: int
    limit: int
    """Generations of a small search; 0 = no limit."""
    last_large: int

    def __init__(self, method: CMAES, start: Start) -> None:
        self.method, self.start = method, start
        self.device = drawn_on(start) if method.covariance == SEPARABLE else None
        stds = spread(start, method.sigma)
        self.sigma0 = float(stds.max())
        self.space = Space(start, stds / self.sigma0)
        self.margin = None if start.integer is None else Margin(start, self.space.scale)
        whole = start.integer
        self.judged = (
            slice(None) if whole is None or whole.all() else ~whole
        )  # by whose deviations it may end
        self.best_loss, self.best_x = start.loss, start.x0
        self.restarted = self.spent_large = self.spent_small = self.limit = 0
        self.large = self.last_large = method.points(start.n)
        self.small = False
        self._begin(self.space.outside(start.x0), self.sigma0, self.large)
        factor = correlated(start)
        if factor is not None and isinstance(self.shape, Full):
            self.shape = Full.of(factor)

    def _begin(self, mean: FloatArray, sigma: float, popsize: int) -> None:
        n = len(mean)
        self.mean, self.sigma, self.popsize, self.generation = mean, sigma, popsize, 0
        self.stretch = None if self.margin is None else np.ones(n)
        self.p_sigma = np.zeros(n)
        self.shape = SHAPES[self.method.covariance].round(n)
        self.rate_mean = self.rate_shape = None
        if self.method.learning_rate_adaptation:
            self.rate_mean, self.rate_shape = Rate(0.1, np.zeros(n)), Rate(0.03, np.zeros((n, n)))
        self.z = self.y = None
        self.bests, self.medians = [], []

    def ask(self, rng: np.random.Generator) -> Rows:
        """See `Strategy.ask`."""
        self.z = empty(self.device, self.popsize, len(self.mean))
        fill_normal(rng, self.z)
        self.y = self.shape.transform(self.z)  # eq. 39
        u = self.sigma * self._stretched(self.y)  # eq. 40
        u += self.mean
        return self.space.inside(u)

    @overload
    def _stretched(self, y: FloatArray) -> FloatArray: ...
    @overload
    def _stretched(self, y: Rows) -> Rows: ...
    def _stretched(self, y: Rows) -> Rows:
        return y if self.stretch is None else y * self.stretch

    def tell(self, x: FloatArray, losses: FloatArray, rng: np.random.Generator) -> Ending | None:
        """See `Strategy.tell`."""
        assert self.z is not None
        assert self.y is not None
        k = constants(len(self.mean), self.popsize, self.method.covariance, self.method.active)
        order = losses.argsort(kind="stable")
        y, self.y = self.y, None
        z, self.z = self.z, None
        best = float(losses[order[0]])
        if best < self.best_loss:
            self.best_loss, self.best_x = best, x[order[0]].copy()
        self.bests.append(best)
        self.medians.append(float(losses[order[self.popsize // 2]]))
        self.generation += 1

        better = np.empty(self.popsize)
        better[order] = k.better
        z_w, y_w = combined(better, z), combined(better, y)  # eq. 41
        follow(self.p_sigma, k.c_sigma, k.gain_sigma, z_w)  # eq. 43
        length = math.sqrt(self.p_sigma.dot(self.p_sigma))
        usual = k.chi * math.sqrt(1 - (1 - k.c_sigma) ** (2 * self.generation))
        h_sigma = length < (1.4 + 2 / (len(self.mean) + 1)) * usual
        self.shape.adapt(k, Steps(order, z, y, z_w, y_w), h_sigma)  # eq. 45-47
        growth = math.exp(k.c_sigma / k.d_sigma * (length / k.chi - 1))  # eq. 44
        if self.rate_mean is None:
            daxpy(self._stretched(y_w), self.mean, len(y_w), self.sigma)  # eq. 42
            self.sigma *= growth
            self.shape.refresh(k)
        else:
            self._learn_slower(z_w, y_w, growth)
        if self.margin is not None:
            assert self.stretch is not None
            self.mean, factors = self.margin.keep(self.mean, self._deviations(), self.popsize)
            self.stretch[self.margin.at] *= factors
        ended = self._ended(k, losses)
        return None if ended is None else self._go_on(*ended, rng)

    def _deviations(self) -> FloatArray:
        """Of each weight, shape (n,), in search coordinates."""
        return self._stretched(self.sigma * self.shape.deviations())

    def _learn_slower(self, z_w: FloatArray, y_w: FloatArray, growth: float) -> None:
        """Only a part eta of the changes of mean and sigma² C (LRA-CMA-ES, Algorithm 2)."""
        assert isinstance(self.shape, Full)
        assert self.rate_mean is not None
        assert self.rate_shape is not None
        change = growth**2 * self.shape.whitened()
        change.flat[:: len(z_w) + 1] -= 1
        before = self.rate_mean.eta
        after = self.rate_mean.follow(z_w)
        change *= self.rate_shape.follow(change / math.sqrt(2))
        change.flat[:: len(z_w) + 1] += 1
        self.mean = self.mean + after * self.sigma * self._stretched(y_w)
        self.sigma *= self.shape.become(change) * before / after

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the fields over; a generation that waits for its losses goes to where it was drawn."""
        super().load_state_dict(state)
        if self.device is not None and self.z is not None and self.y is not None:
            self.z, self.y = placed(self.device, self.z), placed(self.device, self.y)

    def favourite(self) -> FloatArray | None:
        """See `Strategy.favourite`: the mean; with restarts none, since a new search begins anywhere."""
        return self.space.inside(self.mean[None])[0] if self.method.restarts == "none" else None

    def hand_over(self) -> HandOver:
        """See `Strategy.hand_over`: the distribution."""
        if not isinstance(self.shape, Full):
            return handed((self._deviations() * self.space.scale) ** 2)
        scale = self._stretched(self.sigma * self.space.scale)
        C = np.triu(self.shape.C) + np.triu(self.shape.C, 1).T
        return handed(C * np.outer(scale, scale))

    # -- the end ------------------------------------------------------------------------------------------------

    def _ended(self, k: Constants, losses: FloatArray) -> tuple[Reason, str] | None:
        """Why this search is over (tutorial, B.3)."""
        m, n = self.method, len(self.mean)
        tolerance = max(m.tolfun, m.tolfunhist)
        if self.generation >= k.late and abs(self.bests[-1] - self.bests[-k.late]) <= tolerance:
            recent = self.bests[-k.late :]
            low, high = min(recent), max(recent)
            if high - low <= m.tolfunhist:
                if low == high == min(self.bests) == max(self.bests):
                    return Reason.STALLED, f"flat: the lowest loss was {low!r} in every generation"
                return Reason.CONVERGED, f"tolfunhist: the best losses of {k.late} generations agree"
            if high - low <= m.tolfun and max(high, float(losses.max())) - low <= m.tolfun:
                return Reason.CONVERGED, f"tolfun: the losses of {k.late} generations agree"
        if self.generation == self.limit:
            return Reason.STALLED, "the small search has spent its share"
        if self.generation % 10 == 0:
            deviations = self._deviations()
            judged = (deviations * self.space.scale)[self.judged]
            largest = float(judged[judged.argmax()])
            if largest <= m.tolx:
                return Reason.CONVERGED, "tolx: every weight's standard deviation is below it"
            if largest > 1e4 * self.sigma0:
                return Reason.STALLED, "the step size grew 10000-fold: give a larger sigma, or bounds"
            if np.count_nonzero((self.mean == self.mean + 0.2 * deviations)[self.judged]):
                return Reason.STALLED, "a weight's standard deviation is below its rounding error"
            if math.isnan(largest):
                return Reason.STALLED, "the condition number of the covariance is infinite"
        if self.generation % (10 + n) == 0:
            if self.shape.condition() > m.tolcond:
                return Reason.STALLED, f"the condition number of the covariance is above {m.tolcond:g}"
            return self._stagnant()
        return None

    def _stagnant(self) -> tuple[Reason, str] | None:
        """Whether neither the best nor the median loss went down over the last fifth of the generations."""
        window = int(min(max(0.2 * self.generation, 120 + 30 * len(self.mean) / self.popsize), HISTORY))
        del self.bests[:-HISTORY], self.medians[:-HISTORY]
        if len(self.bests) < window:
            return None
        part = int(0.3 * window)
        for losses in (self.bests, self.medians):
            first, last = losses[-window:][:part], losses[-part:]
            if statistics.median(last) < statistics.median(first):
                return None
        return Reason.STALLED, f"stagnation: no progress in the last {window} generations"

    # -- restarts -----------------------------------------------------------------------------------------------

    def _go_on(self, reason: Reason, message: str, rng: np.random.Generator) -> Ending | None:
        """Begin another search, or end at the best point of all."""
        m, start = self.method, self.start
        if m.restarts == "none" or self.restarted >= m.max_restarts:
            return Ending(reason, message, self.best_loss, self.best_x)
        evaluations = self.generation * self.popsize
        if self.small:
            self.spent_small += evaluations
        else:
            self.last_large = evaluations
            if self.restarted:  # the first search counts for neither side
                self.spent_large += evaluations
        self.restarted += 1
        sigma = self.sigma0
        self.small = m.restarts == "bipop" and self.spent_small < self.spent_large
        if self.small:  # Hansen 2009, section 3
            default = m.points(start.n)
            popsize = int(default * (self.large / (2 * default)) ** (rng.random() ** 2))
            sigma *= 10 ** (-2 * rng.random())
            self.limit = max(1, self.last_large // 2 // popsize)
        else:
            self.large *= 2
            popsize, self.limit = self.large, 0
        u = self.space.outside(start.x0) + self.sigma0 * rng.standard_normal(start.n)
        x = self.space.inside(u[None])[0]
        boxed = np.isfinite(start.upper - start.lower)
        x[boxed] = rng.uniform(start.lower[boxed], start.upper[boxed])
        self._begin(self.space.outside(x), sigma, popsize)
        return None
