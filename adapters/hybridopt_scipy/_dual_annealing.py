"""Dual annealing (Xiang et al. 1997, generalised simulated annealing), `scipy.optimize.dual_annealing`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hybridopt.errors import MethodError
from hybridopt.gradients import Derivative, GradientMode
from hybridopt.ledger import Reason
from hybridopt.optimizer import Need
from hybridopt.options import check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start


@dataclass(frozen=True)
class DualAnnealing(BlockingMethod):
    """Global search in a box: annealing with heavy-tailed jumps, and L-BFGS-B from promising points.

    With `gradients="none"` it walks SciPy's own path bit for bit (rng=default_rng(seed), x0 = the start). SciPy
    enforces its `maxfun` only between local searches and is not used for limits: give a budget.

    Args:
        maxiter: global iterations of 2n annealing moves each.
        initial_temp: higher = wider jumps for longer, in (0.01, 5e4].
        restart_temp_ratio: re-anneal when the temperature falls below this share of the initial one, in (0, 1).
        visit: shape of the jump distribution, in (1, 3]; higher = heavier tails.
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

    maxiter: int = 1000
    initial_temp: float = 5230.0
    restart_temp_ratio: float = 2e-5
    visit: float = 2.62
    accept: float = -5.0
    local_search: bool = True
    gradients: GradientMode = "auto"

    def __post_init__(self) -> None:
        check_options(self)
        if not self.maxiter >= 1:
            raise MethodError(f"{self.name}: expected maxiter >= 1, got {self.maxiter!r}")
        for option, holds, range_ in (
            ("initial_temp", 0.01 < self.initial_temp <= 5e4, "in (0.01, 5e4]"),
            ("restart_temp_ratio", 0 < self.restart_temp_ratio < 1, "in (0, 1)"),
            ("visit", 1 < self.visit <= 3, "in (1, 3]"),
            ("accept", -1e4 < self.accept <= -5, "in (-1e4, -5]"),
        ):
            if not holds:
                raise MethodError(f"{self.name}: expected {option} {range_}, got {getattr(self, option)!r}")

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        from scipy.optimize import dual_annealing

        options: dict[str, Any] = {}
        if self.gradients != "none" and self.local_search:
            options["minimizer_kwargs"] = {"method": _local_search(ask, start, self.gradients)}
        r = dual_annealing(
            lambda x: ask.value(start.clip(x)),  # SciPy may step over an upper bound by 1e-10
            start.pairs(),
            maxiter=self.maxiter,
            initial_temp=self.initial_temp,
            restart_temp_ratio=self.restart_temp_ratio,
            visit=self.visit,
            accept=self.accept,
            maxfun=np.inf,
            rng=np.random.default_rng(start.seed),
            no_local_search=not self.local_search,
            x0=start.x0,
            **options,
        )
        message = "; ".join(map(str, r.message)) if isinstance(r.message, list) else str(r.message)
        return Ending(Reason.CONVERGED if r.status == 0 else Reason.STALLED, message, float(r.fun), r.x)


def _local_search(ask: Ask, start: Start, gradients: GradientMode) -> Any:
    """SciPy's own local search (its limits on iterations included), with gradients through `Derivative`."""
    from scipy.optimize import minimize

    d = Derivative(ask, start, gradients, finite_start=False)
    maxiter = min(max(6 * start.n, 100), 1000)  # scipy 1.17 LocalSearchWrapper

    def search(_: Any, x0: npt.NDArray[np.float64], **__: Any) -> Any:
        return minimize(
            d.fun, x0, jac=d.jac, method="L-BFGS-B", bounds=start.pairs(), options={"maxiter": maxiter}
        )

    return search
