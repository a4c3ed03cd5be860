"""Every method of `scipy.optimize.minimize` by one mechanism: a class names its options, `Minimize` calls SciPy."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hybridopt.gradients import ConstraintQuantity, Derivative, GradientMode, Jacobian, narrow
from hybridopt.ledger import Reason
from hybridopt.options import Positive, check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start


def given(method: Any, *without: str) -> dict[str, Any]:
    """A method's options as SciPy takes them; None = SciPy's own default, left out."""
    options = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {name: value for name, value in options.items() if value is not None and name not in without}


def bfgs_memory(n: int) -> int:
    """Bytes that BFGS needs: the inverse Hessian, a unit matrix, and the temporaries of its update."""
    return 48 * n * n


# -- what all of SciPy's solvers have in common ------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without SciPy's warnings: what they say of a failed search, its status says too, and a replay would repeat it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"scipy\.|hybridopt_scipy\.")
        yield


def ending(start: Start, reached: bool, message: Any, loss: float | None, x: Any) -> Ending:
    """SciPy's result as ours: its point inside the bounds, and no convergence to a loss that is not finite."""
    loss = math.inf if loss is None else float(loss)
    text = "; ".join(map(str, message)) if isinstance(message, list) else str(message)
    reason = Reason.CONVERGED if reached and math.isfinite(loss) else Reason.STALLED
    return Ending(reason, text, loss, start.clip(start.x0 if x is None else np.asarray(x)))


def differentiated(d: Derivative, start: Start, eps: float | None = None) -> dict[str, Any]:
    """The arguments `fun`, `jac` and `options` of `scipy.optimize.minimize`.

    Left to itself on weights narrower than float64, SciPy would step by 1e-8, see no change, and report success at
    the start; it is told to take central differences with a step that fits them.
    """
    if not d.none:
        return {"fun": d.fun, "jac": d.jac, "options": {}}
    if eps is not None:
        return {"fun": d.fun, "options": {"eps": eps}}
    if narrow(start):
        step = float(np.cbrt(start.eps.max()))
        return {"fun": d.fun, "jac": "3-point", "options": {"finite_diff_rel_step": step}}
    return {"fun": d.fun, "options": {}}


# What trust-constr, whose algebra knows no inf, is told of a constraint function that is nan or inf: so far outside.
_FAR = 1e50


# -- constraints -------------------------------------------------------------------------------------------------


