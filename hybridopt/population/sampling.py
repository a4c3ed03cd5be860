"""Search without learning, the yardstick of other methods: independent points, and Sobol's low-discrepancy ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.special import ndtri
from scipy.stats import qmc

from hybridopt.errors import MethodError
from hybridopt.options import check_options
from hybridopt.population._base import FloatArray, PopulationMethod, Strategy
from hybridopt.population._common import require_at_least, require_positive, spread
from hybridopt.start import Ending, Start

_BITS = 32  # the sequence has 2^32 points; scipy 1.17 cannot wind one of 64 bits forward


@dataclass(frozen=True)
class _Sampling(PopulationMethod):
    """Options that both share."""

    popsize: int = 64
    sigma: float | None = None

    def __post_init__(self) -> None:
        check_options(self)
        require_positive(self, "sigma")
        require_at_least(self, popsize=1)

    def memory(self, n: int) -> int:
        """Bytes of one generation and a work copy."""
        return 16 * n * (self.popsize + 1)


@dataclass(frozen=True)
class RandomSearch(_Sampling):
    """Draws independent points: uniform between the bounds, normal about the start for weights without bounds.

    The yardstick: a method that does not beat it on a problem learns nothing there. `SobolSearch` covers a box of
    few weights more evenly. The start is the first point. One step is one generation.

    Args:
        popsize: points a generation.
        sigma: standard deviation for weights without two finite bounds, in solver coordinates; None = handed over,
            or 0.5. A point beyond a single bound is clipped to it.

    Raises:
        MethodError: an option of the wrong type or sign.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.population import RandomSearch
        >>> f = lambda x: float((x**2).sum())
        >>> r = hybridopt.minimize(f, np.ones(2), RandomSearch(), budget=500, bounds=(-2, 2), seed=0)
        >>> r.best_loss < 0.1
        True
    """

    name: ClassVar[str] = "random_search"

    def begin(self, start: Start, rng: np.random.Generator) -> Strategy:
        """See `PopulationMethod.begin`."""
        return _Sample(not math.isfinite(start.loss)).serve(self, start)


@dataclass(frozen=True)
class SobolSearch(_Sampling):
    """Sobol's low-discrepancy points, scrambled: they fill the space more evenly than independent ones.

    For a first look at up to a few dozen weights, or as the first stage of a chain; a yardstick like `RandomSearch`.
    For weights without two finite bounds the points are mapped to a normal distribution about the start by its
    quantiles. The start is evaluated first, beside the first generation. One step is one generation.

    Sobol 1967 with Joe and Kuo's direction numbers and Matoušek's scrambling, as in `scipy.stats.qmc.Sobol`; the
    seed chooses the scrambling.

    Args:
        popsize: points a generation, a power of 2: what was evaluated is then even after every generation.
        sigma: standard deviation for weights without two finite bounds, in solver coordinates; None = handed over,
            or 0.5. A point beyond a single bound is clipped to it.

    Raises:
        MethodError: more than 21201 weights, for which there are no direction numbers; an option of the wrong type
            or sign.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.population import SobolSearch
        >>> f = lambda x: float((x**2).sum())
        >>> r = hybridopt.minimize(f, np.ones(2), SobolSearch(), budget=500, bounds=(-2, 2), seed=0)
        >>> r.best_loss < 0.1
        True
    """

    name: ClassVar[str] = "sobol"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.popsize & (self.popsize - 1):
            raise MethodError(f"{self.name}: expected a power of 2 as popsize, got {self.popsize!r}")

    def begin(self, start: Start, rng: np.random.Generator) -> Strategy:
        """See `PopulationMethod.begin`."""
        if start.n > qmc.Sobol.MAXDIM:
            raise MethodError(
                f"{self.name}: expected at most {qmc.Sobol.MAXDIM} weights, got {start.n}; use random_search, or "
                "select fewer weights (select=...)"
            )
        return _Sobol(not math.isfinite(start.loss)).scramble(start.n, rng).serve(self, start)


@dataclass
class _Sample(Strategy):
    """Independent points."""

    fresh: bool
    """The start is still to be evaluated, beside the first generation."""

    def serve(self, method: _Sampling, start: Start) -> Strategy:
        """Take the options and the start, from which no state follows."""
        self.method, self.start = method, start
        self.boxed = np.isfinite(start.lower) & np.isfinite(start.upper)
        self.stds = spread(start, method.sigma)
        return self

    def ask(self, rng: np.random.Generator) -> FloatArray:
        """A generation; before the first one the start, unless its loss is known."""
        start = self.start
        u = self.draw(rng)
        lower, width = (
            np.where(self.boxed, start.lower, 0.0),
            np.where(self.boxed, start.upper - start.lower, 1.0),
        )
        x = lower + u * width
        free = ~self.boxed
        if free.any():
            # away from 0 and 1, whose quantiles are infinite
            z = ndtri(np.clip(u[:, free], 2.0**-53, 1 - 2.0**-53))
            x[:, free] = start.x0[free] + self.stds[free] * z
        return start.clip(np.concatenate([start.x0[None], x]) if self.fresh else x)

    def draw(self, rng: np.random.Generator) -> FloatArray:
        """Points of the unit cube, shape (popsize, n)."""
        return rng.random((self.method.popsize, self.start.n))

    def tell(self, x: FloatArray, losses: FloatArray, rng: np.random.Generator) -> Ending | None:
        """Nothing is learnt."""
        self.fresh = False
        return None


@dataclass
class _Sobol(_Sample):
    """Points of a sequence. Where it stands is all its state: the scrambling follows from the seed."""

    drawn: int = 0

    def scramble(self, n: int, rng: np.random.Generator) -> _Sobol:
        """Make the sequence."""
        self.sequence = qmc.Sobol(n, scramble=True, bits=_BITS, rng=rng)
        return self

    def draw(self, rng: np.random.Generator) -> FloatArray:
        """See `_Sample.draw`."""
        u: FloatArray = self.sequence.random(self.method.popsize)
        self.drawn += len(u)
        return u

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Wind a new sequence forward."""
        super().load_state_dict(state)
        if self.drawn:
            self.sequence.fast_forward(self.drawn)
