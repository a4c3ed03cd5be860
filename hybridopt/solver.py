"""Any blocking solver becomes an ask/tell optimizer: it runs piecewise, and is revived from a journal of answers."""

from __future__ import annotations

import abc
import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hybridopt.ask import Ask
from hybridopt.carrier import Carrier, Done, Isolation, Question, carry
from hybridopt.errors import ClosedError, ReplayMismatch, StateError
from hybridopt.journal import Journal
from hybridopt.ledger import Reason
from hybridopt.machine import differences, fingerprint, require_memory
from hybridopt.optimizer import (
    Answer,
    HandOver,
    Incumbent,
    Kind,
    Method,
    Need,
    Optimizer,
    Request,
    StageReport,
    Step,
    require_box,
)
from hybridopt.start import Ending, Start
from hybridopt.trail import Trail
from hybridopt.vector import ParameterVector

__all__ = ["Ask", "BlockingMethod", "Ending", "SolverRun", "Start"]

FloatArray: TypeAlias = npt.NDArray[np.float64]
_LOSSES = frozenset({Kind.VALUE, Kind.VALUE_AND_GRADIENT, Kind.POPULATION, Kind.RESIDUALS})
JOURNAL_LIMIT = 2**30  # bytes after which exact resume is given up (said once)


class BlockingMethod(Method):
    """A solver that owns its loop. A subclass translates options and calls it; everything else is here.

    Example:
        >>> from dataclasses import dataclass
        >>> import numpy as np, hybridopt
        >>> from scipy.optimize import minimize
        >>> from hybridopt.solver import BlockingMethod, Ending, Reason
        >>> @dataclass(frozen=True)
        ... class MyPowell(BlockingMethod):
        ...     name = "mine.my_powell"
        ...     def solve(self, ask, start):
        ...         r = minimize(ask.value, start.x0, method="powell")
        ...         return Ending(Reason.CONVERGED if r.success else Reason.STALLED, r.message, r.fun, r.x)
        >>> result = hybridopt.minimize(lambda x: float(((x - 3) ** 2).sum()), np.zeros(2), MyPowell(), budget=500)
        >>> result.x.round(6).tolist()
        [3.0, 3.0]
    """

    isolation: ClassVar[Isolation] = "greenlet"
    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions a journal is bound to."""

    @abc.abstractmethod
    def solve(self, ask: Ask, start: Start) -> Ending:
        """Run the solver to its end, asking for every loss. All randomness must come from `start.seed`."""

    def memory(self, n: int) -> int:
        """Bytes the solver is bound to need for n weights (0 = not worth checking)."""
        return 0

    memory_advice: ClassVar[str] = "select fewer weights (select=...)"

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`."""
        if Need.BOUNDS in self.needs:
            require_box(vector, self.label)
        elif vector.bounded and Need.BOUNDS not in self.uses:
            raise StateError(
                f"{self.label}: it cannot keep within bounds; remove them, or use another method"
            )
        require_memory(self.memory(vector.n), self.label, vector.n, self.memory_advice)
        return SolverRun(self, Start.at(vector, seed, warm))


