"""Nonlinear least squares, `scipy.optimize.least_squares`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from hybridopt.carrier import Isolation
from hybridopt.errors import MethodError, NonFiniteLoss, StateError
from hybridopt.gradients import GradientMode, Jacobian, ResidualQuantity, narrow
from hybridopt.machine import require_memory
from hybridopt.optimizer import HandOver, Need, Optimizer
from hybridopt.options import Count, NonNegative, check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start
from hybridopt.vector import ParameterVector
from hybridopt_scipy._minimize import ending, given, quiet

_FAR = 1e150  # a residual that MINPACK, which knows no inf, backs away from


@dataclass(frozen=True)
class LeastSquares(BlockingMethod):
    """Gauss-Newton steps in a trust region, for losses that are sums of squares of up to some thousand weights.

    It sees every residual, not their sum alone, and so needs far fewer steps than methods that minimise the sum: the
    first choice for curve fitting. The loss must return the residuals (`residuals=True`). A Jacobian of m residuals
    costs m backwards, or n forwards by forward mode, whichever is cheaper. Robust losses are the objective's
    (`residuals="soft_l1"`): they are told as residuals of their own, so every method here can minimise them. (SciPy's
    `loss=` gives the same minimum on another path.)

    With `gradients="none"` on float64 weights it walks SciPy's own path bit for bit.

    Args:
        method: "lm" (Levenberg-Marquardt as in MINPACK, Moré 1978; no bounds, m >= n), "trf" (trust region reflective,
            Branch, Coleman and Li 1999; strictly inside its bounds) or "dogbox" (rectangular trust region); None = lm
            where it can, else trf.
        ftol: converged when a step lowers the loss by less (relative) ...
        xtol: ... or is shorter than this share of the weights ...
        gtol: ... or no component of the gradient is larger.
        x_scale: typical size of every weight, or "jac" (by the Jacobian's columns); None = 1, for lm "jac".
        tr_solver: of trf and dogbox, "exact" (singular values) or "lsmr" (for many weights; trf of one weight takes
            exact); None = exact.
        max_nfev: evaluations; None = 100 n.
        gradients: for the Jacobian, see `hybridopt.gradients.Derivative`.

    Raises:
        StateError: "lm" with bounds.
        MemoryLimit: its n × n matrices do not fit, or its m × n ones (known after the first evaluation).

    Example:
        >>> import torch, hybridopt
        >>> t = torch.linspace(0, 2, 20, dtype=torch.float64)
        >>> y = 3 * torch.exp(-1.5 * t)
        >>> fit = lambda x: x[0] * torch.exp(-x[1] * t) - y
        >>> x = torch.ones(2, dtype=torch.float64)
        >>> hybridopt.minimize(fit, x, "least_squares", budget=50, residuals=True).x.round(6).tolist()
        [3.0, 1.5]
    """

    name: ClassVar[str] = "scipy.least_squares"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.RESIDUALS})
    uses: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENT, Need.BOUNDS})
    # MINPACK keeps its callback in a variable that points into the C stack
    isolation: ClassVar[Isolation] = "thread"
    libraries: ClassVar[tuple[str, ...]] = ("scipy",)

    method: Literal["lm", "trf", "dogbox"] | None = None
    ftol: NonNegative = 1e-8
    xtol: NonNegative = 1e-8
    gtol: NonNegative = 1e-8
    x_scale: float | Literal["jac"] | None = None
    tr_solver: Literal["exact", "lsmr"] | None = None
    max_nfev: Count | None = None
    gradients: GradientMode = "auto"

    def __post_init__(self) -> None:
        check_options(self)
        eps = float(np.finfo(np.float64).eps)
        smallest, largest = (f((self.ftol, self.xtol, self.gtol)) for f in (min, max))
        if largest < eps or (self.method == "lm" and smallest < eps):
            raise MethodError(
                f"{self.name}: expected {'all' if self.method == 'lm' else 'one'} of ftol, xtol and gtol >= {eps:.2g}"
            )

    def memory(self, n: int) -> int:
        """Bytes of the normal matrix and its factors."""
        return 24 * n * n

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`."""
        if vector.bounded and self.method == "lm":
            raise StateError(f'{self.label}: method="lm" cannot keep within bounds; use "trf" or "dogbox"')
        return super().start(vector, seed, warm)

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        from scipy.optimize import least_squares

        quantity = Jacobian(ResidualQuantity(ask), ask, start, self.gradients)
        residuals = _Last(quantity.fun)
        m, n = len(first := residuals(start.x0)), start.n
        if not np.isfinite(first).all():
            raise NonFiniteLoss(
                "residuals: expected finite ones at the start point; change the initial weights"
            )
        # the Jacobian as it is computed, recorded, copied and factorised: 11 to 18 times its size, 8 by SciPy's own
        # differences
        copies = 8 if self.gradients == "none" else 12
        way_out = (
            f"its Jacobian has {m} rows: return fewer residuals, {self.memory_advice}, or use scipy.lbfgsb"
        )
        require_memory(8 * m * n * copies, self.label, n, way_out)
        method = self.method or ("lm" if not start.bounded and m >= n else "trf")
        if method == "lm" and m < n:
            raise MethodError(
                f'{self.label}: method="lm" expected at least as many residuals as weights, got {m} and {n}; use "trf"'
            )
        options = given(self, "method", "gradients")
        if n == 1 and method == "trf":  # it looks for lsmr's step in a plane, and one weight spans none
            options.pop("tr_solver", None)
        if quantity.mode != "none":
            options["jac"] = quantity.jac
        elif narrow(start):  # SciPy's own step would change nothing in weights narrower than float64
            options |= {"jac": "3-point", "diff_step": float(np.cbrt(start.eps.max()))}
        if start.bounded:
            options["bounds"] = (start.lower, start.upper)
        fun: Callable[[Any], Any] = residuals
        if method == "lm":

            def fun(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
                r = residuals(x)
                return np.where(np.isfinite(r), r, _FAR)

        with quiet():
            try:
                r = least_squares(fun, start.x0.copy(), method=method, **options)
            except ValueError as error:  # of SciPy's algebra, where its own differences met inf
                algebra = isinstance(error, np.linalg.LinAlgError) or "infs or NaNs" in str(error)
                if not algebra or quantity.mode != "none":
                    raise
                text = f"SciPy's differences: residuals that are not finite near the point ({error})"
                return ending(start, False, text, residuals.loss, residuals.best)
        return ending(start, r.status > 0, r.message, r.cost, r.x)


class _Last:
    """The residuals, not asked again at the point asked last: SciPy begins with the same point three times."""

    def __init__(self, ask: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> None:
        self._ask = ask
        self._x: npt.NDArray[np.float64] | None = None
        self._r: npt.NDArray[np.float64] = np.empty(0)
        self.best: npt.NDArray[np.float64] | None = None
        """Where the loss was lowest."""
        self.loss = np.inf

    def __call__(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self._x is None or not np.array_equal(self._x, x):
            self._r = self._ask(x)
            self._x = np.array(x)
            loss = 0.5 * float(self._r @ self._r)
            if loss < self.loss:
                self.best, self.loss = self._x, loss
        return self._r.copy()
