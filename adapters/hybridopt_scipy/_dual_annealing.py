"""Dual annealing (Xiang et al. 1997, generalised simulated annealing), `scipy.optimize.dual_annealing`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt

from hybridopt.gradients import Derivative, GradientMode, narrow
from hybridopt.optimizer import Need
from hybridopt.options import Count, Range, Share, check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start
from hybridopt_scipy._minimize import differentiated, ending, given, quiet


@dataclass(frozen=True)
class DualAnnealing(BlockingMethod):
    """Global search in a box: annealing with heavy-tailed jumps, and L-BFGS-B from promising points.

    With `gradients="none"` it walks SciPy's own path bit for bit (rng=default_rng(seed), x0 = the start). SciPy
    enforces its `maxfun` only between local searches and is not used for limits: give a budget.

    Args:
        maxiter: global iterations of 2n annealing moves each.
        initial_temp: higher = wider jumps for longer, in (0.01, 5e4].
        restart_temp_ratio: re-anneal when the temperature falls below this share of the initial one, in (0, 1).
        visit: shape of the jump distribution, in [1.01, 2.99]; higher = heavier tails. (SciPy takes (1, 3], but its
            jumps are nan near the ends.)
        accept: acceptance parameter, in (-1e4, -5]; lower = fewer uphill moves.
        local_search: whether to run L-BFGS-B at all.
        gradients: for the local search, see `hybridopt.gradients.Derivative`.

    Raises:
        BoundsError: a weight has no finite bounds.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.adapters import DualAnnealing
        >>> f = lambda x: float((x**2 - np.cos(9 * x)).sum())
        >>> r = hybridopt.minimize(f, np.ones(2), DualAnnealing(), budget=500, bounds=(-2, 2), seed=0)
        >>> round(r.best_loss, 6)
        -2.0
    """

    name: ClassVar[str] = "scipy.dual_annealing"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})
    uses: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENT})
    libraries: ClassVar[tuple[str, ...]] = ("scipy",)

    maxiter: Count = 1000
    initial_temp: Annotated[float, Range("in (0.01, 5e4]", lambda v: 0.01 < v <= 5e4)] = 5230.0
    restart_temp_ratio: Share = 2e-5
    visit: Annotated[float, Range("in [1.01, 2.99]", lambda v: 1.01 <= v <= 2.99)] = 2.62
    accept: Annotated[float, Range("in (-1e4, -5]", lambda v: -1e4 < v <= -5)] = -5.0
    local_search: bool = True
    gradients: GradientMode = "auto"

    def __post_init__(self) -> None:
        check_options(self)

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        from scipy.optimize import dual_annealing

        options = {**given(self, "local_search", "gradients"), "no_local_search": not self.local_search}
        if self.local_search and (self.gradients != "none" or narrow(start)):
            options["minimizer_kwargs"] = {"method": _local_search(ask, start, self.gradients)}
        with quiet():
            r = dual_annealing(
                lambda x: ask.value(start.clip(x)),  # SciPy may step over an upper bound by 1e-10
                start.pairs(),
                maxfun=np.inf,
                rng=np.random.default_rng(start.seed),
                x0=start.x0.copy(),
                **options,
            )
        return ending(start, r.status == 0, r.message, r.fun, r.x)


def _local_search(ask: Ask, start: Start, gradients: GradientMode) -> Any:
    """SciPy's own local search (its limits on iterations included), with gradients that fit the weights."""
    from scipy.optimize import minimize

    arguments = differentiated(Derivative(ask, start, gradients, finite_start=False, together=True), start)
    arguments["options"]["maxiter"] = min(max(6 * start.n, 100), 1000)  # scipy 1.17 LocalSearchWrapper

    def search(_: Any, x0: npt.NDArray[np.float64], **__: Any) -> Any:
        return minimize(x0=x0, method="L-BFGS-B", bounds=start.pairs(), **arguments)

    return search