class Restrictions:
    """The constraints of a run in the forms in which SciPy takes them; none if there are none.

    Args:
        ask, start: as in `BlockingMethod.solve`.
        gradients: how their Jacobian is computed, for solvers that want one; "none" leaves it to SciPy.
    """

    def __init__(self, ask: Ask, start: Start, gradients: GradientMode = "none") -> None:
        empty = np.empty((3, 0))
        limits = ask.limits(start.clip(start.x0)) if start.constrained else empty
        self.lower, self.upper = limits[0], limits[1]
        self._linear = limits[2] == 1
        if gradients == "none" and narrow(start):  # SciPy's own step would change nothing in such weights
            gradients = "differences"
        self._c = Jacobian(ConstraintQuantity(ask), ask, start, gradients, finite_start=False)
        self._known: dict[bytes, npt.NDArray[np.float64]] = {}  # of the last points
        self._remembered = 4 * start.n + 10  # COBYQA asks again about those of its model, up to 2n + 1

    def __bool__(self) -> bool:
        return len(self.lower) > 0

    def values(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """All constraint functions at `x`, shape (k,); not asked again at one of the last points."""
        key = np.asarray(x, dtype=np.float64).tobytes()
        if key not in self._known:
            if len(self._known) >= self._remembered:
                del self._known[next(iter(self._known))]
            self._known[key] = self._c.fun(x)
        return self._known[key].copy()

    def dictionaries(self) -> list[dict[str, Any]]:
        """As SLSQP takes them: equalities = 0 and inequalities >= 0, each with its Jacobian."""
        equal = self.lower == self.upper
        low, high = (np.isfinite(side) & ~equal for side in (self.lower, self.upper))
        parts = {
            "eq": [(equal, self.lower, 1.0)],
            "ineq": [(low, self.lower, 1.0), (high, self.upper, -1.0)],
        }
        return [self._dictionary(kind, [row for row in rows if row[0].any()]) for kind, rows in parts.items()
                if any(chosen.any() for chosen, _, _ in rows)]  # fmt: skip

    def _dictionary(self, kind: str, rows: list[tuple[Any, Any, float]]) -> dict[str, Any]:
        def fun(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            c = self.values(x)
            return np.concatenate([sign * (c[chosen] - side[chosen]) for chosen, side, sign in rows])

        def jac(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            j = self._c.jac(x)
            return np.concatenate([sign * j[chosen] for chosen, _, sign in rows])

        return {"type": kind, "fun": fun} | ({} if self._c.mode == "none" else {"jac": jac})

    def objects(self, *, hessian: Any = None) -> list[Any]:
        """As the other methods take them, several numbers each.

        Args:
            hessian: makes what approximates second derivatives of those that are not linear.
        """
        from scipy.optimize import NonlinearConstraint

        found = []
        for chosen, straight in ((self._linear, True), (~self._linear, False)):
            if not chosen.any():
                continue
            # the others read no derivatives, but COBYQA would have SciPy take differences for nothing
            options: dict[str, Any] = {"jac": _no_slope(int(chosen.sum()))}
            if hessian is not None:
                options["hess"] = _no_curvature if straight else hessian()
                options["jac"] = self._rows_of_jacobian(chosen)
            fun = self._rows(chosen) if hessian is None else self._finite_rows(chosen)
            found.append(NonlinearConstraint(fun, self.lower[chosen], self.upper[chosen], **options))
        return found

    def _rows(self, chosen: npt.NDArray[np.bool_]) -> Callable[[Any], Any]:
        return lambda x: self.values(x)[chosen]

    def _finite_rows(self, chosen: npt.NDArray[np.bool_]) -> Callable[[Any], Any]:
        """As `_rows`, but far outside where they are nan or inf."""
        below = np.isfinite(self.lower)
        far = np.where(below, np.where(below, self.lower, 0.0) - _FAR, self.upper + _FAR)

        def fun(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            c = self.values(x)
            return np.where(np.isfinite(c), c, far)[chosen]

        return fun

    def _rows_of_jacobian(self, chosen: npt.NDArray[np.bool_]) -> Any:
        return "2-point" if self._c.mode == "none" else lambda x: self._c.jac(x)[chosen]


def _no_slope(k: int) -> Callable[[Any], Any]:
    return lambda x: np.zeros((k, len(x)))


def _no_curvature(x: npt.NDArray[np.float64], v: Any) -> npt.NDArray[np.float64]:
    return np.zeros((len(x), len(x)))


# -- scipy.optimize.minimize -------------------------------------------------------------------------------------


class Minimize(BlockingMethod):
    """A method of `scipy.optimize.minimize` that needs losses alone; a subclass is a dataclass of SciPy's options."""

    libraries: ClassVar[tuple[str, ...]] = ("scipy",)
    solver: ClassVar[str]
    """SciPy's name for it."""
    converged: ClassVar[frozenset[int]] = frozenset({0})
    """The status codes that mean convergence; the others are limits reached and failures, as the message says."""

    def __post_init__(self) -> None:
        check_options(self)

    def arguments(self, ask: Ask, start: Start) -> dict[str, Any]:
        """The arguments of `scipy.optimize.minimize`, but for method, bounds and constraints."""
        return {
            "fun": lambda x: ask.value(start.clip(x)),
            "x0": start.x0.copy(),
            "options": given(self),
        }

    def constraints(self, ask: Ask, start: Start) -> list[Any]:
        """The constraints as the method takes them."""
        return Restrictions(ask, start).objects()

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        from scipy.optimize import Bounds, minimize

        # only trust-constr heeds `keep_feasible`; the other methods that take bounds never leave them
        bounds = Bounds(start.lower, start.upper, keep_feasible=True) if start.bounded else None
        arguments = self.arguments(ask, start)
        if start.constrained:
            arguments["constraints"] = self.constraints(ask, start)
        with quiet():
            r = minimize(method=self.solver, bounds=bounds, **arguments)
        reached = r.get("status", 0) in self.converged and r.get("constr_violation", 0.0) < 0.5 * _FAR
        found = ending(start, reached, r.message, r.fun, r.x)
        if found.loss > ask.highest > -math.inf:  # a rejected point (`Derivative`, `finite`)
            return found._replace(reason=Reason.STALLED, loss=math.inf)
        return found


@dataclass(frozen=True, kw_only=True)
class GradientMinimize(Minimize):
    """A method of `scipy.optimize.minimize` that follows gradients."""

    together: ClassVar[bool] = False
    """See `Derivative`."""

    eps: Positive | None = None
    gradients: GradientMode = "auto"

    def arguments(self, ask: Ask, start: Start) -> dict[str, Any]:
        """See `Minimize.arguments`."""
        d = Derivative(ask, start, self.gradients, self.eps, together=self.together, finite=self.together)
        found = differentiated(d, start, self.eps)
        options = given(self, "eps", "gradients") | found["options"]
        return found | {"x0": start.x0.copy(), "options": options}
