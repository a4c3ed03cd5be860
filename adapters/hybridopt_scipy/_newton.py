"""The methods of `scipy.optimize.minimize` that use second derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hybridopt.errors import MethodError
from hybridopt.gradients import Derivative
from hybridopt.optimizer import Need
from hybridopt.options import Count, NonNegative, Positive, Share
from hybridopt.solver import Ask, Start
from hybridopt_scipy._minimize import Minimize, given

FloatArray: TypeAlias = npt.NDArray[np.float64]
# Where the curvature along the first direction of a Krylov space (the gradient, or a unit vector when trlib begins
# anew) is no larger than this, trlib takes a step that it reads from memory which it has not written.
_FLAT = 2e-16


@dataclass(frozen=True, kw_only=True)
class NewtonMinimize(Minimize):
    """A method of `scipy.optimize.minimize` that uses the Hessian, or its products with vectors, by autograd."""

    uses: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENT, Need.HESSIAN})
    products: ClassVar[bool]
    """Whether it takes products (a forward and two backwards each), or the whole matrix (n products)."""

    gradients: Literal["auto", "autograd", "differences"] = "auto"

    def arguments(self, ask: Ask, start: Start) -> dict[str, Any]:
        """See `Minimize.arguments`."""
        d = Derivative(ask, start, self.gradients)

        def hess(x: FloatArray) -> FloatArray:
            d.check_hessian()
            return ask.hessian(x)

        def hessp(x: FloatArray, direction: FloatArray) -> FloatArray:
            d.check_hessian()
            return ask.hessian_vector(x, direction)

        second: dict[str, Any] = {"hessp": hessp} if self.products else {"hess": hess}
        options = given(self, "gradients")
        return {"fun": d.fun, "jac": d.jac, "x0": start.x0.copy(), "options": options, **second}


@dataclass(frozen=True)
class NewtonCG(NewtonMinimize):
    """Newton's method with inner conjugate gradients and a line search, for smooth losses of very many weights.

    Memory for a few vectors. Where the loss is not convex the trust-region methods below are safer.

    Args:
        xtol: converged when a step is shorter (mean absolute change of a weight).
        maxiter: iterations; None = 200 n.
        c1, c2: of the strong Wolfe conditions.
        gradients: of first derivatives, see `hybridopt.gradients.Derivative`; second ones always come from autograd.

    Raises:
        MissingGradient: autograd cannot differentiate the loss twice.

    Example:
        >>> import torch, hybridopt
        >>> f = lambda x: ((x - 3) ** 2).sum()
        >>> hybridopt.minimize(f, torch.zeros(2), "newton_cg", budget=100).x.round(4).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.newton_cg"
    solver: ClassVar[str] = "Newton-CG"
    products: ClassVar[bool] = True

    xtol: NonNegative = 1e-5
    maxiter: Count | None = None
    c1: Share = 1e-4
    c2: Share = 0.9


@dataclass(frozen=True, kw_only=True)
class TrustRegion(NewtonMinimize):
    """Newton steps in a trust region; SciPy's options that all such methods share."""

    initial_trust_radius: Positive = 1.0
    max_trust_radius: Positive = 1000.0
    eta: NonNegative = 0.15
    gtol: Positive = 1e-4  # with 0, SciPy's would go on from a gradient of 0, and divide by it
    maxiter: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eta < 0.25:
            raise MethodError(f"{self.name}: expected eta in [0, 0.25), got {self.eta!r}")
        if not self.initial_trust_radius < self.max_trust_radius:
            raise MethodError(
                f"{self.name}: expected initial_trust_radius < max_trust_radius, got {self.initial_trust_radius!r} and "
                f"{self.max_trust_radius!r}"
            )


