"""The methods of `scipy.optimize.minimize` that follow gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from hybridopt.errors import MethodError
from hybridopt.gradients import narrow
from hybridopt.optimizer import Need
from hybridopt.options import Count, NonNegative, Positive, Share
from hybridopt.solver import Ask, Start
from hybridopt_scipy._minimize import GradientMinimize, Restrictions, bfgs_memory

_FREE: frozenset[Need] = frozenset({Need.GRADIENT})
_BOUNDED: frozenset[Need] = frozenset({Need.GRADIENT, Need.BOUNDS})
_CONSTRAINED = _BOUNDED | {Need.CONSTRAINTS}


@dataclass(frozen=True)
class CG(GradientMinimize):
    """Nonlinear conjugate gradients (Polak and Ribière 1969, restarted), for smooth losses of very many weights.

    Needs a few vectors of memory only; L-BFGS-B usually takes fewer evaluations.

    Args:
        gtol: converged when the gradient's norm is below this.
        norm: its order; inf = the largest component.
        maxiter: iterations; None = 200 n.
        c1, c2: of the strong Wolfe conditions.
        eps: absolute difference step; None = from the weights' dtype (float64: 1.49e-8, SciPy's default).
        gradients: see `hybridopt.gradients.Derivative`.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import CG
        >>> f = lambda x: float(((x - 3) ** 2).sum())
        >>> hybridopt.minimize(f, np.zeros(2), CG(), budget=100).x.round(4).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.cg"
    solver: ClassVar[str] = "CG"
    uses: ClassVar[frozenset[Need]] = _FREE

    gtol: NonNegative = 1e-5
    norm: float = math.inf
    maxiter: Count | None = None
    c1: Share = 1e-4
    c2: Share = 0.4


@dataclass(frozen=True)
class BFGS(GradientMinimize):
    """The quasi-Newton method of Broyden, Fletcher, Goldfarb and Shanno (1970), for up to some thousand weights.

    Args:
        gtol: converged when the gradient's norm is below this.
        norm: its order; inf = the largest component.
        maxiter: iterations; None = 200 n.
        xrtol: converged when a step is shorter than this share of the weights' norm.
        c1, c2: of the strong Wolfe conditions.
        eps: absolute difference step; None = from the weights' dtype (float64: 1.49e-8, SciPy's default).
        gradients: see `hybridopt.gradients.Derivative`.

    Raises:
        MemoryLimit: its n × n matrices do not fit.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import BFGS
        >>> f = lambda x: float(((x - 3) ** 2).sum())
        >>> hybridopt.minimize(f, np.zeros(2), BFGS(), budget=100).x.round(4).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.bfgs"
    solver: ClassVar[str] = "BFGS"
    uses: ClassVar[frozenset[Need]] = _FREE

    gtol: NonNegative = 1e-5
    norm: float = math.inf
    maxiter: Count | None = None
    xrtol: NonNegative = 0.0
    c1: Share = 1e-4
    c2: Share = 0.9

    def memory(self, n: int) -> int:
        """See `bfgs_memory`."""
        return bfgs_memory(n)


@dataclass(frozen=True)
class LBFGSB(GradientMinimize):
    """Limited-memory BFGS with bounds (Byrd, Lu, Nocedal and Zhu 1995), for smooth losses of any number of weights.

    Args:
        maxcor: how many past steps its model remembers.
        ftol: converged when an iteration lowers the loss by less, relative to max(|loss|, 1).
        gtol: converged when no component of the projected gradient is larger.
        maxfun, maxiter: evaluations (checked after an iteration), iterations.
        maxls: trials of a line search.
        eps: absolute difference step; None = from the weights' dtype (float64: 1.49e-8; SciPy's own, with
            `gradients="none"`, is 1e-8).
        gradients: see `hybridopt.gradients.Derivative`.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import LBFGSB
        >>> f = lambda x: float(((x - 3) ** 2).sum())
        >>> hybridopt.minimize(f, np.zeros(2), LBFGSB(), budget=100, bounds=(-5, 2)).x.round(4).tolist()
        [2.0, 2.0]
    """

    name: ClassVar[str] = "scipy.lbfgsb"
    solver: ClassVar[str] = "L-BFGS-B"
    together: ClassVar[bool] = True
    uses: ClassVar[frozenset[Need]] = _BOUNDED

    maxcor: Count = 10
    ftol: NonNegative = 2.2204460492503131e-09
    gtol: NonNegative = 1e-5
    maxfun: Count = 15000
    maxiter: Count = 15000
    maxls: Count = 20


@dataclass(frozen=True)
class TNC(GradientMinimize):
    """Truncated Newton with bounds (Nash 1984): inner conjugate gradients on differences of gradients.

    For smooth losses of many weights; asks more gradients than L-BFGS-B, and fewer outer iterations. Negative (or 0)
    options are chosen by the solver.

    Args:
        maxfun: evaluations; None = max(100, 10 n).
        ftol, xtol, gtol: converged at this precision of loss, weights, or projected gradient.
        maxCGit: inner steps an iteration.
        eta: severity of the line search.
        stepmx: longest step of a line search.
        accuracy: relative step of the differences of gradients; 0 = sqrt(machine epsilon) of the weights' dtype.
        minfev: an estimate of the lowest loss.
        rescale: scaling factor (log10) at which the loss is rescaled.
        eps: absolute difference step; None = from the weights' dtype (float64: 1.49e-8; SciPy's own, with
            `gradients="none"`, is 1e-8).
        gradients: see `hybridopt.gradients.Derivative`.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import TNC
        >>> f = lambda x: float(((x - 3) ** 2).sum())
        >>> hybridopt.minimize(f, np.zeros(2), TNC(), budget=200).x.round(4).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.tnc"
    solver: ClassVar[str] = "TNC"
    together: ClassVar[bool] = True
    uses: ClassVar[frozenset[Need]] = _BOUNDED
    converged: ClassVar[frozenset[int]] = frozenset({0, 1, 2})  # by gradient, loss, weights

    maxfun: Count | None = None
    ftol: float = -1.0
    xtol: float = -1.0
    gtol: float = -1.0
    maxCGit: int = -1  # noqa: N815 - SciPy's name
    eta: float = -1.0
    stepmx: float = 0.0
    accuracy: float = 0.0
    minfev: float = 0.0
    rescale: float = -1.0

    def arguments(self, ask: Ask, start: Start) -> dict[str, Any]:
        """See `Minimize.arguments`."""
        found = super().arguments(ask, start)
        if self.accuracy <= 0 and narrow(start):
            found["options"]["accuracy"] = float(np.sqrt(start.eps.max()))
        return found


