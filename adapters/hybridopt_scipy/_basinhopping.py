"""Basin hopping (Wales and Doye 1997), `scipy.optimize.basinhopping`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from hybridopt.gradients import Derivative, GradientMode
from hybridopt.machine import require_memory
from hybridopt.optimizer import HandOver, Need, Optimizer
from hybridopt.options import Count, NonNegative, Positive, Range, Share, check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start
from hybridopt.vector import ParameterVector
from hybridopt_scipy._minimize import bfgs_memory, differentiated, ending, given, quiet


@dataclass(frozen=True)
class BasinHopping(BlockingMethod):
    """Global search by leaps: a random step, a local search, and the result accepted or not by its loss.

    For smooth losses with many minima of a funnel shape. The local search is SciPy's default: BFGS, within bounds
    L-BFGS-B. With `gradients="none"` on float64 weights it walks SciPy's own path bit for bit (rng=default_rng(seed)).

    Args:
        niter: leaps.
        T: temperature of the acceptance; about the difference in loss between neighbouring minima.
        stepsize: longest leap of a weight; about their distance. It is adapted to `target_accept_rate`:
        interval: after so many leaps each
        stepwise_factor: it is divided or multiplied by this.
        target_accept_rate: share of leaps to be accepted.
        niter_success: converged when the lowest loss has stayed the same for so many leaps; None = never.
        gradients: for the local search, see `hybridopt.gradients.Derivative`.

    Raises:
        MemoryLimit: without bounds, BFGS's matrices do not fit.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import BasinHopping
        >>> f = lambda x: float((x**2 - np.cos(9 * x)).sum())
        >>> round(hybridopt.minimize(f, np.ones(2), BasinHopping(), budget=900, seed=0).best_loss, 6)
        -2.0
    """

    name: ClassVar[str] = "scipy.basinhopping"
    uses: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENT, Need.BOUNDS})
    libraries: ClassVar[tuple[str, ...]] = ("scipy",)

    niter: Count = 100
    T: NonNegative = 1.0
    stepsize: Positive = 0.5
    interval: Count = 50
    stepwise_factor: Share = 0.9
    target_accept_rate: Share = 0.5
    niter_success: Annotated[int, Range(">= 0", lambda v: v >= 0)] | None = None
    gradients: GradientMode = "auto"

    def __post_init__(self) -> None:
        check_options(self)

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`."""
        if not vector.bounded:
            way_out = f"give bounds (L-BFGS-B needs no such matrices), or {self.memory_advice}"
            require_memory(bfgs_memory(vector.n), self.label, vector.n, way_out)
        return super().start(vector, seed, warm)

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        from scipy.optimize import basinhopping

        arguments = differentiated(
            Derivative(ask, start, self.gradients, finite_start=False, together=start.bounded), start
        )
        fun = arguments.pop("fun")
        if start.bounded:
            arguments["bounds"] = start.pairs()
        rng = np.random.default_rng(start.seed)
        with quiet():
            r = basinhopping(
                fun, start.x0.copy(), minimizer_kwargs=arguments, rng=rng, **given(self, "gradients")
            )
        return ending(start, r.success, r.message, r.fun, r.x)
