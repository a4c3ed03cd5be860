"""Competitors that take turns and are given equal shares rung by rung, of which the better part goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from hybridopt.compose._sequence import load_scope, save_scope
from hybridopt.compose.stage import Stage, gather, several
from hybridopt.errors import ClosedError, MethodError, NonFiniteLoss, StateError
from hybridopt.ledger import Ledger, Reason
from hybridopt.optimizer import (
    Answer,
    HandOver,
    Incumbent,
    Method,
    Need,
    Optimizer,
    Request,
    StageReport,
    Step,
)
from hybridopt.options import check_options
from hybridopt.randomness import derive_seed
from hybridopt.text import print_call
from hybridopt.vector import ParameterVector


@dataclass(frozen=True)
class Halving:
    """The schedule of successive halving (Karnin, Koren & Somekh 2013; Jamieson & Talwalkar 2016).

    Args:
        rung: forward-equivalents of each competitor in the first rung; later ones grow by 1 / keep.
        keep: the part that goes on after each rung; 1 = all, always.
    """

    rung: float
    keep: float

    @classmethod
    def of(cls, method: Any, n: int) -> Halving:
        """From the options `rung` and `keep` of a method over n weights; rung None = 10 (n + 10)."""
        return cls(10.0 * (n + 10) if method.rung is None else method.rung, method.keep)

    def size(self, rung: int) -> float:
        """Forward-equivalents of each competitor in this rung, from 0."""
        return self.rung / self.keep**rung

    def survivors(self, ranks: Sequence[Any]) -> list[int]:
        """Which go on: the lowest ranks, at least one and (unless `keep` is 1) not all; ties by order."""
        count = len(ranks)
        if self.keep < 1:
            count = max(1, min(count - 1, math.ceil(self.keep * count - 1e-9)))
        return sorted(sorted(range(len(ranks)), key=ranks.__getitem__)[:count])


class Entry(NamedTuple):
    """What a competitor begins with."""

    method: Method
    seed: int
    warm: HandOver | None


@dataclass(frozen=True)
class Several(Method):
    """A composition of methods that take turns."""

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", several(self.name, self.methods))
        if not self.methods:
            raise MethodError(f"{self.name}: expected at least one method")
        check_options(self)
        gather(self, self.methods)
        object.__setattr__(self, "takes", frozenset[str]().union(*(m.takes for m in self.methods)))

    def entries(self, seed: int, warm: HandOver | None) -> Iterator[Entry]:
        """What each begins with; the first has the composition's own seed."""
        for i, method in enumerate(self.methods):
            own = derive_seed(seed, i) if i else seed
            yield Entry(method, own, None if warm is None else warm.only(method.takes))

    def call(self, limits: Mapping[str, Any] = MappingProxyType({})) -> str:
        """See `Method.call`."""
        options = self.options()
        del options["methods"]
        return print_call(self.name, {**options, **limits}, *self.methods)


class Member:
    """A competitor: its optimizer, and a ledger around all that it does."""

    def __init__(self, entry: Entry, vector: ParameterVector, rivals: bool) -> None:
        stage = entry.method if isinstance(entry.method, Stage) else Stage(entry.method)
        self.method = stage
        self.received = "" if entry.warm is None else str(entry.warm)
        self.ledger = Ledger(label=str(stage))
        self.ledger.rivals = rivals
        self.run: Optimizer = stage.start(vector, entry.seed, entry.warm)
        self.moved = False  # whether it has made a step in this rung
        self.reason: Reason | None = None
        self.message = ""
        self.notes: list[str] = []  # of what is closed

    @property
    def rank(self) -> tuple[float, float]:
        """What it has found; the lower the better."""
        return self.ledger.best_violation, self.ledger.best_loss

    def end(self, reason: Reason, message: str) -> None:
        if self.reason is None:
            self.reason, self.message = reason, message

    def close(self) -> None:
        self.notes.extend(note for note in self.run.notes if note not in self.notes)
        self.run.close()

    def report(self) -> StageReport:
        best = self.ledger.best_loss
        return StageReport(
            str(self.method), self.reason, self.message, best, self.ledger.spent(), self.received
        )


