"""Simplicial homology global optimization (Endres, Sandrock and Focke 2018), `scipy.optimize.shgo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hybridopt.gradients import Derivative, GradientMode, narrow
from hybridopt.optimizer import Need
from hybridopt.options import Count, NonNegative, check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start
from hybridopt_scipy._minimize import Restrictions, ending, given, quiet


@dataclass(frozen=True)
class SHGO(BlockingMethod):
    """Global search in a box: sample, see which samples lie lower than their neighbours, run SLSQP from each of them.

    Finds all minima of a smooth loss of a few weights, without randomness. It does not look at the start. Its
    simplicial sampling begins at the 2ⁿ corners of the box. The solver's own work grows faster still: ten
    weights are many.

    Args:
        n: samples a round; for simplicial, 100 (and None, if `iters` is None too) stands for 2ⁿ + 1.
        iters: rounds, unless one of the limits below is given.
        sampling_method: simplicial, halton or sobol (sobol: n is rounded up to a power of 2).
        maxfev, maxev, maxiter: end after the round in which so many evaluations, samples, or rounds are reached.
        f_min, f_tol: end at this loss, within this relative error.
        minhgrd: end when a round finds no more than this many new minima.
        symmetry: whether all weights may be exchanged for each other.
        minimize_every_iter: whether the local searches run in every round, or after the last.
        local_iter: only so many of the best samples are searched from; 0 = all.
        gradients: for the local searches, see `hybridopt.gradients.Derivative`; "none" on weights narrower than
            float64 is "differences", since SciPy's own cannot be told a step here.

    Raises:
        BoundsError: a weight has no finite bounds.
        MemoryLimit: the corners do not fit.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import SHGO
        >>> f = lambda x: float((x**2 - np.cos(9 * x)).sum())
        >>> r = hybridopt.minimize(f, np.ones(2), SHGO(sampling_method="sobol", n=64), budget=500, bounds=(-2, 1))
        >>> round(r.best_loss, 6)
        -2.0
    """

    name: ClassVar[str] = "scipy.shgo"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})
    uses: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENT, Need.CONSTRAINTS})
    libraries: ClassVar[tuple[str, ...]] = ("scipy",)
    memory_advice: ClassVar[str] = "use sampling_method=sobol, or select fewer weights (select=...)"

    n: Count | None = 100
    iters: Count | None = 1
    sampling_method: Literal["simplicial", "halton", "sobol"] = "simplicial"
    maxfev: Count | None = None
    maxev: Count | None = None
    maxiter: Count | None = None
    f_min: float | None = None
    f_tol: NonNegative = 1e-4
    minhgrd: int | None = None
    symmetry: bool = False
    minimize_every_iter: bool = True
    local_iter: int = 0
    gradients: GradientMode = "auto"

    def __post_init__(self) -> None:
        check_options(self)

    def memory(self, n: int) -> int:
        """Bytes of the corners of the box and what connects them, as measured (62 MB for n = 10)."""
        return 60 * 4 ** min(n, 30) if self.sampling_method == "simplicial" and self.n in (None, 100) else 0

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        from scipy.optimize import shgo

        mode: GradientMode = "differences" if self.gradients == "none" and narrow(start) else self.gradients
        d = Derivative(ask, start, mode, finite_start=False)
        local: dict[str, Any] = {"method": "SLSQP", "options": {"ftol": 1e-12}}  # SciPy's default
        if not d.none:
            local["jac"] = d.jac
        rules = Restrictions(ask, start, mode)
        top = ("n", "iters", "sampling_method")
        with quiet():
            r = shgo(
                d.fun,
                start.pairs(),
                minimizer_kwargs=local,
                constraints=rules.dictionaries() or None,
                options=given(self, "gradients", *top),
                **{name: getattr(self, name) for name in top},
            )
        return ending(start, r.success, r.message, r.fun, r.x)
