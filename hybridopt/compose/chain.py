"""One method after another, each from the best point so far; itself an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hybridopt.errors import ClosedError, MethodError, StateError
from hybridopt.ledger import Budget, Ledger, Reason
from hybridopt.optimizer import (
    Answer,
    FloatArray,
    HandOver,
    Incumbent,
    Method,
    Need,
    Optimizer,
    Request,
    StageReport,
    Step,
)
from hybridopt.point import Point
from hybridopt.randomness import derive_seed
from hybridopt.text import print_call
from hybridopt.vector import ParameterVector


@dataclass(frozen=True)
class Stage(Method):
    """A method with limits of its own; it ends when the method does or when a limit is reached.

    Args:
        method: what runs.
        budget: its own limits on evaluations, forward-equivalents, seconds, or a target loss; None = none.
        steps: at most this many steps; None = no limit.
    """

    name: ClassVar[str] = "stage"

    method: Method
    budget: Budget | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise MethodError(
                f"stage: expected a Method, got {type(self.method).__name__}; see hybridopt.method"
            )
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool)
        if self.steps is not None and not (whole and self.steps >= 1):
            raise MethodError(f"stage: expected steps >= 1, got {self.steps!r}")
        _gather(self, (self.method,))

    @property
    def limited(self) -> bool:
        """Whether it has any limit of its own."""
        return self.budget is not None or self.steps is not None

    def limits(self) -> dict[str, Any]:
        """The limits given, as the text form writes them."""
        found: dict[str, Any] = {}
        if self.budget is not None:
            found = {k: v for k, v in vars(self.budget).items() if v is not None}
        if self.steps is not None:
            found["steps"] = self.steps
        return found

    def __str__(self) -> str:
        if not self.limited:
            return str(self.method)
        if isinstance(self.method, Chain | Stage):
            return print_call(f"({self.method})", self.limits())
        return print_call(self.method.label, self.method.options() | self.limits())

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`."""
        return ChainRun((self,), vector, seed, warm)


