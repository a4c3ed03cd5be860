"""Answers to questions about many points: in batches or one by one, cut where a budget ends, no row twice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hybridopt.accounts import Accounts
from hybridopt.batch import Batch, Choice, out_of_memory
from hybridopt.errors import NonFiniteLoss
from hybridopt.evaluation import Evaluation
from hybridopt.ledger import Ledger
from hybridopt.optimizer import Answer, Request
from hybridopt.vector import FloatArray

FEW = 4  # fewer points than this are evaluated one by one: one batch costs about as much on a small model


class _Begun(NamedTuple):
    """A population of which some rows are answered."""

    x: FloatArray
    losses: list[float]
    """As told, in the order of the rows."""
    first: int
    """The row with which the batches begin."""


class Generations:
    """Answers populations and remembers a half-answered one.

    Rows are answered in order. Those up to the second finite loss come one by one; then a batch of these two is
    checked against them, which costs two forwards and no evaluation. From there on the rows are cut into batches
    of a fixed size. Of the batch in which a limit falls only the rows that fit are evaluated: copies of the first
    of them stand in for the others. When the limit was raised, those answered before stand in for themselves. So
    a row is computed in the same place of a batch of the same size, and gets the same bits, however a run is cut.
    Stand-ins are booked as `recomputed`.
    """

    def __init__(self, evaluation: Evaluation, accounts: Accounts, choice: Choice) -> None:
        self._evaluation = evaluation
        self._accounts = accounts
        self.batch = Batch(evaluation, choice)
        self.gradient_batch = Batch(evaluation, choice, gradients=True)
        self._begun: _Begun | None = None

    def forget(self) -> None:
        """Drop a half-answered population: nobody will ask for the rest of it."""
        self._begun = None

    def answer(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        """The losses of all rows; `Stop` when a limit forbids the next one, what was answered so far is kept."""
        assert request.x is not None
        rows = len(request.x)
        if self._begun is None or not np.array_equal(self._begun.x, request.x):
            self._begun = _Begun(request.x.copy(), [], 0)
        self.batch.wanted |= rows >= FEW
        while (done := len(self._begun.losses)) < rows:
            pair = self._pair(self._begun.losses)
            if rows < FEW or self.batch.way == "loop" or (self.batch.way == "open" and pair is None):
                told = [self._one(request.x[done], done == 0 and not request.probe, request.probe, ledgers)]
            elif self.batch.way == "open":
                told = []
                self._verify(request.x[pair], [self._begun.losses[i] for i in pair or ()], ledgers)
            else:
                told = self._some(request, ledgers)
            self._begun.losses.extend(told)
        losses, self._begun = np.array(self._begun.losses), None
        finite = np.isfinite(losses)
        if rows and not finite.any():
            for ledger in ledgers:
                ledger.nonfinite_in_a_row += 1
        return Answer(float(losses.min()) if rows else math.inf, losses, None, bool(finite.all()))

    @staticmethod
    def _pair(losses: Sequence[float]) -> list[int] | None:
        """The first two rows whose losses are finite."""
        finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
        return finite[:2] if len(finite) > 1 else None

    def _one(self, z: FloatArray, fresh: bool, probe: bool, ledgers: Sequence[Ledger]) -> float:
        """One row, where the weights stand."""
        evaluation = self._evaluation
        self._accounts.check(ledgers, 1, 1, evaluation.backwards(False, before=True))
        evaluation.move(z)
        with evaluation.undone_on_error():
            value, _ = evaluation.value(fresh, False, False)
        return self._accounts.book_member(ledgers, value, 1, evaluation.backwards(False), probe)

    def _verify(self, z: FloatArray, losses: Sequence[float], ledgers: Sequence[Ledger]) -> None:
        """Decide between batches and one by one; not begun where the next row would not fit any more."""
        self._accounts.check(ledgers, 1, 3, 0)
        if self.batch.verify(self._evaluation.decoded(z), losses):
            for ledger in ledgers:
                ledger.forward += 2
        assert self._begun is not None
        self._begun = self._begun._replace(first=len(self._begun.losses))

    def _some(self, request: Request, ledgers: Sequence[Ledger]) -> list[float]:
        """The next batch, or as much of it as the limits allow."""
        assert self._begun is not None
        assert request.x is not None
        evaluation, batch, first = self._evaluation, self.batch, self._begun.first
        done = len(self._begun.losses)
        low = first + (done - first) // batch.rows * batch.rows
        high = min(low + batch.rows, len(request.x))
        fit = self._accounts.fitting(ledgers, high - done)
        x = evaluation.decoded(request.x[low:high])
        x[done - low + fit :] = x[done - low]
        try:
            with evaluation.undone_on_error():
                values, _ = batch.evaluate(x, done == 0 and not request.probe)
        except Exception as error:
            if out_of_memory(error):
                batch.shrink(high - low, self._accounts.ledger.evaluations)
                self._begun = self._begun._replace(first=done)
                return []
            if batch.choice == "vmap":
                raise
            # if the row raises alone too, the error is the loss's own; otherwise the batch is at fault
            told = [self._one(request.x[done], done == 0 and not request.probe, request.probe, ledgers)]
            batch.leave(error)
            return told
        for ledger in ledgers:
            ledger.recomputed += high - low - fit
        return self._book(x[done - low :], values[done - low :][:fit], request.probe, ledgers)

    def _book(
        self, x: FloatArray, values: Sequence[float], probe: bool, ledgers: Sequence[Ledger]
    ) -> list[float]:
        """Book the members of a batch. Under `nonfinite="raise"` all are booked, then the first bad one raises."""
        told: list[float] = []
        refused: NonFiniteLoss | None = None
        for row, value in zip(x, values, strict=False):
            self._evaluation.imagine(row)
            try:
                loss = self._accounts.book_member(ledgers, value, 1, 0, probe)
            except NonFiniteLoss as error:
                refused = refused or error
            if refused is None:
                told.append(loss)
        if refused is not None:
            assert self._begun is not None
            self._begun.losses.extend(told)
            raise refused
        return told

    # -- values and gradients -----------------------------------------------------------------------------------

    def values_and_gradients(self, z: FloatArray, ledgers: Sequence[Ledger]) -> tuple[FloatArray, FloatArray]:
        """Losses, shape (popsize,), and gradients, shape (popsize, n); see `Objective.values_and_gradients`."""
        batch, rows = self.gradient_batch, len(z)
        x, losses, gradients = self._evaluation.decoded(z), np.full(rows, math.inf), np.zeros(z.shape)
        batch.wanted |= rows >= FEW
        check = 2 if batch.way == "open" and rows >= FEW else 0
        forward = rows * (2 if self._evaluation.surrogate is not None else 1)
        backward = rows * self._evaluation.backwards(True, before=True)
        self._accounts.check(ledgers, rows, forward + check, backward + check)
        done = 0
        while done < rows:
            pair = self._pair(losses[:done].tolist())
            if rows < FEW or batch.way == "loop" or (batch.way == "open" and pair is None):
                losses[done], gradients[done] = self._slope(z[done], done == 0, ledgers)
                done += 1
            elif batch.way == "open":
                if batch.verify(x[pair], losses[pair].tolist(), gradients[pair]):
                    for ledger in ledgers:
                        ledger.forward += 2
                        ledger.backward += 2
            else:
                part = slice(done, min(done + batch.rows, rows))
                try:
                    with self._evaluation.undone_on_error():
                        values, slopes = batch.evaluate(x[part], done == 0)
                except Exception as error:  # noqa: BLE001 - raised again below if it is the loss's own
                    if out_of_memory(error):
                        batch.shrink(part.stop - done, self._accounts.ledger.evaluations)
                        continue
                    losses[done], gradients[done] = self._slope(z[done], done == 0, ledgers)
                    done += 1
                    batch.leave(error)
                    continue
                assert slopes is not None
                for value, slope in zip(values, slopes, strict=True):
                    self._evaluation.imagine(x[done])
                    losses[done], gradients[done] = self._told(value, slope, 1, 1, ledgers)
                    done += 1
        if rows and not np.isfinite(losses).any():
            for ledger in ledgers:
                ledger.nonfinite_in_a_row += 1
        return losses, gradients

    def _slope(self, z: FloatArray, fresh: bool, ledgers: Sequence[Ledger]) -> tuple[float, FloatArray]:
        """Value and gradient of one row, where the weights stand."""
        evaluation = self._evaluation
        evaluation.move(z)
        gradient: FloatArray | None = np.zeros(len(z))
        with evaluation.undone_on_error():
            value, kept = evaluation.value(fresh, True, False)
            if math.isfinite(value):
                grads = evaluation.require_graph(evaluation.gradients(kept, False))
                gradient, _ = evaluation.deliver(grads, False)
        assert gradient is not None
        finite = math.isfinite(value)
        forward = 2 if evaluation.surrogate is not None and finite else 1
        return self._told(value, gradient, forward, evaluation.backwards(finite), ledgers)

    def _told(
        self, value: float, gradient: FloatArray, forward: int, backward: int, ledgers: Sequence[Ledger]
    ) -> tuple[float, FloatArray]:
        """Book one row and return what is told of it: +inf and zeros unless loss and gradient are finite."""
        loss = self._accounts.book_member(ledgers, value, forward, backward, False)
        if math.isfinite(loss) and not np.isfinite(gradient).all():
            self._accounts.reject(math.nan, False, "gradient")
            loss = math.inf
        return loss, gradient if math.isfinite(loss) else np.zeros_like(gradient)

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The half-answered population and the ways of the batches, as plain data."""
        begun = self._begun
        return {
            "begun": None
            if begun is None
            else [torch.tensor(begun.x), torch.tensor(begun.losses, dtype=torch.float64), begun.first],
            "batch": self.batch.state_dict(),
            "gradient_batch": self.gradient_batch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved one stood."""
        self._begun = None
        if state["begun"] is not None:
            x, losses, first = state["begun"]
            self._begun = _Begun(x.numpy().copy(), losses.tolist(), first)
        self.batch.load_state_dict(state["batch"])
        self.gradient_batch.load_state_dict(state["gradient_batch"])
