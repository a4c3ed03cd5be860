"""Stages one after another, each from the best point so far; itself an optimizer."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hybridopt.compose.stage import Stage
from hybridopt.errors import ClosedError, NonFiniteLoss, StateError
from hybridopt.evaluation import present
from hybridopt.ledger import Ledger, Reason
from hybridopt.optimizer import (
    Answer,
    FloatArray,
    HandOver,
    Incumbent,
    Kind,
    Method,
    Need,
    Optimizer,
    Request,
    StageReport,
    Step,
)
from hybridopt.point import Point
from hybridopt.randomness import derive_seed
from hybridopt.until import AnyOf, Switch, flat, no_gradient, noise
from hybridopt.vector import ParameterVector


class Sequence(Method):
    """A composition whose parts take turns, one at a time, in a fixed order."""

    endless: bool = False
    """Whether it goes on until its budget ends: it is stopped when `period` stages in a row evaluated nothing."""
    period: int = 1
    draws: bool = False
    """Whether its stages begin at points drawn at random."""

    @abc.abstractmethod
    def stage(self, index: int) -> Stage | None:
        """The stage of this index, from 0; None after the last."""

    def begin(
        self, index: int, best: HandOver, origin: FloatArray, vector: ParameterVector, seed: int
    ) -> HandOver:
        """What stage `index` (from 1) begins with.

        Args:
            index: of the stage.
            best: the best point so far, and what the stage before has to hand over.
            origin: where the whole sequence began, shape (n,), in solver coordinates.
            vector: of the weights.
            seed: the stage's seed.
        """
        return best

    def accept(self, here: Incumbent, ended: Incumbent, best: Incumbent, seed: int) -> Incumbent:
        """The point from which the next stage goes on; the best one so far, unless a subclass chooses otherwise.

        Args:
            here: what this returned for the stage before; before the second stage, no point and a loss of inf.
            ended: the best point of the stage that has just ended.
            best: of all stages.
            seed: the next stage's.
        """
        return best

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`."""
        return SequenceRun(self, vector, seed, warm)