@dataclass(frozen=True, init=False)
class Chain(Method):
    """Stages in order; each starts at the best point that the chain has seen so far.

    A stage ends when its method does or when one of its own limits is reached; the chain ends with its last stage.
    The first stage has the chain's seed; later ones a seed derived from it and from their place. Chains within a
    chain that have no limits of their own are flattened: `(a >> b) >> c == a >> (b >> c)`.

    Args:
        stages: methods or `Stage`s, at least one.

    Example:
        >>> from hybridopt import method
        >>> chain = method("dual_annealing", evaluations=500) >> method("slsqp", ftol=1e-12)
        >>> str(chain)
        'scipy.dual_annealing(evaluations=500) > scipy.slsqp(ftol=1e-12)'
        >>> method(str(chain)) == chain
        True
    """

    name: ClassVar[str] = "chain"

    stages: tuple[Stage, ...]

    def __init__(self, stages: Iterable[Method]) -> None:
        flat: list[Stage] = []
        for item in stages:
            if isinstance(item, Chain):
                flat.extend(item.stages)
            elif isinstance(item, Stage) and isinstance(item.method, Chain) and not item.limited:
                flat.extend(item.method.stages)
            else:
                flat.append(item if isinstance(item, Stage) else Stage(item))
        if not flat:
            raise MethodError("chain: expected at least one stage")
        object.__setattr__(self, "stages", tuple(flat))
        _gather(self, self.stages)

    @property
    def label(self) -> str:
        """Its text."""
        return str(self)

    def __str__(self) -> str:
        return " > ".join(map(str, self.stages))

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`."""
        return ChainRun(self.stages, vector, seed, warm)


def _gather(made: Method, parts: Iterable[Method]) -> None:
    """What a composition needs and uses is what its parts do; no fields, since they follow from the parts."""
    parts = tuple(parts)
    object.__setattr__(made, "needs", frozenset[Need]().union(*(part.needs for part in parts)))
    object.__setattr__(made, "uses", frozenset[Need]().union(*(part.uses for part in parts)))


def chain(stages: Iterable[Method]) -> Chain:
    """A chain (reached by name from lower floors)."""
    return Chain(stages)


def stage(method: Method, budget: Budget | None, steps: int | None) -> Stage:
    """A stage (reached by name from lower floors)."""
    return Stage(method, budget, steps)


class ChainRun:
    """A chain at work (an `Optimizer`)."""

    needs: frozenset[Need]

    def __init__(
        self, stages: tuple[Stage, ...], vector: ParameterVector, seed: int, warm: HandOver | None
    ) -> None:
        self.stages = stages
        self.vector = vector
        self.seed = seed
        self.name = " > ".join(map(str, stages))
        self.needs = stages[0].method.needs
        self._done: list[StageReport] = []
        self._notes: list[str] = []
        self._best_loss = math.inf if warm is None else warm.loss
        self._best_x: FloatArray | None = None if warm is None else warm.x
        self._ended = False
        self._closed = False
        # what cannot begin is refused now, not after the stages before it have been paid
        for later in stages[1:]:
            later.method.start(vector, seed).close()
        self._begin(0, warm)

    def _begin(self, index: int, warm: HandOver | None) -> None:
        stage = self.stages[index]
        self._index = index
        self._steps = 0
        self._scope = Ledger(stage.budget, label=stage.method.label)
        seed = self.seed if index == 0 else derive_seed(self.seed, index)
        self._child = stage.method.start(self.vector, seed, warm)

    # -- the protocol -------------------------------------------------------------------------------------------

    def ask(self) -> Request:
        """See `Optimizer.ask`."""
        if self._closed or self._ended:
            raise ClosedError(f"{self.name}: it has ended or was closed; start it again, or load its state")
        return self._child.ask().within(self._scope)

    def tell(self, answer: Answer) -> Step | None:
        """See `Optimizer.tell`."""
        if answer.stop is not None and answer.stop.ledger is self._scope:
            return self._next(None, answer.stop.reason, "")
        step = self._child.tell(answer)
        if step is None:
            return None
        self._steps += 1
        if step.reason is not None:
            return self._next(step, step.reason, step.message)
        limit = self.stages[self._index].steps
        if limit is not None and self._steps >= limit:
            return self._next(step, Reason.STEPS, "")
        return step

    def _next(self, step: Step | None, reason: Reason, message: str) -> Step | None:
        """End the present stage; begin the next one at the best point, or end the chain."""
        self._absorb()
        self._done.append(self._report(reason, message))
        self._notes.extend(self._child.notes)
        if self._index + 1 == len(self.stages):
            self._ended = True
            loss = self._scope.last_loss if step is None else step.loss
            return Step(loss, self._child.name if step is None else step.method, reason, message)
        self._child.close()
        self._begin(self._index + 1, HandOver(self._best_x, self._best_loss))
        return None if step is None else step._replace(reason=None, message="")

    def _absorb(self) -> None:
        """Take over the stage's best point if it is the chain's best; where no best is kept, its own point."""
        point: Point | None = self._scope.best_point
        if point is not None:
            if self._scope.best_loss < self._best_loss:
                self._best_loss = self._scope.best_loss
                self._best_x = self.vector.encode(point.flat(self.vector))
            return
        own = self._child.incumbent
        if math.isfinite(own.loss) or self._best_x is None:
            self._best_loss = own.loss
            self._best_x = self.vector.encode(self.vector.read()) if own.x is None else own.x

    @property
    def incumbent(self) -> Incumbent:
        """The present stage's own point; before a later stage's first evaluation the point it starts from."""
        if self._index > 0 and self._scope.evaluations == 0 and self._best_x is not None:
            return Incumbent(self._best_loss, self._best_x)
        return self._child.incumbent

    @property
    def notes(self) -> list[str]:
        """Notes of all stages so far."""
        if self._ended:
            return self._notes
        waiting = [str(stage) for stage in self.stages[self._index + 1 :]]
        unbegun = [f"never began: {' > '.join(waiting)}"] if waiting else []
        return [*self._notes, *self._child.notes, *unbegun]

    @property
    def reports(self) -> tuple[StageReport, ...]:
        """One report a stage begun, in order."""
        return tuple(self._done) if self._ended else (*self._done, self._report(None, ""))

    def _report(self, reason: Reason | None, message: str) -> StageReport:
        label = str(self.stages[self._index])
        return StageReport(label, reason, message, self._scope.best_loss, self._scope.spent())

    def close(self) -> None:
        """Close the present stage."""
        self._child.close()
        self._closed = True

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the chain stands, its stage's ledger, and the stage's own state."""
        point: Point | None = self._scope.best_point
        return {
            "method": self.name,
            "index": self._index,
            "steps": self._steps,
            "seed": self.seed,
            "ended": self._ended,
            "best": Point(self._best_x, None, []).state_dict() | {"loss": self._best_loss},
            "scope": self._scope.state_dict(),
            "scope_best": None if point is None else point.state_dict(),
            "done": [
                [
                    r.method,
                    None if r.reason is None else r.reason.value,
                    r.message,
                    r.best_loss,
                    dict(r.spent),
                ]
                for r in self._done
            ],
            "notes": list(self._notes),
            "child": self._child.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """See `Optimizer.load_state_dict`."""
        if state["method"] != self.name:
            raise StateError(f"state: it was saved by {state['method']!r}, this is {self.name!r}")
        self.seed = state["seed"]
        self._child.close()
        self._begin(state["index"], None)
        self._steps = state["steps"]
        self._ended = state["ended"]
        self._best_loss = state["best"]["loss"]
        self._best_x = Point.from_state(state["best"]).x
        self._scope.load_state_dict(state["scope"])
        self._scope.best_point = (
            None if state["scope_best"] is None else Point.from_state(state["scope_best"])
        )
        self._done = [
            StageReport(m, None if r is None else Reason(r), t, b, s) for m, r, t, b, s in state["done"]
        ]
        self._notes = list(state["notes"])
        self._child.load_state_dict(state["child"], exact=exact)