@dataclass(frozen=True)
class TrustNCG(TrustRegion):
    """Newton conjugate gradients in a trust region (Steihaug 1983), for smooth losses of very many weights.

    Args:
        initial_trust_radius, max_trust_radius: longest first step, longest step at all.
        eta: a step is taken if it lowers the loss by more than this share of what was predicted.
        gtol: converged when the gradient's norm is below this.
        maxiter: iterations; None = 200 n.
        gradients: see `NewtonCG`.

    Raises:
        MissingGradient: autograd cannot differentiate the loss twice.

    Example:
        >>> import torch, hybridopt
        >>> f = lambda x: ((x - 3) ** 2).sum()
        >>> hybridopt.minimize(f, torch.zeros(2), "trust_ncg", budget=100).x.round(4).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.trust_ncg"
    solver: ClassVar[str] = "trust-ncg"
    products: ClassVar[bool] = True


@dataclass(frozen=True)
class TrustKrylov(TrustRegion):
    """As `TrustNCG`, with the steps of GLTR (Gould et al. 1999), better on losses that are not convex.

    Args:
        initial_trust_radius, max_trust_radius: longest first step, longest step at all.
        eta: a step is taken if it lowers the loss by more than this share of what was predicted.
        gtol: converged when the gradient's norm is below this.
        maxiter: iterations; None = 200 n.
        gradients: see `NewtonCG`.
        inexact: whether steps are solved only as exactly as the gradient is small.

    Raises:
        MissingGradient: autograd cannot differentiate the loss twice.

    Example:
        >>> import torch, hybridopt
        >>> f = lambda x: ((x - 3) ** 2).sum()
        >>> hybridopt.minimize(f, torch.zeros(2), "trust_krylov", budget=100).x.round(4).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.trust_krylov"
    solver: ClassVar[str] = "trust-krylov"
    products: ClassVar[bool] = True

    inexact: bool = True

    def arguments(self, ask: Ask, start: Start) -> dict[str, Any]:
        """See `Minimize.arguments`."""
        found = super().arguments(ask, start)
        jac, hessp = found["jac"], found["hessp"]
        gradient: FloatArray = np.empty(0)

        def remembered(x: FloatArray) -> FloatArray:
            nonlocal gradient
            gradient = jac(x)
            return gradient.copy()

        def curved(x: FloatArray, direction: FloatArray) -> FloatArray:
            product: FloatArray = hessp(x, direction)
            square = float(direction @ direction)
            begins = np.array_equal(direction, -gradient) or abs(square - 1) < 1e-9
            if begins and abs(direction @ product) <= _FLAT:
                least = max(2 * _FLAT / square, 1e-8 * float(np.linalg.norm(product)) / math.sqrt(square))
                product = product + least * direction
            return product

        return found | {"jac": remembered, "hessp": curved}


@dataclass(frozen=True)
class TrustExact(TrustRegion):
    """Newton steps by factorising the Hessian (Conn, Gould and Toint 2000), for up to some hundred weights.

    The fewest iterations of all, convex or not; each costs a whole Hessian, and 8 n² bytes of the record from which
    a run can go on.

    Args:
        initial_trust_radius, max_trust_radius: longest first step, longest step at all.
        eta: a step is taken if it lowers the loss by more than this share of what was predicted.
        gtol: converged when the gradient's norm is below this.
        maxiter: iterations; None = 200 n.
        gradients: see `NewtonCG`.
        subproblem_maxiter: factorisations a step; None = as many as it takes.

    Raises:
        MissingGradient: autograd cannot differentiate the loss twice.
        MemoryLimit: its n × n matrices do not fit.

    Example:
        >>> import torch, hybridopt
        >>> f = lambda x: ((x - 3) ** 2).sum()
        >>> hybridopt.minimize(f, torch.zeros(2), "trust_exact", budget=100).x.round(4).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.trust_exact"
    solver: ClassVar[str] = "trust-exact"
    products: ClassVar[bool] = False

    subproblem_maxiter: Count | None = None

    def memory(self, n: int) -> int:
        """Bytes of the Hessian as it is computed, and of the solver's, its factor and copies."""
        return 80 * n * n


@dataclass(frozen=True)
class Dogleg(TrustRegion):
    """Powell's dogleg (1970), between steepest descent and Newton's step, for convex losses of some hundred weights.

    It ends where the Hessian is not positive definite; `TrustExact` does not.

    Args:
        initial_trust_radius, max_trust_radius: longest first step, longest step at all.
        eta: a step is taken if it lowers the loss by more than this share of what was predicted.
        gtol: converged when the gradient's norm is below this.
        maxiter: iterations; None = 200 n.
        gradients: see `NewtonCG`.

    Raises:
        MissingGradient: autograd cannot differentiate the loss twice.
        MemoryLimit: its n × n matrices do not fit.

    Example:
        >>> import torch, hybridopt
        >>> f = lambda x: ((x - 3) ** 2).sum()
        >>> hybridopt.minimize(f, torch.zeros(2), "dogleg", budget=100).x.round(4).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.dogleg"
    solver: ClassVar[str] = "dogleg"
    products: ClassVar[bool] = False

    def memory(self, n: int) -> int:
        """Bytes of the Hessian as it is computed, and of the solver's, its factor and copies."""
        return 64 * n * n
