"""Several methods that share a budget and the best point: whoever makes progress goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hybridopt.compose._halving import Halving, Member, Several, Turns
from hybridopt.ledger import Reason
from hybridopt.optimizer import FloatArray, HandOver, Incumbent, Optimizer
from hybridopt.options import Positive
from hybridopt.point import Point
from hybridopt.randomness import derive_seed
from hybridopt.vector import ParameterVector

TRIAL = 10  # turns that each method is worth, whatever the others found
RESTS = (Reason.CONVERGED, Reason.STALLED, Reason.SWITCHED, Reason.NON_FINITE)  # its own ends, not its limits


@dataclass(frozen=True)
class Portfolio(Several):
    """Several methods side by side, evaluations going to those that work: `portfolio(restart(slsqp), cmaes)`.

    For when it is not known which method suits and the budget is too small to find out first; where nobody is ever
    dropped, since another one may be the best later on. They take turns. A method that lowered the best loss of all in
    its turn has the next one too. Else the turn goes to the one that has had the least: ten turns for each of them
    count as they are, later ones times the square of its place (by the lowest loss it has seen), so that of two methods
    the better one is given four fifths. Each keeps its state between its turns.

    They share the best point. A method that has not begun when another one lowers the loss begins there, handed what
    that one knows and it takes (`handover=point`: the point alone). A method that ended rests, and when another one
    lowers the loss after that it begins again there; one that ended by a limit of its own does not. The portfolio ends
    when all rest. Its notes say what each method was given.

    `race` drops the worse half instead and shares nothing: the winner then has nearly all of a large budget.

    Args:
        methods: at least one. The first has the portfolio's own seed, the others seeds derived from it and their place.
        turn: forward-equivalents of a turn; None (default) = 5 (n + 1) for n weights, five gradients by differences. A
            turn ends with a whole step (a generation, a value with its gradient).

    With a loss that draws random numbers the lowest loss is a lucky draw, and so may be a turn that is won. That the
    turns go on while they win is the rule of Robbins (1952, "play the winner").

    Example:
        >>> import numpy as np, hybridopt
        >>> def loss(x):                                 # many local minima, the lowest is 0 at the origin
        ...     return float((x**2 - 10 * np.cos(2 * np.pi * x) + 10).sum())
        >>> r = hybridopt.minimize(
        ...     loss, np.full(2, 2.2), "portfolio(restart(slsqp, sigma=1), cmaes)", budget=2000, seed=0
        ... )
        >>> round(r.best_loss, 6), [stage.method for stage in r.stages]
        (0.0, ['restart(scipy.slsqp, sigma=1)', 'cmaes'])
    """

    name: ClassVar[str] = "portfolio"

    turn: Positive | None = None

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`."""
        return PortfolioRun(self, vector, seed, warm)


class PortfolioRun(Turns):
    """A portfolio at work (an `Optimizer`)."""

    def __init__(self, method: Portfolio, vector: ParameterVector, seed: int, warm: HandOver | None) -> None:
        self._length = 5.0 * (vector.n + 1) if method.turn is None else method.turn
        # `_share`, to which the present turn lasts, is set anew with each turn
        super().__init__(method, method.entries(seed, warm), Halving(self._length, 1.0), vector)
        self.seed = seed
        known = warm is not None and math.isfinite(warm.loss)
        self._lowest = (0.0, warm.loss) if warm is not None and known else (math.inf, math.inf)
        self._begun = [0] * len(self._members)  # how often each was begun again
        self._known = [self._lowest] * len(self._members)  # the best when it began

    def _pass_on(self) -> None:
        """Give the turn to the one that won the last one, or to the one that has had the least."""
        leader, won = self._leader, self._leader.rank < self._lowest
        self._lowest = min(self._lowest, leader.rank)
        for i, member in enumerate(self._members):
            if self._lowest < self._known[i] and (member.reason in RESTS or not member.ledger.evaluations):
                if member is not leader:
                    self._begin_again(i, leader)
        going = [i for i, member in enumerate(self._members) if member.reason is None]
        if not going:
            self._ended = True
            return
        if not (won and self._turn in going):
            self._turn = min(going, key=self._had)
        member = self._members[self._turn]
        member.moved = False
        self._share = member.ledger.forward_equivalents + self._length

    def _had(self, i: int) -> float:
        """What a method has had, as it counts here."""
        member, trial = self._members[i], TRIAL * self._length
        place = 1 + sum(other.rank < member.rank for other in self._members)
        spent = member.ledger.forward_equivalents
        return min(spent, trial) + place**2 * max(0.0, spent - trial)

    def _begin_again(self, i: int, leader: Member) -> None:
        """Begin at the leader's point."""
        member = self._members[i]
        violation, loss = leader.rank
        known = math.inf if violation > 0 else loss  # no loss to beat where a constraint is broken
        warm = leader.run.hand_over()._replace(x=self._point(leader), loss=known)
        warm = warm.only(member.method.received)
        member.close()
        self._begun[i] += member.ledger.evaluations > 0
        seed = derive_seed(self.seed, i, self._begun[i])
        member.run = member.method.start(self._vector, seed, warm)
        member.received, member.reason, member.message = str(warm), None, ""
        self._known[i] = self._lowest

    def _point(self, member: Member) -> FloatArray:
        """The best point that a method has found; where no best is kept, its own."""
        best: Point | None = member.ledger.best_point
        if best is not None:
            return self._vector.encode(best.flat(self._vector))
        x = member.run.incumbent.x
        return self._vector.encode(self._vector.read()) if x is None else x

    @property
    def notes(self) -> list[str]:
        """Those of all methods, and what each was given."""
        if len(self._members) == 1:
            return super().notes
        given = (
            f"{member.method.method.label} {member.ledger.evaluations} evaluations, best "
            f"{member.ledger.best_loss:.6g}" + (f", begun {1 + again} times" if again else "")
            for member, again in zip(self._members, self._begun, strict=True)
        )
        return [*super().notes, f"portfolio: {'; '.join(given)}"]

    @property
    def incumbent(self) -> Incumbent:
        """The best point of all; where no best is kept, the leading method's own."""
        leader = self._leader
        own = leader.run.incumbent
        if leader.ledger.best_point is None or own.loss <= leader.ledger.best_loss:
            return own
        return Incumbent(leader.ledger.best_loss, self._point(leader))

    def state_dict(self) -> dict[str, Any]:
        """That of the turns, and since when each is at work."""
        return super().state_dict() | {
            "seed": self.seed,
            "lowest": list(self._lowest),
            "begun": list(self._begun),
            "known": [list(rank) for rank in self._known],
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """See `Optimizer.load_state_dict`."""
        super().load_state_dict(state, exact=exact)
        self.seed, self._begun = state["seed"], list(state["begun"])
        violation, loss = state["lowest"]
        self._lowest = (violation, loss)
        self._known = [(violation, loss) for violation, loss in state["known"]]
