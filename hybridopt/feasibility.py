"""The constraints where they are asked: each point once, its graph kept for the Jacobian asked next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridopt import jacobian
from hybridopt.accounts import Accounts
from hybridopt.constraints import Constraints
from hybridopt.evaluation import Evaluation
from hybridopt.ledger import Ledger
from hybridopt.optimizer import Answer, Kind, Request
from hybridopt.vector import FloatArray


class Feasibility:
    """Evaluates constraints beside the loss and for themselves.

    Wherever a loss is evaluated (but at probes) the constraints are too, since the best point must keep them. A
    solver's question about them at that point is then free, and so is the loss's share where the solver had asked
    the constraints first. Of each constraint function a point costs one forward, a Jacobian as many backwards as it
    has rows. Linear constraints cost nothing.
    """

    def __init__(self, evaluation: Evaluation, accounts: Accounts, constraints: Constraints | None) -> None:
        self._evaluation = evaluation
        self._accounts = accounts
        self._constraints = constraints
        self._known: dict[bytes, FloatArray] = {}  # weights -> values, of the last point or population
        self._graph: tuple[bytes, int, list[Tensor | FloatArray]] | None = None  # weights, epoch, outputs

    @property
    def constrained(self) -> bool:
        """Whether there are any constraints."""
        return self._constraints is not None

    def cost(self, z: FloatArray | None) -> int:
        """Forwards that the constraints cost at a point in solver coordinates (None: where the weights stand)."""
        if self._constraints is None or not self._constraints.forwards:
            return 0
        x = self._evaluation.vector.read() if z is None else self._evaluation.decoded(z)
        return 0 if x.tobytes() in self._known else self._constraints.forwards

    def violation_here(self, graph: bool, *, member: bool = False) -> float:
        """By how much the point where the weights stand breaks the constraints; 0 without any.

        Args:
            graph: whether their Jacobian may be asked next.
            member: whether the point is one of several asked together.
        """
        if self._constraints is None:
            return 0.0
        return self._constraints.violation(self._here(graph, member))

    def answer(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        """All constraint functions, or their limits, at one point or at all rows of a population."""
        if self._constraints is None:
            return Answer(array=np.empty((3, 0)))
        assert request.x is not None
        rows = np.atleast_2d(request.x)
        told = []
        for z in rows:
            cost = self.cost(z)
            if cost:
                self._accounts.check(ledgers, 1, cost, 0)  # nothing is begun where no loss can follow
            if not self._evaluation.stands_at(z):
                self._evaluation.move(z)
            with self._evaluation.undone_on_error():
                values = self._here(request.keep_graph, len(rows) > 1)
            self._accounts.pay(ledgers, cost, 0)
            self._note_least(ledgers, values)
            told.append(self._finite(values))
        if len(rows) > 1:
            wanted = {self._evaluation.decoded(z).tobytes() for z in rows}
            self._known = {x: values for x, values in self._known.items() if x in wanted}
        if request.kind is Kind.LIMITS:
            return Answer(array=self._constraints.limits())
        return Answer(array=np.array(told) if request.x.ndim == 2 else told[0])

    def _note_least(self, ledgers: Sequence[Ledger], values: FloatArray) -> None:
        """Keep the point where the weights stand if it breaks the constraints least, in ledgers without any loss.

        Methods that ask no loss where constraints are broken would else end without a point where nothing keeps them.
        """
        waiting = [ledger for ledger in ledgers if math.isinf(ledger.best_loss)]
        if not waiting or not self._evaluation.keeps_best:
            return
        assert self._constraints is not None
        violation = self._constraints.violation(values)
        for ledger in waiting:
            if violation < ledger.best_violation:
                ledger.best_violation = violation
                ledger.best_point = self._evaluation.copy_point(ledger.best_point)

    @staticmethod
    def make_way(ledgers: Sequence[Ledger], loss: float, probe: bool) -> None:
        """Let a point whose loss is known go before those kept without one; called before it is booked."""
        if math.isfinite(loss) and not probe:
            for ledger in ledgers:
                if math.isinf(ledger.best_loss):
                    ledger.best_violation = math.inf

    def jacobian(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        """The Jacobian at one point, in solver coordinates; without an array if a function has no graph."""
        assert self._constraints is not None
        assert request.x is not None
        evaluation, vector = self._evaluation, self._evaluation.vector
        if not evaluation.stands_at(request.x):
            evaluation.move(request.x)
        assert evaluation.x is not None
        here = (evaluation.x.tobytes(), vector.epoch)
        if self._graph is None or self._graph[:2] != here:
            cost = self.cost(request.x)
            self._accounts.check(ledgers, 0, cost, 0)
            with evaluation.undone_on_error():
                self._known.pop(here[0], None)
                self._here(True, True)
            self._accounts.pay(ledgers, cost, 0)
            for ledger in ledgers:
                ledger.recomputed += self._constraints.forwards - cost
        assert self._graph is not None
        outputs = self._graph[2]
        tensors = [out for out in outputs if isinstance(out, Tensor)]
        if any(not out.requires_grad for out in tensors):
            return Answer()
        rows = sum(len(out) for out in tensors)
        self._accounts.check(ledgers, 0, 0, rows)
        parts = [
            jacobian.reverse(out, vector.tensors, evaluation.one_by_one)
            if isinstance(out, Tensor)
            else part.matrix
            for out, part in zip(outputs, self._constraints.parts, strict=True)
        ]
        self._accounts.pay(ledgers, 0, rows)
        whole = np.concatenate([part for part in parts if part is not None])
        if not np.isfinite(whole).all():
            self._accounts.reject(float("nan"), False, "constraint Jacobian")
            whole = np.nan_to_num(whole, nan=0.0, posinf=0.0, neginf=0.0)
        return Answer(array=evaluation.to_solver(whole))

    def _here(self, graph: bool, member: bool) -> FloatArray:
        """All values, shape (k,), where the weights stand; computed unless they are known."""
        evaluation, constraints = self._evaluation, self._constraints
        assert constraints is not None
        x = evaluation.vector.read() if evaluation.x is None else evaluation.x
        key = x.tobytes()
        if key not in self._known:
            outputs: list[Tensor | FloatArray] = evaluation.call(constraints.values, graph)
            parts = [
                out.detach().to("cpu", torch.float64).numpy() if isinstance(out, Tensor) else out
                for out in outputs
            ]
            self._graph = (key, evaluation.vector.epoch, outputs) if graph else None
            if not member:
                self._known.clear()
            self._known[key] = np.concatenate(parts) if parts else np.empty(0)
        return self._known[key]

    def _finite(self, values: FloatArray) -> FloatArray:
        """As told: what is no number lies infinitely far outside."""
        assert self._constraints is not None
        lower = self._constraints.limits()[0]
        far = np.where(np.isfinite(lower), -np.inf, np.inf)
        return np.where(np.isnan(values), far, values)

    def forget(self) -> None:
        """Free the graph that the last question left."""
        self._graph = None

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What is known of the last question, as tensors: whether the next one is free depends on it."""
        n = self._evaluation.vector.n
        x = np.frombuffer(b"".join(self._known), dtype=np.float64).reshape(-1, n)
        values = np.array(list(self._known.values())).reshape(len(x), -1) if len(x) else np.empty((0, 0))
        sizes = [] if self._constraints is None else [part.size for part in self._constraints.parts]
        return {"x": torch.tensor(x), "values": torch.tensor(values), "sizes": sizes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved one stood."""
        self.forget()
        if self._constraints is not None:
            for part, size in zip(self._constraints.parts, state["sizes"], strict=True):
                if size is not None:
                    part.settle(size)
        pairs = zip(state["x"].numpy(), state["values"].numpy(), strict=True)
        self._known = {x.tobytes(): values.copy() for x, values in pairs}
