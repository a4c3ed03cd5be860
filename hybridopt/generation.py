"""Answers to questions about many points: in batches or one by one, cut where a budget ends, no row twice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hybridopt.accounts import Accounts
from hybridopt.batch import Batch, Choice, out_of_memory
from hybridopt.errors import BoundsError, NonFiniteLoss
from hybridopt.evaluation import Evaluation, nowhere
from hybridopt.feasibility import Feasibility
from hybridopt.ledger import Ledger
from hybridopt.optimizer import Answer, Kind, Request
from hybridopt.rows import own
from hybridopt.vector import FloatArray

FEW = 4  # fewer points than this are evaluated one by one: one batch costs about as much on a small model


class _Begun(NamedTuple):
    """A population of which some rows are answered."""

    x: FloatArray
    losses: list[float]
    """As told, in the order of the rows."""
    gradients: list[FloatArray] | None
    """Likewise; None where they are not asked for."""
    first: int
    """The row with which the batches begin."""


class Generations:
    """Answers populations and remembers a half-answered one.

    Rows are answered in order. Those up to the second finite loss come one by one; then a batch of these two is
    checked against them, which costs two forwards and no evaluation. From there on the rows are cut into batches
    of a fixed size. Of the batch in which a limit falls only the rows that fit are evaluated: copies of the first
    of them stand in for the others. When the limit was raised, those answered before stand in for themselves. So
    a row is computed in the same place of a batch of the same size, and gets the same bits, however a run is cut
    (where each row draws numbers of its own, a batch that was cut draws them again). Stand-ins are booked as
    `recomputed`.
    """

    def __init__(
        self, evaluation: Evaluation, accounts: Accounts, feasibility: Feasibility, choice: Choice
    ) -> None:
        self._evaluation = evaluation
        self._accounts = accounts
        self._feasibility = feasibility
        choice = (
            "loop" if feasibility.constrained else choice
        )  # constraints are evaluated where the weights stand
        self.batch = Batch(evaluation, choice)
        self.gradient_batch = Batch(evaluation, choice, gradients=True)
        self._begun: _Begun | None = None

    def forget(self) -> None:
        """Drop a half-answered population: nobody will ask for the rest of it."""
        self._begun = None

    def answered(self, x: FloatArray) -> int:
        """How many rows of this population were answered before a limit cut it."""
        return len(self._begun.losses) if self._begun is not None and np.array_equal(self._begun.x, x) else 0

    def answer(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        """The losses of all rows, with their gradients where they are asked for.

        Raises:
            Stop: a limit forbids the next row; what was answered so far is kept.
        """
        assert request.x is not None
        rows, slopes = len(request.x), request.kind is Kind.VALUES_AND_GRADIENTS
        begun = self._begun
        if (
            begun is None
            or (begun.gradients is not None) is not slopes
            or not np.array_equal(begun.x, request.x)
        ):
            begun = self._begun = _Begun(own(request.x), [], [] if slopes else None, 0)
        batch = self.gradient_batch if slopes else self.batch
        batch.wanted |= rows >= FEW
        while (done := len(begun.losses)) < rows:
            pair = self._pair(begun.losses) if batch.way == "open" else None
            if rows < FEW or batch.way == "loop" or (batch.way == "open" and pair is None):
                self._one(begun, done, request.probe, ledgers)
            elif batch.way == "open":
                assert pair is not None
                self._verify(begun, pair, batch, ledgers)
                begun = self._begun = begun._replace(first=done)
            elif not self._some(begun, batch, request.probe, ledgers):
                begun = self._begun = begun._replace(first=done)
        self._begun = None
        losses = np.array(begun.losses)
        lowest, highest = _extremes(losses) if rows else (math.inf, -math.inf)
        if rows and lowest == math.inf:
            for ledger in ledgers:
                ledger.nonfinite_in_a_row += 1
            alone = not any(ledger.rivals for ledger in ledgers)
            if slopes and alone and self._accounts.ledger.evaluations == rows:
                self._accounts.reject(math.nan, start=True)
        gradients = None if begun.gradients is None else np.array(begun.gradients).reshape(request.x.shape)
        keeps_best, paired = self._evaluation.keeps_best, self._evaluation.paired
        return Answer(lowest, losses, gradients, highest < math.inf, keeps_best=keeps_best, paired=paired)

    @staticmethod
    def _pair(losses: Sequence[float]) -> list[int] | None:
        """The first two rows whose losses are finite."""
        finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
        return finite[:2] if len(finite) > 1 else None

    def _one(self, begun: _Begun, row: int, probe: bool, ledgers: Sequence[Ledger]) -> None:
        """One row, where the weights stand."""
        evaluation, feasibility, z = self._evaluation, self._feasibility, begun.x[row]
        fresh = row == 0 and not probe
        if begun.gradients is not None:
            self._slope(begun, z, fresh, ledgers)
            return
        forward = 1 if probe else 1 + feasibility.cost(z)
        self._accounts.check(ledgers, 1, forward, evaluation.backwards(False, before=True))
        evaluation.move(z)
        with evaluation.undone_on_error():
            value, _ = evaluation.value(fresh, False, False)
            asked = not (probe and feasibility.constrained)
            violation = feasibility.violation_here(False, member=True) if asked else math.inf
        feasibility.make_way(ledgers, value, probe)
        begun.losses.append(
            self._accounts.book_member(ledgers, value, forward, evaluation.backwards(False), probe, violation)
        )

    def _slope(self, begun: _Begun, z: FloatArray, fresh: bool, ledgers: Sequence[Ledger]) -> None:
        """One row and its gradient."""
        evaluation = self._evaluation
        surrogate = evaluation.surrogate is not None
        self._accounts.check(ledgers, 1, 1 + surrogate, evaluation.backwards(True, before=True))
        evaluation.move(z)
        gradient: FloatArray | None = np.zeros(len(z))
        with evaluation.undone_on_error():
            value, kept = evaluation.value(fresh, True, False)
            finite = math.isfinite(value)
            if finite:
                grads = evaluation.require_graph(evaluation.gradients(kept, False))
                gradient, _ = evaluation.deliver(grads, False)
        assert gradient is not None
        forward = 2 if surrogate and finite else 1
        self._tell(begun, value, gradient, forward, evaluation.backwards(finite), ledgers)

    def _verify(self, begun: _Begun, pair: list[int], batch: Batch, ledgers: Sequence[Ledger]) -> None:
        """Decide between batches and one by one; not begun where the next row would not fit any more."""
        slopes = None if begun.gradients is None else np.array([begun.gradients[i] for i in pair])
        forward = batch.price
        self._accounts.check(ledgers, 1, forward + 1, 0 if slopes is None else forward + 1)
        x, losses = self._evaluation.decoded(begun.x[pair]), [begun.losses[i] for i in pair]
        forward = batch.verify(x, losses, slopes, len(begun.x))
        self._accounts.pay(ledgers, forward, 0 if slopes is None else forward)

    def _some(self, begun: _Begun, batch: Batch, probe: bool, ledgers: Sequence[Ledger]) -> bool:
        """The next batch, or as much of it as the limits allow; False if its rows were too many for the memory."""
        evaluation, first, done = self._evaluation, begun.first, len(begun.losses)
        low = first + (done - first) // batch.rows * batch.rows
        high = min(low + batch.rows, len(begun.x))
        fit = self._accounts.fitting(ledgers, high - done, int(begun.gradients is not None))
        try:
            with evaluation.undone_on_error():
                x = evaluation.decoded(begun.x[low:high])
                if fit < high - done:
                    x[done - low + fit :] = x[done - low]
                # numbers of its own were drawn for each row before a limit cut the batch
                drawn = done > low and evaluation.randomness.apart
                values, slopes = batch.evaluate(x, done == 0 and not probe, again=drawn)
        except Exception as error:
            if out_of_memory(error):
                batch.shrink(high - low, self._accounts.ledger.evaluations)
                return False
            if batch.demanded or isinstance(error, BoundsError):
                raise
            # if the row raises alone too, the error is the loss's own; otherwise the batch is at fault
            self._one(begun, done, probe, ledgers)
            batch.leave(error)
            return True
        for ledger in ledgers:
            ledger.recomputed += high - low - fit
        fitted = slice(done - low, done - low + fit)
        self._book(
            begun, x[fitted], values[fitted], None if slopes is None else slopes[fitted], probe, ledgers
        )
        return True

    def _book(
        self,
        begun: _Begun,
        x: FloatArray,
        values: FloatArray,
        slopes: FloatArray | None,
        probe: bool,
        ledgers: Sequence[Ledger],
    ) -> None:
        """Book the members of a batch. Under `nonfinite="raise"` all are booked, then the first bad one raises."""
        lowest, highest = _extremes(values)
        at = int(values.argmin())
        best = x[at]
        finite = math.isfinite(lowest) and math.isfinite(highest) and not nowhere(best)
        if finite and not self._accounts.listeners and (slopes is None or np.isfinite(slopes).all()):
            if self._accounts.scores is not None and not probe:
                self._accounts.scores.offer(values, x)
            self._evaluation.imagine(best)
            self._accounts.book_many(ledgers, values, at, highest, int(slopes is not None), probe)
            begun.losses.extend(values.tolist())
            if slopes is not None and begun.gradients is not None:
                begun.gradients.extend(slopes)
            return
        refused: NonFiniteLoss | None = None
        told = begun
        for i, value in enumerate(values.tolist()):
            point = x[i]
            self._evaluation.imagine(point)
            value = math.nan if nowhere(point) else value
            try:
                if slopes is None:
                    told.losses.append(self._accounts.book_member(ledgers, value, 1, 0, probe))
                else:
                    self._tell(told, value, slopes[i], 1, 1, ledgers)
            except NonFiniteLoss as error:
                refused = refused or error
                told = begun._replace(losses=[], gradients=[])  # what comes after it is told to nobody
        if refused is not None:
            raise refused

    def _tell(
        self,
        begun: _Begun,
        value: float,
        gradient: FloatArray,
        forward: int,
        backward: int,
        ledgers: Sequence[Ledger],
    ) -> None:
        """Book one row with its gradient; +inf and zeros are told unless both are finite."""
        loss = self._accounts.book_member(ledgers, value, forward, backward, False)
        if math.isfinite(loss) and not np.isfinite(gradient).all():
            self._accounts.reject(math.nan, False, "gradient")
            loss = math.inf
        assert begun.gradients is not None
        begun.losses.append(loss)
        begun.gradients.append(gradient if math.isfinite(loss) else np.zeros_like(gradient))

    def values_and_gradients(self, z: FloatArray, ledgers: Sequence[Ledger]) -> Answer:
        """All rows or none; see `Objective.values_and_gradients`."""
        rows, evaluation = len(z), self._evaluation
        check = 2 if self.gradient_batch.way == "open" and rows >= FEW else 0
        forward = rows * (2 if evaluation.surrogate is not None else 1)
        backward = rows * evaluation.backwards(True, before=True)
        self._accounts.check(ledgers, rows, forward + check, backward + check)
        return self.answer(Request(Kind.VALUES_AND_GRADIENTS, z), ledgers)

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The half-answered population and the ways of the batches, as plain data."""
        begun = self._begun
        return {
            "begun": None
            if begun is None
            else [
                torch.tensor(np.asarray(begun.x)),
                torch.tensor(begun.losses, dtype=torch.float64),
                None if begun.gradients is None else torch.tensor(np.array(begun.gradients)),
                begun.first,
            ],
            "batch": self.batch.state_dict(),
            "gradient_batch": self.gradient_batch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved one stood."""
        self._begun = None
        if state["begun"] is not None:
            x, losses, gradients, first = state["begun"]
            slopes = None if gradients is None else list(gradients.numpy().copy())
            self._begun = _Begun(x.numpy().copy(), losses.tolist(), slopes, first)
        self.batch.load_state_dict(state["batch"])
        self.gradient_batch.load_state_dict(state["gradient_batch"])


def _extremes(losses: FloatArray) -> tuple[float, float]:
    """The lowest and the highest of some losses; nan where there is one.

    In a generation of a small model this replaces three reductions, each of which takes longer than both searches.
    """
    return float(losses[losses.argmin()]), float(losses[losses.argmax()])
