"""A split at work: each part's questions put among the weights of the others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hybridopt.compose._sequence import SequenceRun
from hybridopt.compose.chain import Chain
from hybridopt.errors import ClosedError, MethodError, StateError
from hybridopt.ledger import Ledger
from hybridopt.optimizer import (
    Answer,
    FloatArray,
    HandOver,
    Incumbent,
    Kind,
    Need,
    Request,
    StageReport,
    Step,
)
from hybridopt.randomness import derive_seed
from hybridopt.vector import ParameterVector

if TYPE_CHECKING:
    from hybridopt.compose.split import Split

_LOSSES = (
    Kind.VALUE, Kind.VALUE_AND_GRADIENT, Kind.POPULATION, Kind.VALUES_AND_GRADIENTS, Kind.RESIDUALS,
)  # fmt: skip
_SHARED = (Kind.VALUE, Kind.VALUE_AND_GRADIENT, Kind.GRADIENT)


@dataclass
class _Part:
    """One part at work."""

    pattern: str
    index: npt.NDArray[np.intp]
    """Its weights among all, shape (its n,)."""
    vector: ParameterVector
    run: SequenceRun
    home: FloatArray | None = None
    """Where it stands, in its solver coordinates; None = at its method's own point."""

    def stand(self) -> FloatArray | None:
        """Where it stands, in its solver coordinates; None = where its weights do."""
        return self.run.incumbent.x if self.home is None else self.home

    def flat(self) -> FloatArray:
        """Where it stands, in its solver coordinates."""
        x = self.stand()
        return self.vector.encode(self.vector.read()) if x is None else x


_Group: TypeAlias = list[tuple[int, Request]]


