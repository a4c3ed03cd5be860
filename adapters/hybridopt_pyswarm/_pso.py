"""Particle swarm optimization (Kennedy & Eberhart 1995), `pyswarm.pso`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from hybridopt.carrier import Abandoned, Isolation
from hybridopt.errors import MethodError
from hybridopt.initial import read_points, with_points
from hybridopt.ledger import Reason
from hybridopt.optimizer import HandOver, Need, Optimizer
from hybridopt.options import check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start
from hybridopt.vector import ParameterVector

FloatArray: TypeAlias = npt.NDArray[np.float64]
_WORST = 1e299  # pyswarm takes 1e300 and above for infeasible, and prints when nothing else is left
_TINY = 1e-300
_PATIENCE = 200_000  # evaluations that pyswarm may still ask for while it is being closed (1 µs each)


@dataclass(frozen=True)
class PSO(BlockingMethod):
    """A swarm in a box, each particle drawn to its own best point and to the swarm's; takes inequality constraints.

    pyswarm draws the random numbers of all iterations at the start, so its path depends on `maxiter`, which
    therefore never follows from a budget. The default coefficients are those of constriction (Clerc & Kennedy 2002);
    pyswarm's own, 0.5 each, stall on curved valleys. Of particles that break constraints the loss is not asked.
    Weights that are `integer` are whole numbers to pyswarm too, unless they are `log` besides. The points of
    `initial`, then those handed over by a predecessor, take the places of the first particles.

    Args:
        swarmsize: particles; one generation is that many evaluations.
        omega: inertia.
        phip, phig: pull towards the particle's own and the swarm's best point.
        maxiter: generations after the first.
        minstep, minfunc: stop when the swarm's best moves, or improves, by less.
        patience: stop after this many generations without improvement; 0 = never.
        initial: where the first particles begin, shape (k, n), in the weights' own units and order.

    Raises:
        BoundsError: a weight has no finite bounds; an initial point lies outside them.
        MethodError: a constraint is an equality, which hardly any particle keeps; initial points of another number of
            weights, or more of them than particles.
        MemoryLimit: 16 * maxiter * swarmsize * n bytes of random numbers do not fit.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.adapters import PSO
        >>> f = lambda x: float((x**2).sum())
        >>> r = hybridopt.minimize(f, np.ones(2), PSO(), budget=2000, bounds=(-2, 2), seed=0)
        >>> r.best_loss < 1e-3
        True
        >>> known = ((0.1, 0.0), (0.0, 0.2))
        >>> hybridopt.minimize(f, np.ones(2), PSO(initial=known), budget=1, bounds=(-2, 2), seed=0).x.tolist()
        [0.1, 0.0]
    """

    name: ClassVar[str] = "pyswarm.pso"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})
    uses: ClassVar[frozenset[Need]] = frozenset({Need.CONSTRAINTS})
    takes: ClassVar[frozenset[str]] = frozenset({"points"})
    # f2py keeps the callback in a thread-local that points into the C stack: two swarms in one thread crash
    isolation: ClassVar[Isolation] = "thread"
    libraries: ClassVar[tuple[str, ...]] = ("pyswarm",)
    memory_advice: ClassVar[str] = "lower maxiter or swarmsize, or select fewer weights (select=...)"

    swarmsize: int = 100
    omega: float = 0.7298
    phip: float = 1.49618
    phig: float = 1.49618
    maxiter: int = 100
    minstep: float = 1e-8
    minfunc: float = 1e-8
    patience: int = 0
    initial: Any = ()

    def __post_init__(self) -> None:
        check_options(self)
        for option in ("swarmsize", "maxiter"):
            if not getattr(self, option) >= 1:
                raise MethodError(f"{self.name}: expected {option} >= 1, got {getattr(self, option)!r}")
        object.__setattr__(self, "initial", read_points(self.name, self.initial))
        if len(self.initial) > self.swarmsize:
            raise MethodError(
                f"{self.name}: expected at most swarmsize={self.swarmsize} initial points, got {len(self.initial)}"
            )

    def memory(self, n: int) -> int:
        """Bytes of the random numbers drawn up front."""
        return 16 * self.maxiter * self.swarmsize * n

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`."""
        return super().start(vector, seed, with_points(self.label, self.initial, vector, warm))

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        import pyswarm

        options: dict[str, Any] = {}
        lower, upper = start.lower, start.upper
        if start.integer is not None:
            # the outermost whole numbers have half a number of room beyond them, which pyswarm must not see
            whole = start.integer if start.log is None else start.integer & ~start.log
            lower, upper = np.where(whole, lower + 0.5, lower), np.where(whole, upper - 0.5, upper)
            options["intvar"] = np.flatnonzero(whole).tolist()
        if start.points is not None and len(start.points):
            options["init"] = self._swarm(start)
        keeps = self._inequalities(ask, start) if start.constrained else None
        r = pyswarm.pso(
            _Callback(ask, keeps, max(3 * self.swarmsize, _PATIENCE)),
            lower,
            upper,
            **options,
            swarmsize=self.swarmsize,
            omega=self.omega,
            phip=self.phip,
            phig=self.phig,
            maxiter=self.maxiter,
            minstep=self.minstep,
            minfunc=self.minfunc,
            patience=self.patience,
            seed=start.seed,
        )
        loss = float(r.fun)
        converged = r.nit < self.maxiter
        reason = Reason.CONVERGED if converged else Reason.STALLED
        return Ending(reason, r.message, math.inf if loss >= _WORST else loss, start.clip(np.asarray(r.x)))

    def _swarm(self, start: Start) -> FloatArray:
        """The first positions, shape (swarmsize, n): the known points, the rest drawn from the box."""
        assert start.points is not None
        random = np.random.default_rng(start.seed)
        swarm: FloatArray = random.uniform(start.lower, start.upper, (self.swarmsize, start.n))
        known = start.points[: self.swarmsize]
        swarm[: len(known)] = known
        return swarm

    def _inequalities(self, ask: Ask, start: Start) -> Callable[[FloatArray], bool]:
        """Whether a point keeps the constraints."""
        lower, upper, _ = ask.limits(start.x0)
        if (lower == upper).any():
            raise MethodError(
                f"{self.label}: expected inequality constraints alone, {int((lower == upper).sum())} are equalities, "
                "which hardly any point of a swarm keeps; use scipy.slsqp or scipy.trust_constr"
            )

        def keeps(x: FloatArray) -> bool:
            c = ask.constraints(start.clip(x))
            return bool(((lower <= c) & (c <= upper)).all())

        return keeps