class SolverRun:
    """A blocking solver at work (an `Optimizer`).

    The solver's live stack cannot be saved; the journal of answers can. A copy, a loaded state, or a step from
    another thread revives the solver by running it again on the recorded answers, checking by digest that it asks
    the same questions.
    """

    reports: tuple[StageReport, ...] = ()

    def __init__(self, method: BlockingMethod, start: Start) -> None:
        self.method = method
        self.start = start
        self.name = method.label
        self.needs = method.needs
        self.notes: list[str] = []
        self._journal = Journal()
        self._journal_full = False
        self._carrier: Carrier | None = None
        self._checked = set(start.checked)
        self._pending: Request | None = None
        self._best: Incumbent
        self._violation: float
        self._set_best(Incumbent(start.loss, start.x0))
        self._trail = Trail(start.n)
        self._last_value: float = math.inf
        self._ending: Ending | None = None
        self._exact = True
        self._saved_fingerprint: dict[str, str] | None = None
        self._closed = False

    # -- the protocol -------------------------------------------------------------------------------------------

    def ask(self) -> Request:
        """See `Optimizer.ask`."""
        self._check_open()
        if self._ending is None and (
            self._pending is None or self._carrier is None or not self._carrier.usable()
        ):
            self._revive()
        if self._ending is not None:
            raise ClosedError(f"{self.name}: it has ended ({self._ending.message}); start it again to go on")
        assert self._pending is not None
        return self._pending

    def tell(self, answer: Answer) -> Step | None:
        """See `Optimizer.tell`."""
        request = self.ask()
        if answer.stop is not None:
            raise answer.stop
        assert self._carrier is not None
        self._pending = None  # whatever happens below, the journal can revive it
        self._record(request, answer)
        out = self._carrier.advance(answer)
        if isinstance(out, Done):
            self._end(out.value)
        else:
            self._pending = out
            if request.kind is Kind.LIMITS or _same_step(request, out):
                return None
        loss = answer.loss if request.kind in _LOSSES else self._last_value
        if self._ending is not None:
            return Step(loss, self.name, self._ending.reason, self._ending.message)
        return Step(loss, self.name)

    @property
    def incumbent(self) -> Incumbent:
        """What the solver returned; while it runs, the best of its own points (probes excluded)."""
        if self._ending is not None:
            return Incumbent(self._ending.loss, self._ending.x)
        return self._best

    def hand_over(self) -> HandOver:
        """See `Optimizer.hand_over`: its best points, and the curvature that its last gradients show."""
        return self._trail.hand_over()._replace(checked=frozenset(self._checked))

    def close(self) -> None:
        """Unwind the solver; the state can still be saved."""
        self._drop_carrier()
        self._closed = True

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Method, start, journal and a fingerprint of versions and settings."""
        ending = self._ending
        return {
            "method": str(self.method),
            "start": self.start.state_dict(),
            "journal": None if self._journal_full else self._journal.state_dict(),
            "incumbent": [self.incumbent.loss, torch.tensor(self.incumbent.x)],
            "ending": None if ending is None else [ending.reason.value, ending.message],
            "notes": list(self.notes),
            "fingerprint": fingerprint(*self.method.libraries),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """See `Optimizer.load_state_dict`. The solver is revived at the next question, not here.

        Raises:
            StateError: the state belongs to a method with other options, or its journal had grown too large.
        """
        if state["method"] != str(self.method):
            raise StateError(
                f"state: it was saved by {state['method']!r}, this is {str(self.method)!r}; a solver can only go on "
                "with the options it began with"
            )
        if state["journal"] is None and state["ending"] is None and exact:
            raise StateError(
                f"{self.name}: the journal had passed {JOURNAL_LIMIT} bytes, so an exact resume is impossible; load "
                "with exact=False to start anew from the best point"
            )
        loss, x = state["incumbent"][0], state["incumbent"][1].numpy().copy()
        self._drop_carrier()
        self.start = Start.from_state(state["start"])
        self._checked = set(self.start.checked)
        self.notes = list(state["notes"])
        self._exact = exact
        self._saved_fingerprint = dict(state["fingerprint"])
        self._set_best(Incumbent(loss, x))
        self._journal = Journal()
        self._journal_full = False
        self._ending = None
        if state["ending"] is not None:
            reason, message = state["ending"]
            self._ending = Ending(Reason(reason), message, loss, x)
        if state["journal"] is not None:
            self._journal.load_state_dict(state["journal"])
        elif self._ending is not None:
            self._journal_full = True
        else:
            self._restart("its journal had grown too large")

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the journal (one of their own), not the live solver."""
        own = {"_journal": copy.deepcopy(self._journal), "notes": list(self.notes)}
        return self.__dict__ | own | {"_carrier": None, "_pending": None}

    # -- inside -------------------------------------------------------------------------------------------------

    def _record(self, request: Request, answer: Answer) -> None:
        if not self._journal_full:
            self._journal.append(request, answer)
            if self._journal.nbytes > JOURNAL_LIMIT:
                self._journal_full = True
                self._journal = Journal()
                warnings.warn(
                    f"{self.name}: the journal passed {JOURNAL_LIMIT} bytes; this run can no longer be resumed "
                    "exactly (a resume will start anew from the best point)",
                    RuntimeWarning,
                    stacklevel=3,
                )
        self._note_best(request, answer)

    def _note_best(self, request: Request, answer: Answer) -> None:
        if answer.gradient is not None and request.x is not None and answer.finite:
            self._trail.note_gradient(request.x, answer.gradient)
        if request.kind not in _LOSSES:
            return
        self._last_value = answer.loss
        if not request.probe and request.x is not None and answer.violation == 0:
            for x, loss in zip(
                np.atleast_2d(request.x),
                [answer.loss] if answer.losses is None else answer.losses.tolist(),
                strict=True,
            ):
                self._trail.note(x, loss)
        better = (answer.violation, answer.loss) < (self._violation, self._best.loss)
        if request.probe or not math.isfinite(answer.loss) or not better:
            return
        x = request.x
        if answer.losses is not None and x is not None:
            x = x[int(np.argmin(answer.losses))].copy()
        self._best, self._violation = Incumbent(answer.loss, x), answer.violation

    def _set_best(self, best: Incumbent) -> None:
        """Take a point from elsewhere for the best one; whether it keeps the constraints nobody said."""
        self._best = best
        known = math.isfinite(best.loss) and not self.start.constrained
        self._violation = 0.0 if known else math.inf

    def _launch(self) -> Request | Done:
        method, start, notes = self.method, self.start, self.notes

        checked = self._checked = set(start.checked)

        def body(question: Question) -> Ending:
            # the +inf told for a rejected point makes solvers compute inf - inf
            with np.errstate(all="ignore"):
                return method.solve(Ask(question, notes, checked), start)

        self._carrier = carry(body, method.isolation)
        return self._carrier.advance(None)

    def _revive(self) -> None:
        """Run the solver (again) up to its first unanswered question."""
        self._drop_carrier()
        if self._journal_full:
            raise ReplayMismatch(
                f"{self.name}: its journal was dropped (too large), so it cannot go on in another thread or copy"
            )
        journal = self._journal
        journal.rewind()
        before = self._best
        self._set_best(Incumbent(self.start.loss, self.start.x0))
        self._trail = Trail(self.start.n)
        out = self._launch()
        for i in range(len(journal)):
            if isinstance(out, Done) or not journal.matches(out):
                self._set_best(before)
                self._mismatch(i, out)
                return
            answer = journal.next()
            self._note_best(out, answer)
            assert self._carrier is not None
            out = self._carrier.advance(answer)
        self._pending_or_end(out)

    def _mismatch(self, index: int, out: Request | Done) -> None:
        now = fingerprint(*self.method.libraries)
        changed = differences(self._saved_fingerprint or now, now)
        asked = "the solver ended" if isinstance(out, Done) else f"it asked for a {out.kind.value}"
        text = (
            f"{self.name}: question {index + 1} of {len(self._journal)} differs from the recorded one ({asked}); "
            f"changed since: {changed}"
        )
        self._drop_carrier()
        if self._exact:
            raise ReplayMismatch(text + ". Load with exact=False to start anew from the best point")
        self._restart(text)
        self._pending_or_end(self._launch())

    def _restart(self, why: str) -> None:
        """Give the old path up: begin again at the incumbent, with an empty journal."""
        best = self._best
        x0 = self.start.x0 if best.x is None else best.x
        self.start = replace(self.start, x0=x0, loss=best.loss)
        self._journal = Journal()
        self.notes.append(f"started anew from the best point: {why}")

    def _pending_or_end(self, out: Request | Done) -> None:
        if isinstance(out, Done):
            if len(self._journal) == 0:
                raise StateError(
                    f"{self.name}: the solver ended without asking a single question: {out.value}"
                )
            self._end(out.value)
        else:
            self._pending = out

    def _end(self, ending: Ending) -> None:
        loss = float(ending.loss)
        # a solver that saw no finite loss has found nothing, whatever point it returns
        x = np.array(ending.x, dtype=np.float64) if math.isfinite(loss) else self.start.x0
        self._ending = ending._replace(x=x, loss=loss)
        self._drop_carrier()

    def _drop_carrier(self) -> None:
        carrier, self._carrier, self._pending = self._carrier, None, None
        if carrier is not None:
            carrier.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.name}: it was closed; start it again, or load its state into a new one")


def _same_step(request: Request, following: Request) -> bool:
    """Whether a question belongs to the step of the one before: what else is asked about that point."""
    if following.kind in _LOSSES:
        return False
    if following.kind in (Kind.GRADIENT, Kind.JACOBIAN):
        return True
    return request.x is not None and following.x is not None and np.array_equal(request.x, following.x)
