"""Several methods against each other: each is given the same, and the better half goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hybridopt.compose._halving import Halving, Several, Turns
from hybridopt.optimizer import HandOver, Optimizer
from hybridopt.options import Part, Positive
from hybridopt.vector import ParameterVector


@dataclass(frozen=True)
class Race(Several):
    """The best of several methods, by successive halving: `race(slsqp, cmaes, adam(lr=0.1), rung=200)`.

    For when it is not known which method suits. All begin at the given start and take turns. In each rung each of them
    is given the same number of forward-equivalents; then the worse half (by the lowest loss it has seen; a loss that
    was never finite is last, ties by order) is dropped, and the others are given twice as much, so that every rung
    costs about the same. The last one goes on alone. A method that ends by itself stays in the ranking with what it
    found and spends nothing more; the race ends when all that are left have ended. A turn ends with a whole step
    (a generation, a value with its gradient); what that spends too much is taken off the next turn.

    Where one stage's point is worth handing to the next method use a chain instead; for many starts of one method
    `MultiStart`.

    Args:
        methods: at least one. The first has the race's own seed, the others seeds derived from it and their place.
        rung: forward-equivalents of each in the first rung; None (default) = 10 (n + 10) for n weights: a few
            generations, or a few gradients by differences.
        keep: the part that goes on after a rung; later rungs are 1 / keep times as long. Default 0.5; 1 = nobody is
            ever dropped.

    Successive halving: Karnin, Koren & Somekh 2013; Jamieson & Talwalkar 2016. With a loss that draws random numbers
    the lowest loss is a lucky draw, and so may be the winner of an early rung. Where the loss at the given start is not
    finite the methods that follow gradients are dropped; `NonFiniteLoss` is raised if no method is left that sees a
    finite one.

    Example:
        >>> import numpy as np, hybridopt
        >>> r = hybridopt.minimize(lambda x: float(((x - 0.3) ** 2).sum()), np.ones(5),
        ...                        "race(slsqp, cmaes, pso(swarmsize=20), rung=60)", bounds=(-1, 1),
        ...                        budget=2000, seed=0)
        >>> for stage in r.stages:
        ...     print(stage.method, stage.reason.value, stage.message)
        scipy.slsqp converged Optimization terminated successfully
        cmaes switched dropped in rung 2
        pso(swarmsize=20) switched dropped in rung 1
    """

    name: ClassVar[str] = "race"

    rung: Positive | None = None
    keep: Part = 0.5

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`."""
        return Turns(self, self.entries(seed, warm), Halving.of(self, vector.n), vector)
