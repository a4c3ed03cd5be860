"""Bayesian optimisation: a model of all losses so far says where the next evaluation promises most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridopt.optimizer import HandOver, Need
from hybridopt.options import check_options
from hybridopt.population._base import FloatArray, PopulationMethod, Strategy
from hybridopt.population._common import handed_points, in_box, require_at_least
from hybridopt.population._gaussian_process import GaussianProcess, log_expected_improvement
from hybridopt.start import Ending, Start

MOST = 400  # points that the model is made of
ALWAYS = 100  # points up to which its parameters are improved in each step
GROWTH = (
    1.05  # times as many points: they are sought from the priors too, and with more than `ALWAYS` only then
)
DRAWN = (
    500  # points of the box, and NEAR about each of the BEST known ones, of which the KEPT most promising ...
)
NEAR, BEST, KEPT = 40, 5, 10
ROUNDS, MOVES = 12, 20  # ... are moved MOVES times in each of so many rounds, by ever smaller steps
REDRAWN = 0.1  # chance of a coordinate to be moved anywhere
SAME = 1e-9  # distance, in units of the box, up to which a point is a known one


@dataclass(frozen=True)
class BayesianOptimization(PopulationMethod):
    """Fits a Gaussian process to the losses so far and evaluates where it expects the largest improvement.

    The first choice for expensive losses of up to about 20 coordinates in a box, whole numbers and choices among them
    (the hyperparameters of a training, a simulation) and budgets of ten to some hundred evaluations: what `tune` does.
    Of numbers alone a smooth loss needs fewer evaluations with `auto`: in 20 a weight it reaches .32 of the targets of
    the BBOB functions of 2 and 5 weights, `lq_cmaes` .22, this one .22 (`benchmarks/answer_quality.py`). A step takes
    0.02 s with 50 points and 0.1 s with 400: k³ operations for k points, of which the model keeps the 200 lowest and
    the 200 latest. So for cheap losses all other methods are faster.

    The start and a Latin hypercube come first. Then the points of highest expected improvement (EGO: Jones, Schonlau &
    Welch 1998), by its logarithm (Ament et al. 2023), over the lowest mean at a known point, as with noise. Kernel:
    Matérn 5/2 with a lengthscale for each coordinate (Snoek et al. 2012); lengthscales and noise are those of highest
    posterior density. Losses above the median are flattened to at most three times its distance from the lowest one;
    rejected points count as the highest. Of several points a generation, each takes those before it to have the loss
    that the model expects (kriging believer: Ginsbourger et al. 2010). Whole numbers and choices are seen as what they
    stand for, so the model knows which points are the same, and none is evaluated twice while there are others
    (Garrido-Merchán & Hernández-Lobato 2020).

    We differ: the improvement is maximised by sampling and by random steps, without its gradient, since those see whole
    numbers and choices too.

    Args:
        popsize: points a generation, which may be evaluated at the same time; each of them costs a little of what the
            others would have taught.
        initial: points before the model is asked, the start among them; None = 2 n + 2. Points that a predecessor
            hands over count.

    Raises:
        MethodError: an option of the wrong type or sign.
        BoundsError: a weight without two finite bounds.
        MemoryLimit: the points before the model, 2 n + 2 of n numbers, do not fit.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.population import BayesianOptimization
        >>> def loss(x):                                 # Branin's function, whose minima are 0.397887
        ...     u, v = 15 * x[0] - 5, 15 * x[1]
        ...     bend = v - 5.1 / (4 * np.pi**2) * u**2 + 5 / np.pi * u - 6
        ...     return float(bend**2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(u) + 10)
        >>> method = BayesianOptimization()
        >>> r = hybridopt.minimize(loss, np.array([0.5, 0.5]), method, budget=40, bounds=(0, 1), seed=0)
        >>> r.best_loss < 0.41
        True
    """

    name: ClassVar[str] = "bayes"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})
    takes: ClassVar[frozenset[str]] = frozenset({"points"})
    memory_advice: ClassVar[str] = "select fewer weights (select=...), or give a small initial="

    popsize: int = 1
    initial: int | None = None

    def __post_init__(self) -> None:
        check_options(self)
        require_at_least(self, popsize=1, initial=2)

    def memory(self, n: int) -> int:
        """Bytes of the design while it is drawn, or with the points, the kernel's matrices and the points tried."""
        tried, design = DRAWN + NEAR * BEST, self.first(n) * n
        return 8 * max(4 * design, design + (MOST + 4 * tried) * n + MOST * (6 * MOST + 4 * tried))

    def first(self, n: int) -> int:
        """Points before the model is asked."""
        return 2 * n + 2 if self.initial is None else self.initial

    def begin(self, start: Start, rng: np.random.Generator) -> Strategy:
        """See `PopulationMethod.begin`."""
        none = np.empty(0)
        return _Model(np.empty((0, start.n)), none, 0, None, 0, 0, None).serve(self, start, rng)


