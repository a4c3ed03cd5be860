"""Dividing rectangles (Jones, Perttunen and Stuckman 1993; Gablonsky and Kelley 2001), `scipy.optimize.direct`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from hybridopt.optimizer import Need
from hybridopt.options import Count, Fraction, NonNegative, check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start
from hybridopt_scipy._minimize import ending, given, quiet


@dataclass(frozen=True)
class DIRECT(BlockingMethod):
    """Global search in a box that divides promising boxes into thirds, for up to some ten weights; not random.

    It does not look at the start: it begins at the middle of the box.

    Args:
        eps: least improvement that makes a box promising, relative to the lowest loss; higher = more global.
        maxfun: evaluations; None = 1000 n. Memory for all of them is taken at the beginning.
        maxiter: iterations.
        locally_biased: Gablonsky and Kelley's variant, for losses with few minima; False = the original.
        f_min, f_min_rtol: converged at this loss, within this relative error.
        vol_tol: converged when the best box has less than this share of the volume.
        len_tol: converged when its diagonal (locally biased: longest side) is shorter than this share.

    Raises:
        BoundsError: a weight has no finite bounds.
        MemoryLimit: the boxes do not fit.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import DIRECT
        >>> f = lambda x: float((x**2 - np.cos(9 * x)).sum())
        >>> round(hybridopt.minimize(f, np.ones(2), DIRECT(), budget=500, bounds=(-2, 1)).best_loss, 4)
        -2.0
    """

    name: ClassVar[str] = "scipy.direct"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})
    libraries: ClassVar[tuple[str, ...]] = ("scipy",)
    memory_advice: ClassVar[str] = "give a smaller maxfun, or select fewer weights (select=...)"

    eps: NonNegative = 1e-4
    maxfun: Count | None = None
    maxiter: Count = 1000
    locally_biased: bool = True
    f_min: float = -math.inf
    f_min_rtol: Fraction = 1e-4
    vol_tol: Fraction = 1e-16
    len_tol: Fraction = 1e-6

    def __post_init__(self) -> None:
        check_options(self)

    def memory(self, n: int) -> int:
        """Bytes of the centres and sides of all boxes."""
        return 16 * n * (self.maxfun or 1000 * n)

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        from scipy.optimize import direct

        with quiet():
            r = direct(lambda x: ask.value(start.clip(x)), start.pairs(), **given(self))
        return ending(start, r.status in (3, 4, 5), r.message, r.fun, r.x)  # f_min, vol_tol, len_tol