class _Callback:
    """The loss as pyswarm calls it; when the run is closed it brings pyswarm to a quiet end.

    Constraints are kept here, not by pyswarm's `f_ieqcons`, on the same path: it prints where no particle keeps them.

    An exception through the Fortran code would print to stderr. Two improvements, the second one tiny, meet pyswarm's
    `minfunc` criterion within two generations instead. Where they cannot (`minfunc=0`, or a loss so far below 0 that
    rounding forbids a tiny improvement) pyswarm is left to run out on equal losses, and the exception ends it only if
    that would take too long.
    """

    def __init__(self, ask: Ask, keeps: Callable[[FloatArray], bool] | None, patience: int) -> None:
        self._ask = ask
        self._keeps = keeps
        self._best = math.inf
        self._patience = patience

    def __call__(self, x: npt.NDArray[np.float64]) -> float:
        try:
            broken = self._keeps is not None and not self._keeps(x)
            loss = _WORST if broken else min(self._ask.value(x), _WORST)
        except Abandoned:
            self._patience -= 1
            if self._patience < 0:
                raise
            # not the smallest number: a library built with fast maths takes that for 0
            loss = min(self._best, 0.0)
            loss = min(loss - _TINY, float(np.nextafter(loss, -math.inf)))
        self._best = min(self._best, loss)
        return loss
