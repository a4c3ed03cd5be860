"""Sequential least-squares programming (Kraft 1988), `scipy.optimize.minimize(method="SLSQP")`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hybridopt.errors import MethodError
from hybridopt.gradients import Derivative, GradientMode
from hybridopt.ledger import Reason
from hybridopt.optimizer import Need
from hybridopt.options import check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start

_CONVERGED = 0  # SLSQP's exit mode


@dataclass(frozen=True)
class SLSQP(BlockingMethod):
    """A quasi-Newton method for smooth losses of up to a few thousand weights; takes bounds.

    Without scale and with `gradients="none"`, or `"differences"` on float64 weights, it walks SciPy's own path bit
    for bit.

    Args:
        ftol: stop when the loss changes by less (absolute). SciPy's default 1e-6 is coarse for losses near 0.
        maxiter: iterations (not evaluations) of the solver.
        eps: absolute difference step; None = from the weights' dtype (float64: 1.49e-8, SciPy's default).
        gradients: see `hybridopt.gradients.Derivative`.

    Raises:
        MemoryLimit: its workspace of about 10.5 n² doubles does not fit.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.adapters import SLSQP
        >>> f = lambda x: float(((x - 3) ** 2).sum())
        >>> hybridopt.minimize(f, np.zeros(2), SLSQP(), budget=100).x.round(4).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.slsqp"
    uses: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENT, Need.BOUNDS})
    libraries: ClassVar[tuple[str, ...]] = ("scipy",)

    ftol: float = 1e-6
    maxiter: int = 100
    eps: float | None = None
    gradients: GradientMode = "auto"

    def __post_init__(self) -> None:
        check_options(self)
        if not self.maxiter >= 1:
            raise MethodError(f"{self.name}: expected maxiter >= 1, got {self.maxiter!r}")
        if not self.ftol > 0:
            raise MethodError(f"{self.name}: expected ftol > 0, got {self.ftol!r}")
        if self.eps is not None and not self.eps > 0:
            raise MethodError(f"{self.name}: expected eps > 0, got {self.eps!r}")

    def memory(self, n: int) -> int:
        """Bytes of SciPy's workspace: 8 (0.5 + 8 + 2) n² and lower terms."""
        return 84 * n * n

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        from scipy.optimize import minimize

        d = Derivative(ask, start, self.gradients, self.eps)
        options: dict[str, Any] = {"ftol": self.ftol, "maxiter": self.maxiter}
        if d.none and self.eps is not None:
            options["eps"] = self.eps
        bounds = start.pairs() if start.bounded else None
        jac = None if d.none else d.jac
        r = minimize(d.fun, start.x0, jac=jac, method="SLSQP", bounds=bounds, options=options)
        return Ending(_reason(r.status), r.message, float(r.fun), r.x)


def _reason(status: int) -> Reason:
    # the iteration limit and the failures (singular or incompatible subproblems, no descent) alike end the search
    # without convergence; the message says which
    return Reason.CONVERGED if status == _CONVERGED else Reason.STALLED
