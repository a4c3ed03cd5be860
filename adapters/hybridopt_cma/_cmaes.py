"""CMA-ES (Hansen, "The CMA Evolution Strategy: A Tutorial", 2016), package `cma`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hybridopt.errors import MethodError
from hybridopt.ledger import Reason
from hybridopt.optimizer import Need
from hybridopt.options import check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start

_FAILED = {
    "tolflatfitness",
    "tolfacupx",
    "noeffectaxis",
    "noeffectcoord",
    "conditioncov",
    "tolstagnation",
    "maxiter",
}


@dataclass(frozen=True)
class CMAES(BlockingMethod):
    """Samples generations from a normal distribution whose mean, step size and covariance it learns.

    The first choice without gradients for 2 to a few hundred weights with interacting effects. O(n²) memory and
    time a generation.

    Args:
        sigma: initial standard deviation in solver coordinates, shared by all weights; None = 0.3 × the range of
            each bounded weight, 0.5 for unbounded ones (0.5 × scale in weights).
        popsize: points a generation; None = 4 + 3 ln n.
        maxiter: generations; None = pycma's default.
        diagonal: learn variances only: O(n) memory and time.
        tolfun, tolx: stop when losses, or points, of late generations differ by less.

    Raises:
        MemoryLimit: its matrices of n² doubles do not fit.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.adapters import CMAES
        >>> f = lambda x: float(((x - 1) ** 2).sum())
        >>> r = hybridopt.minimize(f, np.zeros(3), CMAES(sigma=0.5), budget=1000, seed=1)
        >>> r.best_loss < 1e-8
        True
    """

    name: ClassVar[str] = "cma.cmaes"
    uses: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS, Need.POPULATION})
    libraries: ClassVar[tuple[str, ...]] = ("cma",)
    memory_advice: ClassVar[str] = "use diagonal=True, or select fewer weights (select=...)"

    sigma: float | None = None
    popsize: int | None = None
    maxiter: int | None = None
    diagonal: bool = False
    tolfun: float = 1e-11
    tolx: float = 1e-11

    def __post_init__(self) -> None:
        check_options(self)
        if self.sigma is not None and not self.sigma > 0:
            raise MethodError(f"{self.name}: expected sigma > 0, got {self.sigma!r}")
        if self.popsize is not None and not self.popsize >= 2:
            raise MethodError(f"{self.name}: expected popsize >= 2, got {self.popsize!r}")

    def memory(self, n: int) -> int:
        """Bytes of covariance, its eigenvectors, and their work copies."""
        return 0 if self.diagonal else 40 * n * n

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        import cma

        sigma, stds = self._spread(start)
        options: dict[str, Any] = {
            "seed": math.nan,  # leaves NumPy's global generator alone; all draws come from randn
            "randn": np.random.RandomState(start.seed).randn,
            "tolfun": self.tolfun,
            "tolx": self.tolx,
            "CMA_diagonal": self.diagonal,
            "verbose": -9,
            "verb_log": 0,
            "verb_disp": 0,
            "signals_filename": None,
        }
        if self.popsize is not None:
            options["popsize"] = self.popsize
        if self.maxiter is not None:
            options["maxiter"] = self.maxiter
        if stds is not None:
            options["CMA_stds"] = stds
        if start.bounded:
            options["bounds"] = [_sides(start.lower), _sides(start.upper)]
            if start.n == 1:  # pycma 4.5 bails where it would limit the only standard deviation
                options["maxstd"] = math.inf
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pycma warns about options and flat losses; endings say the same
            es = cma.CMAEvolutionStrategy(start.x0, sigma, options)
        while not es.stop():
            population = np.clip(np.array(es.ask()), start.lower, start.upper)
            losses = ask.values(population)
            if np.isfinite(losses).any():  # else nothing was learnt: draw again from the same distribution
                _tell(es, population, losses)
        best = es.best
        stopped = sorted(es.stop())
        reason = Reason.STALLED if _FAILED & set(stopped) else Reason.CONVERGED
        x = start.x0 if best.x is None else np.clip(best.x, start.lower, start.upper)
        return Ending(reason, ", ".join(stopped), math.inf if best.f is None else float(best.f), x)

    def _spread(self, start: Start) -> tuple[float, npt.NDArray[np.float64] | None]:
        """Initial step size, and multipliers for it where weights differ."""
        if self.sigma is not None:
            return self.sigma, None
        if start.sigma is not None:
            return start.sigma, None
        width = start.upper - start.lower
        stds = np.where(np.isfinite(width), 0.3 * width, 0.5)
        if np.all(stds == stds[0]):
            return float(stds[0]), None
        return 1.0, stds


def _sides(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]


def _tell(es: Any, population: npt.NDArray[np.float64], losses: npt.NDArray[np.float64]) -> None:
    """Tell pycma, with losses that are not finite ranked last: above the worst finite one of the generation."""
    finite = np.isfinite(losses)
    worst = float(losses[finite].max())
    told = np.where(finite, losses, worst + abs(worst) + 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        es.tell(list(population), told.tolist())
