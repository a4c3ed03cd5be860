"""Differential evolution that learns its own settings: SHADE and L-SHADE (Tanabe & Fukunaga, CEC 2013 and 2014)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hybridopt.ledger import Reason
from hybridopt.optimizer import Need
from hybridopt.options import check_options
from hybridopt.population._base import FloatArray, PopulationMethod, Strategy
from hybridopt.population._common import agree, end, first_points, require_at_least
from hybridopt.population._memory import Remembering
from hybridopt.start import Ending, Start

_SMALLEST = 4  # N_min of L-SHADE: the mutation needs four different points
_BEST = 0.11  # p of current-to-pbest/1
_ARCHIVE = 2.6  # archive's size in populations
_MEMORY = 6  # H


@dataclass(frozen=True)
class DifferentialEvolution(PopulationMethod):
    """Moves every point towards one of the best, by a difference of two others; keeps what is better.

    For rugged losses in a box with up to a few dozen weights, and where weights are badly scaled: it needs neither
    step sizes nor crossover rates, which it learns from what succeeded. On smooth losses CMA-ES needs fewer
    evaluations. One step is one generation, all of whose points can be evaluated at once.

    Differential evolution current-to-pbest/1/bin with an archive and a memory of successful settings: Tanabe &
    Fukunaga, "Improving the Search Performance of SHADE Using Linear Population Size Reduction", CEC 2014, with its
    constants (H = 6, p = 0.11, archive 2.6). Linear reduction makes the path depend on the total budget, so it is
    done only if `reduce_over` names one; the population is constant otherwise. We differ in these: the start is one
    of the first points; a rejected point is replaced by any finite one and teaches the memory nothing.

    With noisy losses a point that was lucky once would stay (Krink, Filipič, Fogel & Thomsen, "Noisy Optimization
    Problems - A Particular Challenge for Differential Evolution?", CEC 2004). So (and under `keep="last"`) four points
    of the population are evaluated again with each generation, which then is that many evaluations more, and their
    losses corrected (see `Remembering` in `population/_memory.py`). Noise that a whole generation has in common
    (`noise="shared"`) is compared away by them. A lucky draw still counts as better, so `patience` hardly ever ends a
    noisy run: its budget does.

    Args:
        popsize: points in the first generation; None = 18 n as in L-SHADE if it is reduced, else 8 + n.
        reduce_over: evaluations over which the population shrinks linearly to 4; None = it stays as it is.
        tolfun: converged when the losses of the population differ by less than this × max(1, |best loss|).
        patience: stalled after this many generations in which no point became better.

    Raises:
        BoundsError: a weight has no finite bounds.
        MethodError: popsize < 4, or an option of the wrong type or sign.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.population import DifferentialEvolution
        >>> f = lambda x: float((x**2).sum())
        >>> r = hybridopt.minimize(
        ...     f, np.ones(2), DifferentialEvolution(popsize=20), budget=2000, bounds=(-2, 2), seed=0
        ... )
        >>> r.best_loss < 1e-8
        True
    """

    name: ClassVar[str] = "de"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})
    takes: ClassVar[frozenset[str]] = frozenset({"points"})

    popsize: int | None = None
    reduce_over: int | None = None
    tolfun: float = 1e-11
    patience: int = 100

    def __post_init__(self) -> None:
        check_options(self)
        require_at_least(self, popsize=_SMALLEST, reduce_over=1, tolfun=0, patience=1)

    def memory(self, n: int) -> int:
        """Bytes of population, trials, archive and work copies."""
        return int(8 * n * self.points(n) * (4 + _ARCHIVE))

    def points(self, n: int) -> int:
        """Points in the first generation."""
        if self.popsize is not None:
            return self.popsize
        if self.reduce_over is not None:
            return max(18 * n, _SMALLEST)
        # Share of targets reached on the 24 BBOB functions within 1000 d evaluations, d = 2 / 5 / 10: 10 + d points
        # .85 / .69 / .50, 10 points .85 / .64 / .37, 10 d points .75 / .36 / .23, 100 points .39 / .22 / .23.
        return 8 + n

    def begin(self, start: Start, rng: np.random.Generator) -> Strategy:
        """See `PopulationMethod.begin`."""
        n = start.n
        return _Evolution(
            x=np.empty((0, n)),
            losses=np.empty(0),
            checks=np.empty(0, int),
            archive=np.empty((0, n)),
            factors=np.empty(0),
            rates=np.empty(0),
            memory_factor=np.full(_MEMORY, 0.5),
            memory_rate=np.full(_MEMORY, 0.5),
        ).serve(self, start)


@dataclass
class _Evolution(Remembering):
    """What it remembers is the population."""

    archive: FloatArray
    """Points that were replaced by better ones, shape (<= 2.6 popsize, n)."""
    factors: FloatArray
    """F of the present trials, shape (popsize,)."""
    rates: FloatArray
    """CR of the present trials, shape (popsize,)."""
    memory_factor: FloatArray
    """M_F, shape (H,)."""
    memory_rate: FloatArray
    """M_CR, shape (H,); nan = the terminal value: crossover takes a single weight."""
    slot: int = 0
    """The place in memory that is written next, k - 1."""
    evaluations: int = 0
    idle: int = 0
    """Generations since a point became better."""

    def serve(self, method: DifferentialEvolution, start: Start) -> Strategy:
        """Take the options and the start, from which no state follows."""
        self.method, self.start = method, start
        return self

    def ask(self, rng: np.random.Generator) -> FloatArray:
        """The first points, then one trial for each member of the population."""
        if not len(self.x):
            return first_points(self.start, self.method.points(self.start.n), rng)
        size, n = self.x.shape
        self._draw_settings(rng)
        F, CR = self.factors[:, None], self.rates[:, None]
        best = np.argsort(self.losses, kind="stable")[: max(2, round(_BEST * size))]
        towards = self.x[rng.choice(best, size)]
        first, second = self._two_others(rng)
        v = self.x + F * (towards - self.x) + F * (first - second)  # eq. 3: current-to-pbest/1
        lower, upper = self.start.lower, self.start.upper
        v = np.where(v < lower, (lower + self.x) / 2, v)  # eq. 4
        v = np.where(v > upper, (upper + self.x) / 2, v)
        crossed = rng.random((size, n)) < CR
        crossed[np.arange(size), rng.integers(n, size=size)] = True
        return np.where(crossed, v, self.x)  # eq. 5: binomial crossover

    def _draw_settings(self, rng: np.random.Generator) -> None:
        size = len(self.x)
        r = rng.integers(_MEMORY, size=size)
        rates = rng.normal(self.memory_rate[r], 0.1)  # eq. 1
        self.rates = np.where(np.isnan(rates), 0.0, rates.clip(0.0, 1.0))
        factors = np.zeros(size)
        while (again := factors <= 0).any():  # eq. 2: Cauchy, drawn again where not positive
            factors[again] = self.memory_factor[r[again]] + 0.1 * rng.standard_cauchy(int(again.sum()))
        self.factors = np.minimum(factors, 1.0)

    def _two_others(self, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        """x_r1 of the population and x_r2 of population and archive; r1, r2 and the point itself all differ."""
        size = len(self.x)
        own = np.arange(size)
        first = rng.integers(size - 1, size=size)
        first += first >= own
        second = rng.integers(size + len(self.archive) - 2, size=size)
        low, high = np.minimum(own, first), np.maximum(own, first)
        second += second >= low
        second += second >= high
        return self.x[first], np.concatenate([self.x, self.archive])[second]

    def correct(self, losses: FloatArray, paired: bool) -> float:
        """See `Strategy.correct`."""
        self.evaluations += len(losses)
        return super().correct(losses, paired)

    def tell(self, x: FloatArray, losses: FloatArray, rng: np.random.Generator) -> Ending | None:
        """Select, learn which settings succeeded, and shrink."""
        self.evaluations += len(losses)
        if not len(self.x):
            self.x, self.losses, self.checks = x, losses, np.zeros(len(losses), int)
            return None
        better, kept = losses < self.losses, losses > self.losses  # eq. 6: an equal trial is taken too
        self.archive = np.concatenate([self.archive, self.x[better]])
        self._learn(better, self.losses - losses)
        self.x = np.where(kept[:, None], self.x, x)
        self.losses = np.minimum(losses, self.losses)
        self.checks = np.where(kept, self.checks, 0)
        self._shrink(rng)
        self.idle = 0 if better.any() else self.idle + 1
        if agree(self.losses, self.method.tolfun):
            return end(Reason.CONVERGED, "the losses of all points agree within tolfun", self.x, self.losses)
        if self.idle >= self.method.patience:
            message = f"no point became better in {self.idle} generations"
            return end(Reason.STALLED, message, self.x, self.losses)
        return None

    def _learn(self, better: npt.NDArray[np.bool_], gains: FloatArray) -> None:
        """Algorithm 1: write the means of the successful F and CR, weighted by gain, into the next slot."""
        taught = better & np.isfinite(gains)
        if not taught.any():
            return
        F, CR, w = self.factors[taught], self.rates[taught], gains[taught]
        w = w / w.max()  # eq. 8 up to its sum, which cancels in eq. 7
        self.memory_factor[self.slot] = (w @ F**2) / (w @ F)  # eq. 7: weighted Lehmer mean
        terminal = np.isnan(self.memory_rate[self.slot]) or CR.max() == 0
        self.memory_rate[self.slot] = np.nan if terminal else (w @ CR**2) / (w @ CR)
        self.slot = (self.slot + 1) % _MEMORY

    def _shrink(self, rng: np.random.Generator) -> None:
        """Algorithm 2, lines 21-24: drop the worst points, and what the archive has too many, at random."""
        if self.method.reduce_over is not None:
            largest = self.method.points(self.start.n)
            done = min(1.0, self.evaluations / self.method.reduce_over)
            size = round(largest + (_SMALLEST - largest) * done)  # eq. 10
            if size < len(self.x):
                order = np.argsort(self.losses, kind="stable")[:size]
                self.x, self.losses, self.checks = self.x[order], self.losses[order], self.checks[order]
        room = round(_ARCHIVE * len(self.x))
        if len(self.archive) > room:
            self.archive = self.archive[rng.permutation(len(self.archive))[:room]]