class SequenceRun:
    """A sequence at work (an `Optimizer`)."""

    def __init__(self, method: Sequence, vector: ParameterVector, seed: int, warm: HandOver | None) -> None:
        self.method = method
        self.vector = vector
        self.seed = seed
        self.name = str(method)
        self._done: list[StageReport] = []
        self._notes: list[str] = []
        self._best_loss = math.inf if warm is None else warm.loss
        self._best_x: FloatArray | None = None if warm is None else warm.x
        self._best_violation = 0.0 if math.isfinite(self._best_loss) else math.inf
        self._here = Incumbent(math.inf, None)
        self._origin = vector.encode(vector.read()) if warm is None or warm.x is None else warm.x
        self._idle = 0  # stages in a row that evaluated nothing
        self._ended = False
        self._closed = False
        # what cannot begin is refused now, not after the stages before it have been paid
        for index in range(1, method.period):
            later = method.stage(index)
            if later is not None:
                later.method.start(vector, seed).close()
        self._begin(0, warm)

    def _begin(self, index: int, warm: HandOver | None) -> None:
        stage = self.method.stage(index)
        assert stage is not None
        self._index = index
        self._stage = stage
        self._scope = Ledger(stage.budget, shares=dict(stage.shares), label=stage.method.label)
        self._received = "" if warm is None else str(warm)
        self._child = stage.method.start(self.vector, self._seed(index), warm)
        self._in_place = False
        self.steps = 0
        self.loss = math.inf
        self.gradient_norm = math.inf
        self.gradient_found: bool | None = None
        self.change_found: bool | None = None
        self._value = math.inf  # the last loss that was no probe, where a rule looks for slopes
        self._asked = (Kind.VALUE, True)
        self._memory: dict[str, Any] = {}

    def _seed(self, index: int) -> int:
        """The first stage has the sequence's own seed."""
        return self.seed if index == 0 else derive_seed(self.seed, index)

    @property
    def needs(self) -> frozenset[Need]:
        """Those of the present stage."""
        return self._child.needs

    # -- the protocol -------------------------------------------------------------------------------------------

    def ask(self) -> Request:
        """See `Optimizer.ask`."""
        if self._closed or self._ended:
            raise ClosedError(
                f"{self.name}: it has ended or was closed; start it again, or load its state into a new one"
            )
        request = self._child.ask()
        self._in_place = request.x is None and request.kind is not Kind.VALUE
        self._asked = request.kind, request.probe
        return request.within(self._scope)

    def tell(self, answer: Answer) -> Step | None:
        """See `Optimizer.tell`."""
        if answer.stop is not None and answer.stop.ledger is self._scope:
            return self._next(None, answer.stop.reason, "")
        rule = self._stage.rule
        if rule is not None and rule.needs_gradient:
            self._note_gradient(answer)
        if rule is not None and not self._in_place:
            self._note_slope(answer)
        try:
            step = self._child.tell(answer)
        except NonFiniteLoss as error:
            # the user's own start must have a finite loss; one drawn here, or drawn again under noise, may not
            if self._index == 0 or not math.isfinite(self._best_loss):
                raise
            return self._next(None, Reason.NON_FINITE, str(error))
        if step is None:
            return None
        self.steps += 1
        if step.reason is not None:
            return self._next(step, step.reason, step.message)
        if self._stage.steps is not None and self.steps >= self._stage.steps:
            return self._next(step, Reason.STEPS, "")
        if rule is not None:
            self.loss = step.loss
            if rule.met(self, self._memory):
                return self._next(step, Reason.SWITCHED, f"until {rule}")
        return step

    def _next(self, step: Step | None, reason: Reason, message: str) -> Step | None:
        """End the present stage; begin the next one at the best point, or end the sequence."""
        self._absorb()
        self._done.append(self._report(reason, message))
        self._notes.extend(note for note in self._child.notes if note not in self._notes)
        self._idle = 0 if self._scope.evaluations else self._idle + 1
        following = self.method.stage(self._index + 1)
        if following is not None and self.method.endless and self._idle >= self.method.period:
            following, reason, message = None, Reason.STALLED, "no stage evaluates anything any more"
        if following is None:
            self._ended = True
            loss = self._scope.last_loss if step is None else step.loss
            return Step(loss, self._child.name if step is None else step.method, reason, message)
        index = self._index + 1
        # no loss to beat where a constraint is broken
        known = math.inf if self._best_violation > 0 else self._best_loss
        best = Incumbent(known, self._best_x)
        self._here = self.method.accept(self._here, self._ended_at(), best, self._seed(index))
        handed = self._child.hand_over()._replace(x=self._here.x, loss=self._here.loss)
        again = following.method == self._stage.method and not following.method.parts
        checked = handed.checked if again else frozenset()
        handed = handed.only(following.received)
        self._child.close()
        warm = self.method.begin(index, handed, self._origin, self.vector, self._seed(index))
        self._begin(index, warm._replace(checked=checked))
        return None if step is None else step._replace(reason=None, message="")

    def _absorb(self) -> None:
        """Take over the stage's best point if it is the best so far; where no best is kept, its own point."""
        scope = self._scope
        point: Point | None = scope.best_point
        if point is not None:
            if (scope.best_violation, scope.best_loss) < (self._best_violation, self._best_loss):
                self._best_violation, self._best_loss = scope.best_violation, scope.best_loss
                self._best_x = self.vector.encode(point.flat(self.vector))
            return
        own = self._child.incumbent
        if self._best_x is None or self._follows(own):
            self._best_loss = own.loss
            self._best_x = self._flat(own.x)

    def _ended_at(self) -> Incumbent:
        """The present stage's best point; where no best is kept, its own."""
        scope = self._scope
        point: Point | None = scope.best_point
        if point is None:
            own = self._child.incumbent
            return Incumbent(own.loss, self._flat(own.x))
        known = math.inf if scope.best_violation > 0 else scope.best_loss
        return Incumbent(known, self.vector.encode(point.flat(self.vector)))

    def _follows(self, own: Incumbent) -> bool:
        """Whether a stage's own point is to be gone on from although no best point is kept (the loss is noisy).

        The last is the best guess of a method that goes on from the point handed over; of stages that begin at drawn
        points it is none, so there the lower loss decides, lucky draw or not.
        """
        return own.loss < self._best_loss if self.method.draws else math.isfinite(own.loss)

    def _flat(self, x: FloatArray | None) -> FloatArray:
        return self.vector.encode(self.vector.read()) if x is None else x

    def _note_gradient(self, answer: Answer) -> None:
        if answer.gradient is not None:
            self.gradient_norm = float(np.linalg.norm(answer.gradient))
        elif self._in_place and answer.finite:
            grads = present(t.grad for t in self.vector.tensors)
            norms = torch._foreach_norm(grads) if grads else []
            self.gradient_norm = math.sqrt(sum(float(norm) ** 2 for norm in norms)) if grads else math.inf

    def _note_slope(self, answer: Answer) -> None:
        kind, probe = self._asked
        if kind in (Kind.VALUE, Kind.VALUE_AND_GRADIENT) and not probe:
            self._value = answer.loss
        if kind in (Kind.GRADIENT, Kind.VALUE_AND_GRADIENT) and self.gradient_found is None and answer.finite:
            self.gradient_found = answer.gradient is not None and bool(answer.gradient.any())
        if kind is Kind.POPULATION and probe and self.change_found is None and answer.losses is not None:
            self.change_found = bool((answer.losses != self._value).mean() > 0.5)

    # -- what a switch rule sees (`until.View`) -----------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """The present stage's."""
        return self._scope

    @property
    def noisy(self) -> bool:
        """Whether the loss draws random numbers: no best point is kept then."""
        return self._scope.best_point is None and math.isfinite(self._scope.best_loss)

    def point(self) -> FloatArray:
        """The present stage's own point, shape (n,)."""
        return self._flat(self._child.incumbent.x)

    # -- looking ------------------------------------------------------------------------------------------------

    @property
    def incumbent(self) -> Incumbent:
        """The present stage's own point; before a later stage has seen a finite loss, the best so far."""
        own = self._child.incumbent
        if self._index > 0 and self._best_x is not None:
            if self._scope.evaluations == 0 or not math.isfinite(own.loss) or not self._follows(own):
                return Incumbent(self._best_loss, self._best_x)
        return own

    @property
    def best(self) -> Incumbent:
        """The best point of all stages so far; where no best is kept, the present stage's own."""
        if not self._ended:
            self._absorb()
        return Incumbent(self._best_loss, self._best_x)

    @property
    def ended(self) -> bool:
        """Whether the last stage has ended."""
        return self._ended

    def hand_over(self) -> HandOver:
        """What the present stage hands over."""
        return self._child.hand_over()

    @property
    def notes(self) -> list[str]:
        """Notes of all stages so far, each once."""
        if self._ended:
            return self._notes
        notes = [*self._notes, *(note for note in self._child.notes if note not in self._notes)]
        if self.method.endless or _for_others(self._stage.rule):
            return notes
        waiting: list[str] = []
        for index in range(self._index + 1, self._index + 2 + self.method.period):
            stage = self.method.stage(index)
            if stage is None:
                break
            waiting.append("..." if len(waiting) == self.method.period else str(stage))
        return [*notes, f"never began: {' > '.join(waiting)}"] if waiting else notes

    @property
    def reports(self) -> tuple[StageReport, ...]:
        """One report a stage begun, in order."""
        return tuple(self._done) if self._ended else (*self._done, self._report(None, ""))

    def _report(self, reason: Reason | None, message: str) -> StageReport:
        scope = self._scope
        return StageReport(str(self._stage), reason, message, scope.best_loss, scope.spent(), self._received)

    def close(self) -> None:
        """Close the present stage."""
        self._child.close()
        self._closed = True

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands, its stage's ledger and rule, and the stage's own state."""
        return {
            "method": self.name,
            "index": self._index,
            "steps": self.steps,
            "seed": self.seed,
            "ended": self._ended,
            "idle": self._idle,
            "best": Point(self._best_x, None, []).state_dict()
            | {"loss": self._best_loss, "violation": self._best_violation},
            "here": Point(self._here.x, None, []).state_dict() | {"loss": self._here.loss},
            "origin": torch.tensor(self._origin),
            "scope": save_scope(self._scope),
            "received": self._received,
            "watched": [self.gradient_norm, copy.deepcopy(self._memory)],
            "slope": [self.gradient_found, self.change_found, self._value],
            "done": [save_report(report) for report in self._done],
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
        self.steps = state["steps"]
        self._ended = state["ended"]
        self._idle = state["idle"]
        self._best_loss, self._best_violation = state["best"]["loss"], state["best"]["violation"]
        self._best_x = Point.from_state(state["best"]).x
        self._here = Incumbent(state["here"]["loss"], Point.from_state(state["here"]).x)
        self._origin = state["origin"].numpy().copy()
        load_scope(self._scope, state["scope"])
        self._received = state["received"]
        self.gradient_norm, self._memory = state["watched"][0], copy.deepcopy(state["watched"][1])
        self.gradient_found, self.change_found, self._value = state["slope"]
        self._done = [load_report(saved) for saved in state["done"]]
        self._notes = list(state["notes"])
        self._child.load_state_dict(state["child"], exact=exact)


def _for_others(rule: Switch | None) -> bool:
    """Whether what follows a stage is for losses of another kind, so that it need not be missed."""
    parts = rule.parts if isinstance(rule, AnyOf) else (rule,)
    return all(part in (noise, flat, no_gradient) for part in parts)


def save_scope(scope: Ledger) -> dict[str, Any]:
    """A stage's ledger with its best point, as plain data."""
    point: Point | None = scope.best_point
    return {"ledger": scope.state_dict(), "best": None if point is None else point.state_dict()}


def load_scope(scope: Ledger, state: Mapping[str, Any]) -> None:
    """Take over what `save_scope` saved."""
    scope.load_state_dict(state["ledger"])
    scope.best_point = None if state["best"] is None else Point.from_state(state["best"])


def save_report(report: StageReport) -> list[Any]:
    """A report as plain data."""
    reason = None if report.reason is None else report.reason.value
    return [report.method, reason, report.message, report.best_loss, dict(report.spent), report.received]


def load_report(saved: list[Any]) -> StageReport:
    """The report that was saved."""
    method, reason, message, best_loss, spent, received = saved
    return StageReport(
        method, None if reason is None else Reason(reason), message, best_loss, spent, received
    )