@dataclass
class _Model(Strategy):
    """What is known of the losses."""

    x: FloatArray
    """Points evaluated, shape (k, n), the latest last."""
    losses: FloatArray
    """Theirs, shape (k,); +inf = rejected."""
    drawn: int
    """Points of the design that were asked."""
    parameters: FloatArray | None
    """Of the Gaussian process, shape (n + 1,)."""
    told: int
    """Points evaluated, those included that are forgotten."""
    fitted: int
    """`told` when the parameters were last sought from the priors too."""
    asked: FloatArray | None
    """Points asked and not told: no loss was finite if others are asked."""

    def serve(self, method: BayesianOptimization, start: Start, rng: np.random.Generator) -> _Model:
        """Take what the options, the start and the seed decide."""
        self.method, self.start = method, start
        if start.points is not None and start.losses is not None:
            told = np.isfinite(start.losses)
            self.x, self.losses = start.points[told][:MOST], start.losses[told][:MOST]
        known = math.isfinite(start.loss)
        if known and not (self.x == start.x0).all(1).any():
            self.x, self.losses = np.vstack([start.x0, self.x]), np.append(start.loss, self.losses)
        self.told = len(self.x)
        size = max(0, method.first(start.n) - self.told)
        strata = rng.permuted(np.tile(np.arange(size), (start.n, 1)), axis=1).T
        self.design = self._outside((strata + rng.random((size, start.n))) / max(size, 1))
        if size and not known:
            self.design[0] = start.x0
        return self

    def ask(self, rng: np.random.Generator) -> FloatArray:
        """See `Strategy.ask`: points of the design, then of the largest expected improvement."""
        if self.asked is not None:
            self._learn(self.asked, np.full(len(self.asked), np.inf))
        x = self.design[self.drawn : self.drawn + self.method.popsize]
        self.drawn += len(x)
        if not len(x):
            none = not np.isfinite(self.losses).any()
            x = self._outside(
                rng.random((self.method.popsize, self.start.n)) if none else self._promising(rng)
            )
        self.asked = x
        return x

    def tell(self, x: FloatArray, losses: FloatArray, rng: np.random.Generator) -> Ending | None:
        """See `Strategy.tell`."""
        self._learn(x, losses)
        return None

    def _learn(self, x: FloatArray, losses: FloatArray) -> None:
        self.x, self.losses = np.vstack([self.x, x]), np.append(self.losses, losses)
        self.asked, self.told = None, self.told + len(x)
        if len(self.losses) > MOST:
            kept = np.zeros(len(self.losses), bool)
            kept[np.argsort(self.losses, kind="stable")[: MOST // 2]] = True
            kept[np.flatnonzero(~kept)[-(MOST // 2) :]] = True
            self.x, self.losses = self.x[kept], self.losses[kept]

    def _promising(self, rng: np.random.Generator) -> FloatArray:
        """Points of the unit cube, shape (popsize, n)."""
        known, y = self._seen(self.x), flattened(self.losses)
        anew = self.told >= GROWTH * self.fitted
        if self.parameters is None or anew or len(y) <= ALWAYS:
            process = GaussianProcess.fitted(known, y, self.parameters, anew)
            self.parameters = process.parameters
        else:
            process = GaussianProcess(known, y, self.parameters)
        if anew:
            self.fitted = self.told
        found = np.empty((self.method.popsize, self.start.n))
        for i in range(len(found)):
            if i:
                point = self._canonical(found[i - 1])[None]
                known, y = np.vstack([known, point]), np.append(y, process(point)[0])
                process = GaussianProcess(known, y, process.parameters)
            found[i] = self._most_promising(process, known, y, rng)
        return found

    def _most_promising(
        self, process: GaussianProcess, known: FloatArray, y: FloatArray, rng: np.random.Generator
    ) -> FloatArray:
        """The point of the unit cube with the largest expected improvement that was found, shape (n,)."""
        lowest = float(process(known)[0].min())

        def promise(u: FloatArray) -> FloatArray:
            return log_expected_improvement(*process(self._canonical(u)), lowest)

        n = self.start.n
        reach = np.minimum(process.lengths, 1.0)
        about = np.repeat(known[np.argsort(y, kind="stable")[:BEST]], NEAR, axis=0)
        steps = reach * 10 ** rng.uniform(-3, -0.5, (len(about), 1))
        u = np.vstack([rng.random((DRAWN, n)), _moved(about, steps, 1.0, rng)])
        values = promise(u)
        order = np.argsort(-values, kind="stable")
        best, best_values = u[order[:KEPT]], values[order[:KEPT]]
        for round_ in range(ROUNDS):
            tried = np.repeat(best, MOVES, axis=0)
            tried = _moved(tried, 0.1 * 0.65**round_ * reach, max(0.5, 1 / n), rng)
            seen = promise(tried).reshape(len(best), MOVES)
            at = seen.argmax(1)
            rows = np.arange(len(best))
            better = seen[rows, at] > best_values
            best[better] = tried.reshape(len(best), MOVES, n)[rows, at][better]
            best_values[better] = seen[rows, at][better]
        for candidate in (*best[np.argsort(-best_values, kind="stable")], *u[order]):
            if np.abs(self._canonical(candidate) - known).max(1).min() > SAME:
                return np.asarray(candidate)
        return rng.random(n)  # all there are have been evaluated

    def _inside(self, x: FloatArray) -> FloatArray:
        """Solver coordinates as points of the unit cube, shape (..., n)."""
        start = self.start
        return np.asarray((x - start.lower) / (start.upper - start.lower))

    def _outside(self, u: FloatArray) -> FloatArray:
        """Points of the unit cube in solver coordinates, shape (..., n)."""
        return self.start.clip(in_box(self.start, u, u))

    def _seen(self, x: FloatArray) -> FloatArray:
        """As the model sees solver coordinates: points of the unit cube, the same for the same meaning."""
        return self._inside(self.start.meant(x))

    def _canonical(self, u: FloatArray) -> FloatArray:
        """`_seen` of points of the unit cube."""
        if self.start.integer is None and not self.start.choices:
            return u
        return self._seen(self._outside(u))

    def favourite(self) -> FloatArray | None:
        """See `Strategy.favourite`: the known point of the lowest mean."""
        if self.parameters is None:
            return None
        known = self._seen(self.x)
        mean, _ = GaussianProcess(known, flattened(self.losses), self.parameters)(known)
        x: FloatArray = self.x[np.where(np.isfinite(self.losses), mean, np.inf).argmin()].copy()
        return x

    def hand_over(self) -> HandOver:
        """See `Strategy.hand_over`: the points known."""
        return handed_points(self.x, self.losses)


def flattened(losses: FloatArray) -> FloatArray:
    """Losses as the model takes them, of mean 0 and variance 1, shape (k,): none far above the median.

    Args:
        losses: shape (k,), at least one finite; +inf = rejected.
    """
    finite = losses[np.isfinite(losses)]
    if np.abs(finite).max() > 1e300:
        return flattened(losses * 1e-10)  # whose differences are finite
    low, middle = float(finite.min()), float(np.median(finite))
    if middle == low:
        middle = float(finite.mean())
    reach = 2 * (middle - low)
    if reach == 0:
        y = np.where(np.isfinite(losses), 0.0, 1.0)
    else:
        far = (losses - middle) / reach
        y = np.where(far > 0, np.tanh(far), far)
    deviation = float(y.std())
    return np.asarray((y - y.mean()) / (deviation if deviation > 0 else 1.0))


def _moved(u: FloatArray, steps: FloatArray, share: float, rng: np.random.Generator) -> FloatArray:
    """Points of the unit cube after normal `steps` in a share of their coordinates; a few are drawn anew."""
    moved = np.clip(u + steps * rng.standard_normal(u.shape), 0, 1)
    moved = np.where(rng.random(u.shape) < share, moved, u)
    return np.where(rng.random(u.shape) < REDRAWN / u.shape[1], rng.random(u.shape), moved)
