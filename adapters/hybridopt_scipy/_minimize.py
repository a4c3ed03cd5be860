"""Every method of `scipy.optimize.minimize` by one mechanism: a class names its options, `Minimize` calls SciPy."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np

from hybridopt.errors import MethodError
from hybridopt.gradients import Derivative, GradientMode, narrow
from hybridopt.ledger import Reason
from hybridopt.options import check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start

# -- options -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """What values an option may have, beside its type."""

    words: str
    holds: Callable[[float], bool]


Count: TypeAlias = Annotated[int, Range(">= 1", lambda v: v >= 1)]
Positive: TypeAlias = Annotated[float, Range("> 0", lambda v: v > 0)]
NonNegative: TypeAlias = Annotated[float, Range(">= 0", lambda v: v >= 0)]
Share: TypeAlias = Annotated[float, Range("in (0, 1)", lambda v: 0 < v < 1)]
Fraction: TypeAlias = Annotated[float, Range("in [0, 1]", lambda v: 0 <= v <= 1)]


def check(method: Any) -> None:
    """Compare a method's options with the types and ranges that its class declares; None always fits its range.

    Raises:
        MethodError: says which option, what was expected, and what came.
    """
    check_options(method)
    hints = typing.get_type_hints(type(method), include_extras=True)
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        for range_ in _ranges(hints[field.name]):
            if value is not None and not range_.holds(value):
                raise MethodError(f"{method.name}: expected {field.name} {range_.words}, got {value!r}")


def _ranges(hint: Any) -> list[Range]:
    """The ranges in `Annotated[...]`, also inside a union."""
    if typing.get_origin(hint) is Annotated:
        return [part for part in hint.__metadata__ if isinstance(part, Range)]
    return [found for part in typing.get_args(hint) for found in _ranges(part)]


def given(method: Any, *without: str) -> dict[str, Any]:
    """A method's options as SciPy takes them; None = SciPy's own default, left out."""
    options = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {name: value for name, value in options.items() if value is not None and name not in without}


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


# -- scipy.optimize.minimize -------------------------------------------------------------------------------------


class Minimize(BlockingMethod):
    """A method of `scipy.optimize.minimize` that needs losses alone; a subclass is a dataclass of SciPy's options."""

    libraries: ClassVar[tuple[str, ...]] = ("scipy",)
    solver: ClassVar[str]
    """SciPy's name for it."""
    converged: ClassVar[frozenset[int]] = frozenset({0})
    """The status codes that mean convergence; the others are limits reached and failures, as the message says."""

    def __post_init__(self) -> None:
        check(self)

    def arguments(self, ask: Ask, start: Start) -> dict[str, Any]:
        """The arguments of `scipy.optimize.minimize`, but for method and bounds."""
        return {
            "fun": lambda x: ask.value(start.clip(x)),
            "x0": start.x0.copy(),
            "options": given(self),
        }

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        from scipy.optimize import Bounds, minimize

        # only trust-constr heeds `keep_feasible`; the other methods that take bounds never leave them
        bounds = Bounds(start.lower, start.upper, keep_feasible=True) if start.bounded else None
        with quiet():
            r = minimize(method=self.solver, bounds=bounds, **self.arguments(ask, start))
        return ending(start, r.get("status", 0) in self.converged, r.message, r.fun, r.x)


@dataclass(frozen=True, kw_only=True)
class GradientMinimize(Minimize):
    """A method of `scipy.optimize.minimize` that follows gradients."""

    eps: Positive | None = None
    gradients: GradientMode = "auto"

    def arguments(self, ask: Ask, start: Start) -> dict[str, Any]:
        """See `Minimize.arguments`."""
        d = Derivative(ask, start, self.gradients, self.eps)
        found = differentiated(d, start, self.eps)
        options = given(self, "eps", "gradients") | found["options"]
        return found | {"x0": start.x0.copy(), "options": options}
