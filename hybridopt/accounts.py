"""What an evaluation may cost, what it did cost, and what becomes of a loss that is not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, Protocol

from hybridopt.errors import NonFiniteLoss, Stop
from hybridopt.ledger import Ledger, Reason, Shadow
from hybridopt.scores import Scores
from hybridopt.vector import FloatArray

NONFINITE_PATIENCE = 30  # questions in a row without a finite loss before a run or stage ends


class Listener(Protocol):
    """Told of every evaluation (a `Tracker`)."""

    def evaluated(self, ledger: Ledger, scopes: Sequence[Ledger], loss: float, probe: bool) -> None:
        """One loss was computed; `ledger` is the run's, `scopes` those of its stages, outermost first.

        The weights need not stand at its point: the members of a batch are told one after the other, too.
        """


class Accounts:
    """Checks the limits of all ledgers before an evaluation, books it in all of them after, and tells listeners.

    Args:
        ledger: of the run; those of its stages come with each call.
        nonfinite: as in `Objective`.
        source: where a ledger copies its best point from.
    """

    def __init__(self, ledger: Ledger, nonfinite: Literal["reject", "raise"], source: Shadow) -> None:
        self.ledger = ledger
        self.nonfinite = nonfinite
        self.source = source
        self.listeners: list[Listener] = []
        self.scores: Scores | None = None
        """Keeps the points that are scored at the end, if any are."""
        self.warned = False
        """Whether the user was told of a loss that is not finite."""

    def check(self, ledgers: Sequence[Ledger], evaluations: int, forward: int, backward: int) -> None:
        """Raise `Stop` if a limit of any ledger forbids this much more."""
        for ledger in ledgers:
            ledger.check(evaluations, forward, backward)
        for ledger in reversed(ledgers):
            if ledger.nonfinite_in_a_row >= NONFINITE_PATIENCE:
                raise Stop(ledger, Reason.NON_FINITE)

    def fitting(self, ledgers: Sequence[Ledger], rows: int, backward: int = 0) -> int:
        """How many of `rows` evaluations, each of a forward and so many backwards, no limit forbids.

        Raises:
            Stop: not even one.
        """
        self.check(ledgers, 1, 1, backward)
        for ledger in ledgers:
            evaluations = ledger.max_evaluations - ledger.evaluations
            left = ledger.max_equivalents - ledger.backward_cost * ledger.backward - ledger.forward
            rows = math.floor(min(rows, evaluations, left / (1 + ledger.backward_cost * backward)))
        try:
            self.check(ledgers, rows, rows, rows * backward)
        except Stop:  # the differences above were rounded upwards
            rows -= 1
        return max(rows, 1)

    def pay(self, ledgers: Sequence[Ledger], forward: int, backward: int) -> None:
        """Count what is no evaluation of the loss: a Jacobian, constraints."""
        for ledger in ledgers:
            ledger.forward += forward
            ledger.backward += backward

    def book(
        self,
        ledgers: Sequence[Ledger],
        value: float,
        forward: int,
        backward: int,
        probe: bool,
        violation: float = 0.0,
    ) -> None:
        """Count one evaluation with its loss, in all ledgers."""
        self.pay(ledgers, forward, backward)
        for ledger in ledgers:
            ledger.book(value, probe, self.source, violation)
        if self.scores is not None and not probe and violation == 0:
            self.scores.offer([value])
        for listener in self.listeners:
            listener.evaluated(self.ledger, ledgers[1:], value, probe)

    def book_many(
        self,
        ledgers: Sequence[Ledger],
        values: FloatArray,
        lowest: int,
        highest: float,
        backward: int,
        probe: bool,
    ) -> None:
        """Count evaluations of finite losses, each of a forward and so many backwards, that no listener hears of.

        One by one they take 1.0 of 2.7 ms of a batch (256 rows of 10 weights and their gradients, one CPU core).

        Args:
            lowest: index of the first lowest value, whose point is the one being answered.
            highest: the highest value.
        """
        rest = len(values) - 1
        self.pay(ledgers, len(values), len(values) * backward)
        for ledger in ledgers:
            ledger.evaluations += lowest
            ledger.book(float(values[lowest]), probe, self.source)
            ledger.evaluations += rest - lowest
            ledger.worst_loss = max(ledger.worst_loss, highest)
            if not probe:
                ledger.last_loss = float(values[-1])

    def reject(self, value: float, start: bool, what: str = "loss") -> None:
        """Say that the evaluation just booked was not finite: once as a warning, or as an error where asked.

        Args:
            value: the loss (nan for a gradient).
            start: whether a method that needs gradients begins here.
            what: loss or gradient.

        Raises:
            NonFiniteLoss: under `nonfinite="raise"`, or at such a start.
        """
        where = f"evaluation {self.ledger.evaluations}"
        if start:
            raise NonFiniteLoss.at_start(value)
        if self.nonfinite == "raise":
            raise NonFiniteLoss(f'{what}: got {value} at {where} (nonfinite="raise")')
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{what} {value} at {where}: rejected (told to the method as +inf, never the best); later ones are "
                "counted without a warning",
                RuntimeWarning,
                stacklevel=4,
            )

    def book_member(
        self,
        ledgers: Sequence[Ledger],
        value: float,
        forward: int,
        backward: int,
        probe: bool,
        violation: float = 0.0,
    ) -> float:
        """Book one member of a population, whose generation counts once for the patience; what is told of it."""
        if math.isfinite(value):
            self.book(ledgers, value, forward, backward, probe, violation)
            return value
        before = [ledger.nonfinite_in_a_row for ledger in ledgers]
        self.book(ledgers, value, forward, backward, probe)
        for ledger, in_a_row in zip(ledgers, before, strict=True):
            ledger.nonfinite_in_a_row = in_a_row
        self.reject(value, False)
        return math.inf
