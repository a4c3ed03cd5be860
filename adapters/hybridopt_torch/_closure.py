"""A torch optimizer whose `step` calls a closure (LBFGS): the call is turned inside out like a blocking solver."""

from __future__ import annotations

import copy
import hashlib
import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybridopt.carrier import Carrier, Done, Question, carry
from hybridopt.errors import ClosedError, MissingGradient, NonFiniteLoss, ReplayMismatch, StateError
from hybridopt.ledger import Reason
from hybridopt.machine import differences, fingerprint
from hybridopt.optimizer import Answer, HandOver, Incumbent, Kind, Need, Request, StageReport, Step
from hybridopt.trail import inverse_curvature
from hybridopt.vector import ParameterVector
from hybridopt_torch._inplace import load_optimizer

if TYPE_CHECKING:
    from hybridopt_torch._method import TorchMethod


class _Told(NamedTuple):
    """One answered closure call of the present outer step."""

    loss: float
    grads: list[Tensor | None]


class ClosureRun:
    """LBFGS and its like: one step is one evaluation asked for by the closure.

    An exception thrown into the middle of such a `step` would tear its state, so it runs suspended in a greenlet.
    What is saved is the optimizer as it stood when its present outer step began, and the (few) closure calls
    answered since; reviving replays those, and a digest tells whether it arrives at the same point. A loss that is
    not finite is told as the worst of its step, with zero gradients, so that a line search backs off.
    """

    needs = frozenset({Need.GRADIENT})

    reports: tuple[StageReport, ...] = ()

    def __init__(self, method: TorchMethod, vector: ParameterVector, warm: HandOver | None) -> None:
        self.method = method
        self.name = method.label
        self.vector = vector
        self.optimizer = method.make(vector)
        self.notes: list[str] = []
        self._carrier: Carrier | None = None
        self._pending: Request | None = None
        self._told: list[_Told] = []
        self._loss = math.inf
        self._known = warm is not None and math.isfinite(warm.loss)
        self._saved: list[Tensor] | None = None
        self._expected: tuple[str, dict[str, str]] | None = None
        self._exact = True
        self._ended = False
        self._closed = False
        if warm is not None and warm.x is not None:
            vector.write(vector.decode(warm.x))
        vector.claim(self)
        self._remember()

    # -- whose weights ------------------------------------------------------------------------------------------

    def evicted(self) -> None:
        """Save the point the closure stands at: somebody else is about to write the weights."""
        self._saved = self.vector.snapshot()

    def _hold(self) -> None:
        if self.vector.claim(self) and self._saved is not None:
            self.vector.restore(self._saved)
            self._saved = None

    def _remember(self) -> None:
        """Keep what an exact replay of the outer step that now begins needs."""
        self._begin_weights = self.vector.snapshot()
        self._begin_state = copy.deepcopy(self.optimizer.state_dict())
        self._told = []

    # -- the protocol -------------------------------------------------------------------------------------------

    def ask(self) -> Request:
        """See `Optimizer.ask`."""
        if self._closed or self._ended:
            raise ClosedError(f"{self.name}: it has ended or was closed; start it again, or load its state")
        if self._pending is None or self._carrier is None or not self._carrier.usable():
            self._revive()
        self._hold()
        assert self._pending is not None
        return self._pending

    def tell(self, answer: Answer) -> Step | None:
        """See `Optimizer.tell`."""
        if answer.stop is not None:
            raise answer.stop
        grads = [t.grad for t in self.vector.tensors]  # before `ask`: reviving the step would overwrite them
        self.ask()
        if answer.finite:
            if all(g is None for g in grads):
                raise MissingGradient(
                    "gradient: the loss depends on none of the selected weights; select others, or use a "
                    "gradient-free method"
                )
            self._loss = answer.loss if not self._told else min(self._loss, answer.loss)
            self._known = True
            loss = answer.loss
        elif not self._known:
            raise NonFiniteLoss.at_start(answer.loss)
        else:
            grads = [torch.zeros_like(t) for t in self.vector.tensors]
            loss = self._worse()
        told = _Told(loss, [None if g is None else g.detach().clone() for g in grads])
        self._told.append(told)
        before = self._begin_weights
        began = math.isfinite(self._told[0].loss)
        if self._advance(told) and began and self._stuck(before):
            self._ended = True
            return Step(answer.loss, self.name, Reason.CONVERGED, "an outer step left the weights unchanged")
        return Step(answer.loss, self.name)

    def _worse(self) -> float:
        """What stands for a loss that is not finite: more than any of this step (torch interpolates +inf to nan)."""
        worst = max((t.loss for t in self._told), default=math.inf)
        return worst + abs(worst) + 1.0

    def _stuck(self, before: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(before, self._begin_weights, strict=True))

    @property
    def incumbent(self) -> Incumbent:
        """The weights the present outer step began with, and the lowest loss it has seen."""
        flat = self.vector.gather(self._begin_weights)
        return Incumbent(self._loss, self.vector.encode(flat))

    def close(self) -> None:
        """Unwind the suspended step and let go of the tensors."""
        self._drop_carrier()
        self.vector.release(self)
        self._closed = True

    def hand_over(self) -> HandOver:
        """See `Optimizer.hand_over`: the curvature in the pairs that L-BFGS keeps."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = self.optimizer.state.get(params[0], {})
        turned, moved = state.get("old_dirs"), state.get("old_stps")
        same = len(params) == len(self.vector.tensors) and all(map(operator.is_, params, self.vector.tensors))
        if not (turned and moved and same):
            return HandOver()
        s, y = (torch.stack(pairs).to("cpu", torch.float64).numpy() for pairs in (moved, turned))
        x = self.vector.read() if self._saved is None else self.vector.gather(self._saved)
        slope = self.vector.coordinates.slope(x)
        slope = np.ones(self.vector.n) if slope is None else slope
        return HandOver(covariance=inverse_curvature(s / slope, y * slope))

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Weights and torch state at the beginning of the outer step, and the calls answered since."""
        return {
            "method": str(self.method),
            "weights": [t.clone() for t in self._begin_weights],
            "optimizer": copy.deepcopy(self._begin_state),
            "told": [[t.loss, [None if g is None else g.clone() for g in t.grads]] for t in self._told],
            "loss": self._loss,
            "known": self._known,
            "ended": self._ended,
            "at": self._at(),
            "notes": list(self.notes),
            "fingerprint": fingerprint() if self._expected is None else dict(self._expected[1]),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """See `Optimizer.load_state_dict`; with `exact=False` an outer step that goes another way begins anew."""
        if state["method"] != str(self.method):
            raise StateError(f"state: it was saved by {state['method']!r}, this is {str(self.method)!r}")
        self._drop_carrier()
        self._saved = None
        self._begin_weights = [t.clone() for t in state["weights"]]
        self._begin_state = copy.deepcopy(state["optimizer"])
        self._told = [_Told(loss, list(grads)) for loss, grads in state["told"]]
        self._loss, self._known = state["loss"], state["known"]
        self._ended = state["ended"]
        self._expected = None if state["at"] is None else (state["at"], dict(state["fingerprint"]))
        self._exact = exact
        self.notes = list(state["notes"])
        self.vector.claim(self)
        self.vector.restore(self._begin_weights)

    # -- inside -------------------------------------------------------------------------------------------------

    def _revive(self) -> None:
        """Begin the outer step anew from where it began, on the recorded answers.

        Raises:
            ReplayMismatch: it arrives at another point than the recorded one (and `exact` is True).
        """
        at, saved = self._expected or (self._at(), fingerprint())
        begin, told = (self._begin_weights, self._begin_state), self._told
        self._begin()
        for item in told:
            self._told.append(item)
            if self._advance(item):
                break  # over too early: `_at` differs
        if at is None or self._digest() == at:
            self._expected = None
            return
        text = (
            f"{self.name}: after {len(told)} recorded closure calls the present step stands at another point; "
            f"changed since: {differences(saved, fingerprint())}"
        )
        self._begin_weights, self._begin_state = begin
        if self._exact:
            self._drop_carrier()
            self._told, self._expected = told, (at, saved)
            raise ReplayMismatch(text + ". Load with exact=False to begin this step anew")
        self._expected = None
        self.notes.append(f"began a step anew: {text}")
        self._begin()

    def _begin(self) -> None:
        self._drop_carrier()
        self.vector.claim(self)
        self._saved = None
        self.vector.restore(self._begin_weights)
        load_optimizer(self.optimizer, self._begin_state)
        self._told = []
        self._launch()

    def _at(self) -> str | None:
        """Digest of the point where the closure waits for its answer; None while it does not."""
        if self._expected is not None:
            return self._expected[0]
        return None if self._pending is None else self._digest()

    def _digest(self) -> str:
        code = hashlib.blake2b(digest_size=8)
        for t in self.vector.tensors if self._saved is None else self._saved:
            code.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return code.hexdigest()

    def _launch(self) -> None:
        optimizer = self.optimizer

        def body(question: Question) -> None:
            first = True

            def closure() -> Tensor:
                nonlocal first
                request = Request(Kind.VALUE_AND_GRADIENT, None, commit=first)
                first = False
                # a tensor, as a closure written by hand returns; float64 holds any loss exactly
                return torch.tensor(question(request).loss, dtype=torch.float64)

            optimizer.step(closure)  # type: ignore[arg-type]

        self._carrier = carry(body, "greenlet")
        out = self._carrier.advance(None)
        if isinstance(out, Done):
            raise StateError(f"{self.name}: its step() asked for no evaluation")
        self._pending = out

    def _advance(self, told: _Told) -> bool:
        """Tell the closure; begin the next outer step when the present one is over (True then)."""
        assert self._carrier is not None
        for tensor, grad in zip(self.vector.tensors, told.grads, strict=True):
            tensor.grad = None if grad is None else grad.clone()
        self._pending = None
        out = self._carrier.advance(Answer(told.loss))
        self.vector.touch()
        if not isinstance(out, Done):
            self._pending = out
            if self.vector.bounded:
                self.vector.project()
            return False
        self.vector.project()
        self._remember()
        self._launch()
        return True

    def _drop_carrier(self) -> None:
        carrier, self._carrier, self._pending = self._carrier, None, None
        if carrier is not None:
            carrier.close()
