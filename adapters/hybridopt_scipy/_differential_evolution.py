"""Differential evolution (Storn and Price 1997), `scipy.optimize.differential_evolution`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from hybridopt.errors import MethodError
from hybridopt.gradients import Derivative, GradientMode
from hybridopt.optimizer import Need
from hybridopt.options import Count, Fraction, NonNegative, check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start
from hybridopt_scipy._minimize import Restrictions, differentiated, ending, given, quiet

Strategy = Literal[
    "best1bin", "best1exp", "rand1bin", "rand1exp", "rand2bin", "rand2exp", "randtobest1bin", "randtobest1exp",
    "currenttobest1bin", "currenttobest1exp", "best2bin", "best2exp",
]  # fmt: skip


@dataclass(frozen=True)
class DifferentialEvolution(BlockingMethod):
    """Global search in a box by a population whose members move along each other's differences.

    Robust on rough losses of up to some tens of weights. With `updating="deferred"` a generation is one question
    (one batched forward where the loss can be batched); "immediate", SciPy's default, asks member by member and often
    needs fewer of them. With `gradients="none"` on float64 weights it walks SciPy's own path bit for bit
    (rng=default_rng(seed), x0 = the start). Of members that break constraints the loss is not asked: each costs a
    forward a constraint function but no evaluation, so with constraints a budget of evaluations may last very long (to
    `maxiter` where nothing keeps them); give one in forward-equivalents (`"2000fe"`).

    Args:
        strategy: which differences are added to whom, in SciPy's words.
        maxiter: generations.
        popsize: members per weight (at least 5 in all).
        tol, atol: converged when the losses' standard deviation is at most atol + tol × |their mean|.
        mutation: factor of the differences in [0, 2), or a (low, high) pair to draw it from in every generation.
        recombination: share of the weights that are changed.
        polish: whether L-BFGS-B (SLSQP if there are constraints) goes on from the best member at the end.
        init: how the first population is spread.
        updating: when better members replace their parents: at once, or after the generation.
        gradients: for the polishing, see `hybridopt.gradients.Derivative`.

    Raises:
        BoundsError: a weight has no finite bounds.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_scipy import DifferentialEvolution
        >>> f = lambda x: float((x**2 - np.cos(9 * x)).sum())
        >>> r = hybridopt.minimize(f, np.ones(2), DifferentialEvolution(), budget=2000, bounds=(-2, 2), seed=0)
        >>> round(r.best_loss, 6)
        -2.0
    """

    name: ClassVar[str] = "scipy.differential_evolution"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})
    uses: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENT, Need.POPULATION, Need.CONSTRAINTS})
    libraries: ClassVar[tuple[str, ...]] = ("scipy",)
    memory_advice: ClassVar[str] = "use a smaller popsize, or select fewer weights (select=...)"

    strategy: Strategy = "best1bin"
    maxiter: Count = 1000
    popsize: Count = 15
    tol: NonNegative = 0.01
    mutation: float | tuple[float, float] = (0.5, 1)
    recombination: Fraction = 0.7
    polish: bool = True
    init: Literal["latinhypercube", "sobol", "halton", "random"] = "latinhypercube"
    atol: NonNegative = 0.0
    updating: Literal["immediate", "deferred"] = "immediate"
    gradients: GradientMode = "auto"

    def __post_init__(self) -> None:
        check_options(self)
        try:
            factors = np.array(self.mutation, dtype=np.float64)
            right = factors.shape in ((), (2,)) and bool(((factors >= 0) & (factors < 2)).all())
        except (TypeError, ValueError):
            right = False
        if not right:
            raise MethodError(
                f"{self.name}: expected mutation in [0, 2), or a (low, high) pair of such, got {self.mutation!r}"
            )

    def memory(self, n: int) -> int:
        """Bytes of the population and copies of it."""
        return 32 * max(5, self.popsize * n) * n

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        from scipy.optimize import Bounds, differential_evolution, minimize

        deferred = self.updating == "deferred"

        def losses(x: Any) -> Any:  # vectorized: x has shape (n, popsize)
            return ask.values(start.clip(x.T)) if deferred else ask.value(start.clip(x))

        rules = Restrictions(ask, start, self.gradients)

        with quiet():
            r = differential_evolution(
                losses,
                start.pairs(),
                rng=np.random.default_rng(start.seed),
                x0=_within(start),
                vectorized=deferred,
                constraints=_together(ask, start, rules) if rules else (),
                **given(self, "gradients") | {"polish": False},
            )
            x, loss = r.x, r.fun
            if self.polish:  # as SciPy does, but with our gradients
                arguments = differentiated(
                    Derivative(ask, start, self.gradients, finite_start=False, together=not rules), start
                )
                bounds = Bounds(start.lower, start.upper)
                method = "SLSQP" if rules else "L-BFGS-B"
                p = minimize(
                    x0=x.copy(), method=method, bounds=bounds, constraints=rules.dictionaries(), **arguments
                )
                if p.success and p.fun < loss:
                    x, loss = p.x, p.fun
        return ending(start, r.success, r.message, loss, x)


def _within(start: Start) -> npt.NDArray[np.float64]:
    """The start, moved by rounding errors where SciPy, which scales the box to [0, 1], would find it outside."""
    middle, width = 0.5 * (start.lower + start.upper), np.abs(start.lower - start.upper)
    scale = 1 / np.where(width > 0, width, np.inf)
    x = start.x0.copy()
    for _ in range(10):  # one or two are enough, unless the box overflows
        scaled = (x - middle) * scale + 0.5
        outside = scaled - np.clip(scaled, 0, 1)
        x = np.where(outside == 0, x, np.nextafter(x - outside * width, middle))
    return x


def _together(ask: Ask, start: Start, rules: Restrictions) -> Any:
    """All constraints as one, asked of a whole generation at once where the losses are."""
    from scipy.optimize import NonlinearConstraint

    def values(x: Any) -> Any:  # shape (n,), or vectorized (n, popsize)
        return ask.constraints(start.clip(np.asarray(x).T)).T

    return NonlinearConstraint(values, rules.lower, rules.upper)