class Turns:
    """A contest at work (an `Optimizer`).

    A turn ends with the step that reaches the rung's share, since a solver's open question would have to be paid
    twice; what is over is taken off the next turn, and every turn is at least one step.

    Args:
        method: of the contest, for its text.
        entries: the competitors, started in this order, all from where the weights stand unless they say otherwise.
        halving: the schedule.
        vector: of the weights; left as it stands.
    """

    def __init__(
        self, method: Method, entries: Iterable[Entry], halving: Halving, vector: ParameterVector
    ) -> None:
        self.name = str(method)
        self._halving = halving
        stands = vector.snapshot()
        self._vector = vector
        self._follows_gradients = Need.GRADIENT in method.needs | method.uses
        self._members: list[Member] = []
        entries = list(entries)
        for entry in entries:
            self._members.append(Member(entry, vector, len(entries) > 1))
            vector.claim(None)  # an in-place method keeps what it wrote, the next one finds what stood there
            vector.restore(stands)
        self._alive = list(range(len(self._members)))
        self._turn = 0
        self._rung = 0
        self._share = halving.size(0)  # of each, all rungs so far together
        self._ended = self._closed = False

    # -- the protocol -------------------------------------------------------------------------------------------

    def ask(self) -> Request:
        """See `Optimizer.ask`: the question of the competitor whose turn it is."""
        if self._closed or self._ended:
            raise ClosedError(f"{self.name}: it has ended or was closed; start it again, or load its state")
        member = self._members[self._turn]
        return member.run.ask().within(member.ledger)

    def tell(self, answer: Answer) -> Step | None:
        """See `Optimizer.tell`."""
        member = self._members[self._turn]
        step: Step | None
        if answer.stop is not None and answer.stop.ledger is member.ledger:
            step = Step(member.ledger.last_loss, member.run.name, answer.stop.reason)
        else:
            try:
                step = member.run.tell(answer)
            except NonFiniteLoss as error:  # it cannot begin where the loss is not finite; others may
                step = Step(answer.loss, member.run.name, Reason.NON_FINITE, str(error))
        if step is None:
            return None
        member.moved = True
        if step.reason is not None:
            member.end(step.reason, step.message)
        if not self._waiting(member):
            self._pass_on()
        if self._ended:
            self._require_finite()
            leader = self._leader
            return step._replace(reason=leader.reason, message=leader.message)
        return step._replace(reason=None, message="")

    def _require_finite(self) -> None:
        """Raise `NonFiniteLoss` if none saw a finite loss, as a single method that follows gradients would."""
        if self._follows_gradients and all(math.isinf(member.ledger.best_loss) for member in self._members):
            said = "; ".join(
                f"{m.method}: {m.message or (m.reason.value if m.reason else '')}" for m in self._members
            )
            raise NonFiniteLoss(
                f"{self.name}: expected a finite loss for one of its methods at least; {said}"
            )

    def _waiting(self, member: Member) -> bool:
        """Whether a competitor has something left to spend in this rung; the last one is never limited."""
        if member.reason is not None:
            return False
        return len(self._alive) == 1 or not member.moved or member.ledger.forward_equivalents < self._share

    def _pass_on(self) -> None:
        """Give the turn to the next one, if need be in the next rung."""
        while not self._ended:
            waiting = [i for i in self._alive if self._waiting(self._members[i])]
            if waiting:
                self._turn = waiting[0]
                return
            if all(self._members[i].reason is not None for i in self._alive):
                self._ended = True
            else:
                self._climb()

    def _climb(self) -> None:
        """Drop the worse part and begin the next rung."""
        going_on = self._halving.survivors([self._members[i].rank for i in self._alive])
        kept = [self._alive[k] for k in going_on]
        self._rung += 1
        for i in self._alive:
            self._members[i].moved = False
            if i not in kept:
                self._members[i].end(Reason.SWITCHED, f"dropped in rung {self._rung}")
                self._members[i].close()
        self._alive = kept
        self._share += self._halving.size(self._rung)

    # -- looking ------------------------------------------------------------------------------------------------

    @property
    def _leader(self) -> Member:
        return min((self._members[i] for i in self._alive), key=lambda member: member.rank)

    @property
    def needs(self) -> frozenset[Need]:
        """Those of the competitor whose turn it is."""
        return self._members[self._turn].run.needs

    @property
    def notes(self) -> list[str]:
        """Those of all competitors, each once."""
        every = (
            note
            for i, member in enumerate(self._members)
            for note in (*member.notes, *(member.run.notes if i in self._alive else ()))
        )
        return list(dict.fromkeys(every))

    @property
    def reports(self) -> tuple[StageReport, ...]:
        """One for each competitor: what it spent, and why it left."""
        return tuple(member.report() for member in self._members)

    @property
    def incumbent(self) -> Incumbent:
        """The leading competitor's own point."""
        return self._leader.run.incumbent

    def hand_over(self) -> HandOver:
        """What the leading competitor hands over."""
        return self._leader.run.hand_over()

    def close(self) -> None:
        """Close all competitors."""
        for i in self._alive:
            self._members[i].run.close()
        self._closed = True

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Who is still in it and whose turn it is; each competitor's ledger, and its state unless it was dropped."""
        members = [
            {
                "scope": save_scope(member.ledger),
                "moved": member.moved,
                "reason": None if member.reason is None else member.reason.value,
                "message": member.message,
                "notes": list(member.notes),
                "received": member.received,
                "run": member.run.state_dict() if i in self._alive else None,
            }
            for i, member in enumerate(self._members)
        ]
        return {
            "method": self.name,
            "alive": list(self._alive),
            "turn": self._turn,
            "rung": self._rung,
            "share": self._share,
            "ended": self._ended,
            "members": members,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """See `Optimizer.load_state_dict`."""
        if state["method"] != self.name:
            raise StateError(f"state: it was saved by {state['method']!r}, this is {self.name!r}")
        self._alive = list(state["alive"])
        self._turn, self._rung, self._share = state["turn"], state["rung"], state["share"]
        self._ended = state["ended"]
        for member, saved in zip(self._members, state["members"], strict=True):
            load_scope(member.ledger, saved["scope"])
            member.moved, member.message = saved["moved"], saved["message"]
            member.reason = None if saved["reason"] is None else Reason(saved["reason"])
            member.notes, member.received = list(saved["notes"]), saved["received"]
            member.run.close()
            if saved["run"] is not None:
                # begun anew: one that was dropped since cannot be asked again
                member.run = member.method.start(self._vector, 0)
                member.run.load_state_dict(saved["run"], exact=exact)
