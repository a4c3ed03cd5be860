"""Answers to questions about one point: loss, gradient, residuals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hybridopt.accounts import Accounts
from hybridopt.errors import ObjectiveError, Stop
from hybridopt.evaluation import Evaluation
from hybridopt.feasibility import Feasibility
from hybridopt.ledger import Ledger, Reason
from hybridopt.optimizer import Answer, Kind, Request
from hybridopt.vector import FloatArray


class Points:
    """Answers about one point at a time, and keeps a value's graph for the gradient asked next."""

    def __init__(self, evaluation: Evaluation, accounts: Accounts, feasibility: Feasibility) -> None:
        self._evaluation = evaluation
        self._accounts = accounts
        self._feasibility = feasibility
        self._value = math.nan  # the last loss computed

    def value(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        """The loss, and its gradient or the residuals where they are asked for with it."""
        evaluation, feasibility = self._evaluation, self._feasibility
        surrogate, residuals = evaluation.surrogate is not None, evaluation.residuals
        want_gradient = request.kind is Kind.VALUE_AND_GRADIENT
        if request.kind is Kind.RESIDUALS and residuals is None:
            raise ObjectiveError(
                "residuals: this loss returns one number; a vector of them needs residuals=True"
            )
        extra = 0 if request.probe else feasibility.cost(request.x)
        # a closure not yet called may turn out to call backward(): allow for it before, book what it did after
        backward = evaluation.backwards(want_gradient, before=True)
        self._accounts.check(ledgers, 1, 1 + int(want_gradient and surrogate) + extra, backward)
        evaluation.move(request.x)
        first = self._accounts.ledger.evaluations == 0
        keep_graph = request.keep_graph and not surrogate
        in_place = request.x is None
        gradient: FloatArray | None = None
        told = False
        with evaluation.undone_on_error():
            value, kept = evaluation.value(not request.probe, want_gradient or keep_graph, request.commit)
            finite = math.isfinite(value)
            if want_gradient and not finite:
                gradient = evaluation.nothing(in_place)
            elif want_gradient:
                grads = evaluation.gradients(kept, in_place)
                if in_place:
                    grads = evaluation.require_graph(grads)
                if grads is not None:
                    gradient, finite = evaluation.deliver(grads, in_place)
                    told = True
            elif keep_graph:
                evaluation.kept = kept
            if request.commit:
                evaluation.guard.settle_buffers(finite)  # a rejected step moves no statistics
            # what a probe breaks is not asked: it is never the best then
            violation = math.inf
            if not (request.probe and feasibility.constrained):
                violation = feasibility.violation_here(keep_graph)
        self._value = value
        forward = 1 + int(want_gradient and surrogate and math.isfinite(value)) + extra
        in_a_row = [ledger.nonfinite_in_a_row for ledger in ledgers]
        feasibility.make_way(ledgers, value, request.probe)
        self._accounts.book(ledgers, value, forward, evaluation.backwards(told), request.probe, violation)
        if not finite:
            if math.isfinite(value):  # a gradient that is not finite is no finite answer either
                for ledger, before in zip(ledgers, in_a_row, strict=True):
                    ledger.nonfinite_in_a_row = before + 1
            what = "gradient" if math.isfinite(value) else "loss"
            shown = math.nan if math.isfinite(value) else value
            alone = first and not any(ledger.rivals for ledger in ledgers)
            # a method that says where it asks need not begin at its first point: it knows whether it does
            self._accounts.reject(shown, alone and want_gradient and in_place, what)
            if gradient is not None:
                gradient = np.zeros_like(gradient)
        array = None
        if request.kind is Kind.RESIDUALS:
            assert residuals is not None
            array = residuals.told(finite)
        loss = value if finite else math.inf
        broken = 0.0 if request.probe else violation
        return Answer(
            loss, None, gradient, finite, surrogate, evaluation.keeps_best, array=array, violation=broken
        )

    def gradient(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        """The gradient at the point just valued, from its kept graph; the forward is repeated only if that was lost."""
        surrogate = self._evaluation.surrogate is not None
        in_place = request.x is None
        here = self._evaluation.stands_at(request.x)
        kept = self._evaluation.kept if here else None
        if kept is not None and kept.graph is None and kept.grads is None:
            return Answer(self._value)  # no graph to the weights: nothing to do, nothing to pay
        paid = kept is not None and kept.grads is not None  # by a closure that calls backward() itself
        if not paid:
            self._accounts.check(ledgers, 0, int(surrogate), 1)
        if not here:
            self._evaluation.move(request.x)
        with self._evaluation.undone_on_error():
            if kept is None and not surrogate:
                _, kept = self._evaluation.value(False, True, False, again=True)
                for ledger in ledgers:
                    ledger.recomputed += 1
            grads = self._evaluation.gradients(kept, in_place)
        if grads is None:
            return Answer(self._value)
        gradient, finite = self._evaluation.deliver(grads, in_place)
        self._accounts.pay(ledgers, int(surrogate), int(not paid))
        self._evaluation.kept = None
        if not finite:
            self._accounts.reject(math.nan, False, "gradient")
            raise Stop(ledgers[-1], Reason.NON_FINITE)
        return Answer(self._value, None, gradient, finite, surrogate=surrogate)