class SplitRun:
    """A split at work (an `Optimizer`).

    Parts move in rounds: each moves once, together with those that can be told of the same evaluation. A question of
    a part is put to the whole vector, and its share of the answer is told back.

    The first part has the split's own seed, later ones a seed derived from it and from their place. Each part's ledger
    books every evaluation that the part is told of.
    """

    def __init__(self, method: Split, vector: ParameterVector, seed: int, warm: HandOver | None) -> None:
        if vector.constrained and len(method.parts) > 1:
            raise MethodError(
                f"split: it cannot keep constraints, which all {len(method.parts)} parts would move at once; use one "
                "method for all weights"
            )
        self.method = method
        self.vector = vector
        self.seed = seed
        self.name = str(method)
        self._parts: list[_Part] = []
        self._standing = (0.0, math.inf if warm is None else warm.loss)  # violation and loss where all stand
        self._queue: list[int] = []  # parts that have yet to move in this round; none = a round begins
        self._moving: list[int] = []  # parts in the middle of their turn
        self._made = 0  # steps in this turn
        self._base: FloatArray | None = None  # the point that the moving parts were told of
        self._group: _Group = []
        self._pending: Request | None = None
        self._notes: list[str] = []
        self._closed = False
        vector.claim(self)
        for i, (names, (pattern, part)) in enumerate(zip(method.assign(vector), method.weights, strict=True)):
            index = np.concatenate([np.arange(vector.n)[vector.slices[name]] for name in names])
            own = vector.part(names)
            given = warm if warm is None or len(index) == vector.n else _share(warm, index).only(part.takes)
            run = SequenceRun(Chain((part,)), own, seed if i == 0 else derive_seed(seed, i), given)
            self._parts.append(_Part(pattern, index, own, run))

    # -- whose weights ------------------------------------------------------------------------------------------

    def evicted(self) -> None:
        """Let every part that keeps its iterate in its weights save it: somebody is about to write them."""
        for part in self._parts:
            part.vector.claim(None)

    def close(self) -> None:
        """Close all parts."""
        for part in self._parts:
            part.run.close()
        self.vector.release(self)
        self._closed = True

    # -- asking -------------------------------------------------------------------------------------------------

    def ask(self) -> Request:
        """See `Optimizer.ask`."""
        if self._closed or self.ended:
            raise ClosedError(f"{self.name}: it has ended or was closed; start it again, or load its state")
        if self._pending is not None:
            return self._pending
        self.vector.claim(self)
        self._group = self._together()
        requests = [request for _, request in self._group]
        first = requests[0]
        whole = first._replace(
            commit=any(request.commit for request in requests),
            keep_graph=any(request.keep_graph for request in requests),
            scopes=tuple(scope for request in requests for scope in request.scopes),
        )
        if first.x is None:
            self._place()
            return whole  # not kept: somebody may write the weights before it is answered
        direction = None
        if first.direction is not None:
            direction = np.zeros(self.vector.n)
            direction[self._parts[self._group[0][0]].index] = first.direction
        self._pending = whole._replace(x=self._joined(), direction=direction)
        return self._pending

    def _together(self) -> _Group:
        """The part whose turn it is, and those that can be told of the same evaluation, with their questions."""
        lead, *others = self._moving or self._queue or self._live()
        first = self._parts[lead].run.ask()
        group = [(lead, first)]
        if self.method.order == "simultaneous" and _shareable(first):
            for i in others:
                request = self._parts[i].run.ask()
                same = request.kind is first.kind and (request.x is None) == (first.x is None)
                if same and _shareable(request):
                    group.append((i, request))
        return group

    def _live(self) -> list[int]:
        return [i for i, part in enumerate(self._parts) if not part.run.ended]

    def _place(self) -> None:
        """Bring the weights of all parts that are not asked about to where they stand."""
        asked = {i for i, _ in self._group}
        for i, part in enumerate(self._parts):
            x = None if i in asked else part.stand()
            if x is not None:
                part.vector.write(part.vector.decode(x))

    def _joined(self) -> FloatArray:
        """The point or points of the whole that the group asks about."""
        first = self._group[0][1]
        assert first.x is not None
        asked = {i for i, _ in self._group}
        if _opens(first) or self._base is None:
            self._base = np.zeros(self.vector.n)
            for i, part in enumerate(self._parts):
                if i not in asked:
                    self._base[part.index] = part.flat()
            for i, request in self._group:
                if request.x is not None and request.x.ndim == 1:
                    self._base[self._parts[i].index] = request.x
        x = np.broadcast_to(self._base, (*first.x.shape[:-1], self.vector.n)).copy()
        for i, request in self._group:
            x[..., self._parts[i].index] = request.x
        return x

    # -- telling ------------------------------------------------------------------------------------------------

    def tell(self, answer: Answer) -> Step | None:
        """See `Optimizer.tell`."""
        group, self._pending = self._group, None
        if answer.stop is not None:
            return self._stop(answer, answer.stop.ledger)
        self._settle(answer)
        if group[0][1].x is None and answer.finite:
            self._fill_gradients()
        if not self._moving:
            told = [i for i, _ in group]
            self._moving, self._made = told, 0
            self._queue = [i for i in self._queue or self._live() if i not in told]
        steps = {i: self._parts[i].run.tell(self._share_of(i, request, answer)) for i, request in group}
        done = [step for step in steps.values() if step is not None]
        self._made += bool(done)
        going = [i for i, request in group if self._goes_on(i, request, steps[i])]
        self._moving = [i for i in self._moving if i not in steps or i in going]
        if not self._moving:
            self._base = None
        if self.ended:
            return next(step for step in reversed(done) if step.reason is not None)
        if len(done) < len(steps):
            return None  # a gradient is still wanted at this point
        names = dict.fromkeys(step.method for step in done)
        return Step(done[0].loss, "+".join(names))

    def _stop(self, answer: Answer, limit: Ledger) -> Step | None:
        """One part may not evaluate what was asked; the others have been told nothing and ask again."""
        i = next(i for i, request in self._group if any(scope is limit for scope in request.scopes))
        step = self._parts[i].run.tell(answer)
        if step is None or step.reason is None:
            return step
        self._moving = [j for j in self._moving if j != i]
        self._queue = [j for j in self._queue if j != i]
        if not self._moving:
            self._base = None
        return step if self.ended else None

    def _goes_on(self, i: int, request: Request, step: Step | None) -> bool:
        """Whether it is still the part's turn: what it asks next concerns the point just told, or the turn is long."""
        run = self._parts[i].run
        if run.ended or step is None:
            return not run.ended
        following = run.ask()
        if not _opens(following) and (following.probe or np.array_equal(following.x, request.x)):  # type: ignore[arg-type]
            return True
        return self.method.order == "alternating" and self._made < self.method.turn

    def _settle(self, answer: Answer) -> None:
        """Note where the parts stand after an answer, before it is told."""
        first = self._group[0][1]
        told = (answer.violation, answer.loss)
        if first.x is None:
            for i, _ in self._group:
                self._parts[i].home = None
            if answer.finite:
                self._standing = told
            return
        for i, _ in self._group:
            self._parts[i].home = self._parts[i].flat()
        if not _opens(first) or not told < self._standing:
            return
        self._standing = told
        for i, request in self._group:
            assert request.x is not None
            x = request.x if answer.losses is None else request.x[int(np.argmin(answer.losses))]
            self._parts[i].home = x.copy()

    def _fill_gradients(self) -> None:
        """A part that the loss does not depend on gets gradients of zero, as any single weight would."""
        if all(tensor.grad is None for tensor in self.vector.tensors):
            return
        for i, _ in self._group:
            part = self._parts[i]
            if all(tensor.grad is None for tensor in part.vector.tensors):
                for tensor in part.vector.tensors:
                    tensor.grad = torch.zeros_like(tensor)
                text = f"split: the loss does not depend on the weights of {part.pattern!r}"
                if text not in self._notes:
                    self._notes.append(text)

    def _share_of(self, i: int, request: Request, answer: Answer) -> Answer:
        """What of an answer about the whole is the part's."""
        index = self._parts[i].index
        if answer.gradient is not None:
            answer = answer._replace(gradient=answer.gradient[..., index])
        array = answer.array
        if array is not None and request.kind in _DERIVATIVES:
            array = array[np.ix_(index, index)] if request.kind is Kind.HESSIAN else array[..., index]
            answer = answer._replace(array=array)
        return answer

    # -- looking ------------------------------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[Need]:
        """Those of all parts."""
        return frozenset[Need]().union(*(part.run.needs for part in self._parts))

    @property
    def ended(self) -> bool:
        """Whether every part's method has ended."""
        return all(part.run.ended for part in self._parts)

    @property
    def incumbent(self) -> Incumbent:
        """Where all parts stand, and the loss last told of it; of a single part its method's own word."""
        if len(self._parts) == 1:
            return self._parts[0].run.incumbent
        loss = self._standing[1]
        if all(part.stand() is None for part in self._parts):
            return Incumbent(loss, None)
        x = np.empty(self.vector.n)
        for part in self._parts:
            x[part.index] = part.flat()
        return Incumbent(loss, x)

    def hand_over(self) -> HandOver:
        """What a single part hands over; what several know of their own weights fits no method for all."""
        return self._parts[0].run.hand_over() if len(self._parts) == 1 else HandOver()

    @property
    def notes(self) -> Sequence[str]:
        """Notes of all parts, each once."""
        notes = (*self._notes, *(note for part in self._parts for note in part.run.notes))
        return list(dict.fromkeys(notes))

    @property
    def reports(self) -> tuple[StageReport, ...]:
        """Those of all parts, with their patterns."""
        return tuple(
            replace(report, method=f"{json.dumps(part.pattern, ensure_ascii=False)}: {report.method}")
            for part in self._parts
            for report in part.run.reports
        )

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where each part stands and whose turn it is, and the parts' own states."""
        base = self._base if self._moving else None
        return {
            "method": self.name,
            "seed": self.seed,
            "standing": list(self._standing),
            "queue": list(self._queue),
            "moving": list(self._moving),
            "made": self._made,
            "base": None if base is None else torch.tensor(base),
            "homes": [None if part.home is None else torch.tensor(part.home) for part in self._parts],
            "notes": list(self._notes),
            "parts": [part.run.state_dict() for part in self._parts],
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """See `Optimizer.load_state_dict`."""
        if state["method"] != self.name:
            raise StateError(f"state: it was saved by {state['method']!r}, this is {self.name!r}")
        self.seed = state["seed"]
        violation, loss = state["standing"]
        self._standing = (violation, loss)
        self._queue, self._moving = list(state["queue"]), list(state["moving"])
        self._made = state["made"]
        self._base = None if state["base"] is None else state["base"].numpy().copy()
        self._group, self._pending = [], None
        self._notes = list(state["notes"])
        self.vector.claim(self)
        for part, home, saved in zip(self._parts, state["homes"], state["parts"], strict=True):
            part.home = None if home is None else home.numpy().copy()
            part.run.load_state_dict(saved, exact=exact)


_DERIVATIVES = (Kind.JACOBIAN, Kind.CONSTRAINT_JACOBIAN, Kind.HESSIAN, Kind.HESSIAN_VECTOR)


def _opens(request: Request) -> bool:
    """Whether it asks for the loss at a point of its own, not for more about one."""
    return request.kind in _LOSSES and not request.probe


def _shareable(request: Request) -> bool:
    """Whether another part can be told of the same evaluation."""
    # a ledger finds the budget that it has a share of among those before it, where a sibling's must not stand
    resolved = not any(scope.shares for scope in request.scopes)
    return request.kind in _SHARED and not request.probe and resolved


def _share(warm: HandOver, index: npt.NDArray[np.intp]) -> HandOver:
    """What a hand-over says of some of the weights; its points' losses are those of all."""
    x = None if warm.x is None else warm.x[index]
    sigma, covariance = warm.sigma, warm.covariance
    if covariance is not None:
        covariance = covariance[index] if covariance.ndim == 1 else covariance[np.ix_(index, index)]
        diagonal = covariance if covariance.ndim == 1 else np.diag(covariance)
        mean = float(np.exp(np.log(diagonal).mean()))
        covariance = covariance / mean
        sigma = None if sigma is None else sigma * math.sqrt(mean)
    return HandOver(x, warm.loss, sigma, covariance)
