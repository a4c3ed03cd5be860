"""Natural evolution strategies SNES and xNES (Wierstra et al., JMLR 15, 2014; Glasmachers et al., GECCO 2010)."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridopt.ledger import Reason
from hybridopt.optimizer import HandOver
from hybridopt.options import check_options
from hybridopt.population._base import FloatArray, PopulationMethod, Strategy
from hybridopt.population._common import (
    agree,
    correlated,
    end,
    handed,
    mirror,
    require_at_least,
    require_positive,
    share_by_rank,
    spread,
)
from hybridopt.population._large import Room, fill_normal, into_bounds, weighted_moments
from hybridopt.rows import Rows
from hybridopt.start import Ending, Start


def utilities(popsize: int) -> FloatArray:
    """u_k of the k-th best point, shape (popsize,), sum 0 (Wierstra et al. 2014, section 3.1)."""
    raw = np.maximum(0.0, math.log(popsize / 2 + 1) - np.log(np.arange(1, popsize + 1)))
    shaped: FloatArray = raw / raw.sum() - 1 / popsize
    return shaped


@dataclass(frozen=True)
class _NES(PopulationMethod):
    """Options and first steps that both share."""

    sigma: float | None = None
    popsize: int | None = None
    eta_mu: float = 1.0
    eta_sigma: float | None = None
    tolfun: float = 1e-11
    tolx: float = 1e-11
    patience: int = 100

    def __post_init__(self) -> None:
        check_options(self)
        require_positive(self, "sigma", "eta_mu", "eta_sigma")
        require_at_least(self, popsize=2, tolfun=0, tolx=0, patience=1)

    def points(self, n: int) -> int:
        """Points a generation (table 1: 4 + 3 ln n)."""
        return 4 + int(3 * math.log(n)) if self.popsize is None else self.popsize


@dataclass(frozen=True)
class SNES(_NES):
    """Samples normal generations and learns their mean and one standard deviation for each weight.

    For 100 to some million weights without gradients, where memory of n² numbers is out of the question: it holds two
    numbers for each weight and one generation. If the model is on a GPU, generations of 4096 weights or more are drawn
    and kept there, the same points as on the CPU, and only mean and spread travel. It does not see interactions of
    weights: up to a few hundred weights `XNES` or CMA-ES need far fewer evaluations on bent valleys. One step is one
    generation.

    Wierstra et al. 2014, Algorithm 6, with the learning rates of table 1. We differ: losses that are equal share
    their utilities; the start is evaluated in the first generation, beside it; a sample outside the bounds is
    clipped, and what is learnt is the noise it then has.

    Args:
        sigma: initial standard deviation in solver coordinates; None = handed over, or 0.3 × the range of each
            bounded weight, 0.5 for unbounded ones.
        popsize: points a generation; None = 4 + 3 ln n.
        eta_mu, eta_sigma: learning rates of mean and spread; None = (3 + ln n) / (5 sqrt n).
        tolfun: converged when the losses of a generation differ by less than this × max(1, |lowest|).
        tolx: converged when the largest standard deviation is down to this, in solver coordinates.
        patience: stalled after this many generations in a row whose losses were all equal. Also stalled: when the
            largest standard deviation has grown 10 000-fold.

    Raises:
        MethodError: an option of the wrong type or sign.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.population import SNES
        >>> f = lambda x: float(((x - 1) ** 2).sum())
        >>> r = hybridopt.minimize(f, np.zeros(3), SNES(), budget=1500, seed=1)
        >>> r.best_loss < 1e-8
        True
    """

    name: ClassVar[str] = "snes"

    def memory(self, n: int) -> int:
        """Bytes of one generation, mean, spread and work copies."""
        return 8 * n * (self.points(n) + 6)

    def begin(self, start: Start, rng: np.random.Generator) -> Strategy:
        """See `PopulationMethod.begin`."""
        fresh = not math.isfinite(start.loss)
        return _SNES(start.x0, fresh, 0, spread(start, self.sigma)).serve(self, start)


@dataclass(frozen=True)
class XNES(_NES):
    """Samples normal generations and learns their mean, size and full covariance.

    For 2 to about 100 weights that interact. Like CMA-ES, which usually needs fewer evaluations; this one has no
    memory of past steps and is simpler to reason about. O(n²) memory, O(n³) time a generation. One step is one
    generation.

    Glasmachers et al. 2010; Wierstra et al. 2014, Algorithm 5, with the learning rates of table 1. We differ as in
    `SNES`, but samples outside the bounds are mirrored at them.

    Args:
        sigma: initial standard deviation in solver coordinates; None = handed over, or 0.3 × the range of each
            bounded weight, 0.5 for unbounded ones.
        popsize: points a generation; None = 4 + 3 ln n.
        eta_mu, eta_sigma, eta_b: learning rates of mean, size and shape; None = (9 + 3 ln n) / (5 n sqrt n).
        tolfun: converged when the losses of a generation differ by less than this × max(1, |lowest|).
        tolx: converged when the largest standard deviation is down to this, in solver coordinates.
        patience: stalled after this many generations in a row whose losses were all equal. Also stalled: when the
            largest standard deviation has grown 10 000-fold.

    Raises:
        MethodError: an option of the wrong type or sign.
        MemoryLimit: its matrices of n² doubles do not fit.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.population import XNES
        >>> f = lambda x: float((x[0] - 1) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2)
        >>> r = hybridopt.minimize(f, np.zeros(2), XNES(), budget=2000, seed=1)
        >>> r.best_loss < 1e-8
        True
    """

    name: ClassVar[str] = "xnes"
    memory_advice: ClassVar[str] = "use snes, or select fewer weights (select=...)"

    eta_b: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "eta_b")

    def memory(self, n: int) -> int:
        """Bytes of B, the gradient of its logarithm, eigenvectors and work copies."""
        return 48 * n * n

    def begin(self, start: Start, rng: np.random.Generator) -> Strategy:
        """See `PopulationMethod.begin`."""
        factor = correlated(start)
        B = np.diag(spread(start, self.sigma))
        if factor is not None:
            B = B @ factor
        sigma = math.exp(
            np.log(B.diagonal()).mean()
        )  # so that det B = 1, as the updates keep it; B is triangular
        fresh = not math.isfinite(start.loss)
        return _XNES(start.x0, fresh, 0, sigma, B / sigma, np.empty((0, start.n))).serve(self, start)


@dataclass
class _Normal(Strategy):
    """A normal distribution between generations: what SNES and xNES share."""

    mu: FloatArray
    """Mean, shape (n,)."""
    fresh: bool
    """The start is still to be evaluated, beside the first generation."""
    idle: int
    """Generations in a row whose losses were all equal."""

    def serve(self, method: _NES, start: Start) -> Strategy:
        """Take the options and the start, from which no state follows."""
        self.method, self.start, self.room = method, start, Room(start)
        self.widest = 1e4 * float(spread(start, method.sigma).max())
        return self

    def ask(self, rng: np.random.Generator) -> Rows:
        """A generation; before the first one the start, unless its loss is known."""
        n, popsize = self.start.n, self.method.points(self.start.n)
        x = self.room.take(popsize + self.fresh, n)
        if self.fresh:
            x[0] = self.start.x0
        self.sample(rng, x[self.fresh :])
        return x

    def tell(self, x: Rows, losses: FloatArray, rng: np.random.Generator) -> Ending | None:
        """Follow the natural gradient, and see whether the end has come."""
        drawn, told = x[self.fresh :], losses[self.fresh :]
        self.fresh = False
        self.learn(drawn, share_by_rank(told, utilities(len(told))))
        self.idle = self.idle + 1 if told.min() == told.max() else 0
        if agree(told, self.method.tolfun):
            return end(Reason.CONVERGED, "the losses of a generation agree within tolfun", x, losses)
        if self.width() <= self.method.tolx:
            return end(Reason.CONVERGED, "the largest standard deviation is down to tolx", x, losses)
        if not self.width() <= self.widest:
            message = "the step size grew 10000-fold: give a larger sigma, or bounds"
            return end(Reason.STALLED, message, x, losses)
        if self.idle >= self.method.patience:
            return end(
                Reason.STALLED, f"all losses of {self.idle} generations in a row were equal", x, losses
            )
        return None

    def favourite(self) -> FloatArray | None:
        """See `Strategy.favourite`: the mean."""
        return mirror(self.start, self.mu)

    @abc.abstractmethod
    def sample(self, rng: np.random.Generator, out: Rows) -> None:
        """Write points inside the bounds into `out`, shape (popsize, n)."""

    @abc.abstractmethod
    def learn(self, x: Rows, u: FloatArray) -> None:
        """Update the distribution from points, shape (popsize, n), and their utilities, shape (popsize,)."""

    @abc.abstractmethod
    def width(self) -> float:
        """The largest standard deviation."""


@dataclass
class _SNES(_Normal):
    """Algorithm 6."""

    sigma: FloatArray
    """Standard deviation of each weight, shape (n,)."""

    def sample(self, rng: np.random.Generator, out: Rows) -> None:
        """See `_Normal.sample`. Clipped, which makes no weight's noise larger; it is not kept (memory)."""
        fill_normal(rng, out, self.mu, self.sigma)
        into_bounds(self.start, out)

    def learn(self, x: Rows, u: FloatArray) -> None:
        """See `_Normal.learn`."""
        n = len(self.mu)
        gradient_mu, gradient_sigma = weighted_moments(x, self.mu, self.sigma, u)  # sum(u) = 0
        eta_sigma = self.method.eta_sigma or (3 + math.log(n)) / (5 * math.sqrt(n))
        self.mu = self.start.clip(self.mu + self.method.eta_mu * self.sigma * gradient_mu)
        self.sigma = self.sigma * np.exp(eta_sigma / 2 * gradient_sigma)

    def width(self) -> float:
        """See `_Normal.width`."""
        return float(self.sigma.max())

    def hand_over(self) -> HandOver:
        """See `Strategy.hand_over`: the distribution."""
        return handed(self.sigma**2)


