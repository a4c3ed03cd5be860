"""The methods of `scipy.optimize.minimize` that need losses alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hybridopt.carrier import Isolation
from hybridopt.coordinates import to_next
from hybridopt.errors import MethodError
from hybridopt.ledger import Reason
from hybridopt.optimizer import Need
from hybridopt.options import Count, NonNegative, Positive
from hybridopt.solver import Ask, Ending, Start
from hybridopt_scipy._minimize import Minimize


@dataclass(frozen=True)
class NelderMead(Minimize):
    """The simplex of Nelder and Mead (1965), for a few weights and losses with kinks or a little noise; takes bounds.

    Slow beyond some ten weights (then `adaptive=True`, Gao and Han 2012, or another method). The first simplex is
    SciPy's: each weight in turn 5 % larger, or 0.00025 where it is 0; but where that leads out of a lower bound, the
    step is taken upwards. (SciPy clips it, and never moves such a weight again.) Whole numbers begin at least one
    apart.

    Args:
        maxiter, maxfev: iterations, evaluations; both None = 200 n each.
        xatol: converged when the simplex is smaller than this in every weight (absolute) ...
        fatol: ... and its losses differ by less than this (absolute).
        adaptive: coefficients that depend on the number of weights.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import NelderMead
        >>> f = lambda x: float(abs(x - 3).sum())
        >>> hybridopt.minimize(f, np.zeros(2), NelderMead(), budget=400).x.round(3).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.nelder_mead"
    solver: ClassVar[str] = "Nelder-Mead"
    uses: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})

    maxiter: Count | None = None
    maxfev: Count | None = None
    xatol: NonNegative = 1e-4
    fatol: NonNegative = 1e-4
    adaptive: bool = False

    def memory(self, n: int) -> int:
        """Bytes of the simplex and its sorted copies."""
        return 24 * n * n

    def arguments(self, ask: Ask, start: Start) -> dict[str, Any]:
        """See `Minimize.arguments`."""
        found = super().arguments(ask, start)
        steps = np.where(start.x0 != 0, 0.05 * start.x0, 0.00025)
        turned = start.x0 + steps < start.lower
        if start.integer is not None:
            apart = np.maximum(np.abs(steps), to_next(start.rounded(start.x0), start.log))
            steps = np.where(start.integer, apart, steps)
            turned = np.where(start.integer, start.x0 + steps > start.upper, turned)
        if turned.any() or start.integer is not None:
            corners = start.x0 + np.diag(np.where(turned, -steps, steps))
            found["options"]["initial_simplex"] = np.vstack([start.x0, corners])
        return found


@dataclass(frozen=True)
class Powell(Minimize):
    """Powell's conjugate directions (1964): a line search along each of n directions, then a new one; takes bounds.

    Good for smooth losses of up to some tens of weights without gradients; a round costs tens of evaluations per
    weight.

    Args:
        maxiter, maxfev: rounds, evaluations; both None = 1000 n each.
        xtol: of the line searches, relative.
        ftol: converged when a round lowers the loss by less, relative.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import Powell
        >>> f = lambda x: float(((x - 3) ** 2).sum())
        >>> hybridopt.minimize(f, np.zeros(2), Powell(), budget=400).x.round(6).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.powell"
    solver: ClassVar[str] = "Powell"
    uses: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})

    maxiter: Count | None = None
    maxfev: Count | None = None
    xtol: Positive = 1e-4
    ftol: NonNegative = 1e-4

    def memory(self, n: int) -> int:
        """Bytes of the directions."""
        return 8 * n * n


@dataclass(frozen=True)
class COBYLA(Minimize):
    """Powell's COBYLA (1994; SciPy's is PRIMA, Zhang 2023): linear models on a simplex in a shrinking trust region.

    Robust against noise, with a modest final accuracy. Takes constraints, which it may break on its way; bounds it
    would treat like these, and so is refused where there are any: use COBYQA.

    Args:
        rhobeg: first radius, the size of a reasonable first change of a weight.
        tol: last radius.
        maxiter: evaluations (so SciPy calls them).
        f_target: stop at this loss.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import COBYLA
        >>> f = lambda x: float(((x - 3) ** 2).sum())
        >>> hybridopt.minimize(f, np.zeros(2), COBYLA(), budget=400).x.round(3).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.cobyla"
    solver: ClassVar[str] = "COBYLA"
    uses: ClassVar[frozenset[Need]] = frozenset({Need.CONSTRAINTS})
    converged: ClassVar[frozenset[int]] = frozenset({0, 1})  # smallest radius, f_target

    rhobeg: Positive = 1.0
    tol: Positive = 1e-4
    maxiter: Count = 1000
    f_target: float = -math.inf

    def memory(self, n: int) -> int:
        """Bytes of the simplex, its inverse, and their copies, as measured."""
        return 88 * n * n

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        found = super().solve(ask, start)
        # PRIMA takes losses that are not finite for 1e30, and so returns that where it saw no other
        return found._replace(loss=math.inf, reason=Reason.STALLED) if found.loss >= 1e30 else found


@dataclass(frozen=True)
class COBYQA(Minimize):
    """Ragonneau's COBYQA (2022): quadratic models in a trust region, always within bounds; the successor of COBYLA.

    Takes constraints, which it may break on its way.

    Usually the fewest evaluations of the methods without gradients, for smooth losses of up to some hundred weights.
    Each evaluation costs milliseconds of its own, more with more weights. Not for whole numbers: the loss's steps
    mislead its models.

    SciPy allows only one COBYQA at a time in a process. When several of ours are stepped in turn, the waiting ones are
    closed and run again from their recorded answers: each turn repeats the solver's own work (never an evaluation).
    A loss that itself calls `scipy.optimize.minimize(method="COBYQA")` would wait for ever.

    Args:
        maxfev, maxiter: evaluations, iterations; None = 500 n, 1000 n.
        initial_tr_radius: about a tenth of the greatest expected change of a weight.
        final_tr_radius: the accuracy wanted in the weights.
        f_target: stop at this loss.
        scale: scale weights by their bounds to [-1, 1] if all have finite ones.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import COBYQA
        >>> f = lambda x: float(((x - 3) ** 2).sum())
        >>> hybridopt.minimize(f, np.zeros(2), COBYQA(), budget=400).x.round(3).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.cobyqa"
    solver: ClassVar[str] = "COBYQA"
    uses: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS, Need.CONSTRAINTS})
    converged: ClassVar[frozenset[int]] = frozenset({0, 1, 2})  # smallest radius, f_target, all weights fixed
    isolation: ClassVar[Isolation] = (
        "exclusive"  # it holds `scipy.optimize._cobyqa_py.COBYQA_LOCK` to its end
    )

    maxfev: Count | None = None
    maxiter: Count | None = None
    initial_tr_radius: Positive = 1.0
    final_tr_radius: Positive = 1e-6
    f_target: float = -math.inf
    scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.initial_tr_radius >= self.final_tr_radius:
            raise MethodError(
                f"{self.name}: expected initial_tr_radius >= final_tr_radius, got {self.initial_tr_radius!r} and "
                f"{self.final_tr_radius!r}"
            )

    def memory(self, n: int) -> int:
        """Bytes of the interpolation system of 3n + 1 rows and its factors, as measured."""
        return 376 * n * n