@dataclass(frozen=True)
class SLSQP(GradientMinimize):
    """Sequential least-squares programming (Kraft 1988), quasi-Newton, for up to a few thousand weights.

    Takes bounds and constraints; the first choice for smooth constraints, which it may break on its way.

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
    solver: ClassVar[str] = "SLSQP"
    uses: ClassVar[frozenset[Need]] = _CONSTRAINED

    ftol: Positive = 1e-6
    maxiter: Count = 100

    def memory(self, n: int) -> int:
        """Bytes of SciPy's workspace: 8 (0.5 + 8 + 2) n² and lower terms."""
        return 84 * n * n

    def constraints(self, ask: Ask, start: Start) -> list[Any]:
        """See `Minimize.constraints`."""
        return Restrictions(ask, start, self.gradients).dictionaries()


@dataclass(frozen=True)
class TrustConstr(GradientMinimize):
    """A trust-region interior point method (Byrd, Hribar and Nocedal 1999); takes bounds and constraints.

    Bounds are barriers: it comes from the inside and never touches them. A start at a bound, which SciPy would take
    for converged, is moved inside by at most 1 % (Wächter and Biegler 2006, section 3.6). It asks a gradient at every
    point, and its own work is large (milliseconds an iteration); L-BFGS-B or SLSQP are usually better for bounds
    alone.

    Args:
        xtol: converged when the trust region is smaller.
        gtol: converged when no component of the gradient (of the Lagrangian) is larger.
        barrier_tol: with bounds, converged by `xtol` only below this barrier parameter.
        maxiter: iterations.
        hess: the update of the Hessian, "bfgs" or "sr1", or "autograd" for its own products with vectors (a forward
            and two backwards each). Constraints that are not linear have an update of theirs, BFGS with "autograd".
        initial_tr_radius: of the trust region.
        initial_constr_penalty, initial_barrier_parameter, initial_barrier_tolerance: with bounds, first values.
        eps: absolute difference step, for `gradients="differences"` alone; None = from the weights' dtype. (SciPy's
            own step, with `gradients="none"`, is relative to the weights.)
        gradients: see `hybridopt.gradients.Derivative`.

    Raises:
        MemoryLimit: its n × n matrices do not fit.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import TrustConstr
        >>> f = lambda x: float(((x - 3) ** 2).sum())
        >>> hybridopt.minimize(f, np.zeros(2), TrustConstr(), budget=200).x.round(4).tolist()
        [3.0, 3.0]
    """

    name: ClassVar[str] = "scipy.trust_constr"
    solver: ClassVar[str] = "trust-constr"
    uses: ClassVar[frozenset[Need]] = _CONSTRAINED | {Need.HESSIAN}
    converged: ClassVar[frozenset[int]] = frozenset({1, 2})  # by gradient, trust region

    xtol: NonNegative = 1e-8
    gtol: NonNegative = 1e-8
    barrier_tol: NonNegative = 1e-8
    maxiter: Count = 1000
    hess: Literal["bfgs", "sr1", "autograd"] = "bfgs"
    initial_tr_radius: Positive = 1.0
    initial_constr_penalty: Positive = 1.0
    initial_barrier_parameter: Positive = 0.1
    initial_barrier_tolerance: Positive = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps is not None and self.gradients == "none":
            raise MethodError(
                f"{self.name}: expected no eps with gradients='none', got {self.eps!r}; SciPy's own step is relative "
                "to the weights, gradients='differences' takes an absolute one"
            )

    def memory(self, n: int) -> int:
        """Bytes of the Hessian, a copy, and with bounds the matrices of its barrier."""
        return 20 * n * n

    def arguments(self, ask: Ask, start: Start) -> dict[str, Any]:
        """See `Minimize.arguments`."""
        found = super().arguments(ask, start)
        del found["options"]["hess"]
        hess = {"hessp": ask.hessian_vector} if self.hess == "autograd" else {"hess": self._update()}
        return found | {"x0": _inside(start)} | hess

    def constraints(self, ask: Ask, start: Start) -> list[Any]:
        """See `Minimize.constraints`."""
        return Restrictions(ask, start, self.gradients).objects(hessian=self._update)

    def _update(self) -> Any:
        from scipy import optimize

        return optimize.SR1() if self.hess == "sr1" else optimize.BFGS()


def _inside(start: Start) -> npt.NDArray[np.float64]:
    """The start, at least 1 % of the room, or of max(1, |bound|), away from every bound."""
    room = start.upper - start.lower
    low, high = (
        np.where(np.isfinite(bound), 0.01 * np.minimum(np.maximum(1.0, np.abs(bound)), room), 0.0)
        for bound in (start.lower, start.upper)
    )
    return np.asarray(np.clip(start.x0, start.lower + low, start.upper - high))