@dataclass
class _XNES(_Normal):
    """Algorithm 5."""

    sigma: float
    """Overall size: the determinant of `B` stays 1."""
    B: FloatArray
    """Shape of the distribution, (n, n): points are mu + sigma B z."""
    z: FloatArray
    """Noise of the generation that was asked last, shape (popsize, n)."""

    def sample(self, rng: np.random.Generator, out: Rows) -> None:
        """See `_Normal.sample`. Mirrored, as if the loss were mirrored at its bounds: `mu` may lie beyond them.

        Noise clipped in one weight would lie far out in a distribution that is narrow across the weights.
        """
        self.z = rng.standard_normal(out.shape)
        out[:] = mirror(self.start, self.mu + self.sigma * (self.z @ self.B.T))

    def learn(self, x: Rows, u: FloatArray) -> None:
        """See `_Normal.learn`."""
        n, method = len(self.mu), self.method
        assert isinstance(method, XNES)
        rate = (9 + 3 * math.log(n)) / (5 * n * math.sqrt(n))
        delta = u @ self.z  # G_delta
        M = (self.z.T * u) @ self.z  # G_M, less sum(u) = 0 times the identity
        size = float(np.trace(M)) / n  # G_sigma
        shape = M - size * np.eye(n)  # G_B
        values, vectors = np.linalg.eigh((method.eta_b or rate) / 2 * shape)
        self.mu = self.mu + method.eta_mu * self.sigma * (self.B @ delta)
        self.sigma *= math.exp((method.eta_sigma or rate) / 2 * size)
        self.B = self.B @ ((vectors * np.exp(values)) @ vectors.T)

    def width(self) -> float:
        """See `_Normal.width`."""
        return self.sigma * float(np.sqrt((self.B**2).sum(1)).max())

    def hand_over(self) -> HandOver:
        """See `Strategy.hand_over`: the distribution."""
        return handed(self.sigma**2 * (self.B @ self.B.T))
