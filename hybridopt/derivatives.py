"""Answers about derivatives of higher kind at one point: Jacobians of residuals, and Hessians."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridopt import jacobian
from hybridopt.accounts import Accounts
from hybridopt.errors import MissingGradient, Stop
from hybridopt.evaluation import Evaluation
from hybridopt.ledger import Ledger, Reason
from hybridopt.optimizer import Answer, Kind, Request
from hybridopt.vector import FloatArray


class Derivatives:
    """What least-squares and Newton methods ask beside losses and gradients, by autograd.

    A Jacobian of m residuals costs m backwards, or n forwards by forward mode, which is taken where that is cheaper
    and torch can. A product with the Hessian costs a forward and two backwards, the whole Hessian n products.
    """

    def __init__(self, evaluation: Evaluation, accounts: Accounts) -> None:
        self._evaluation = evaluation
        self._accounts = accounts
        self._slopes: tuple[bytes, int, Tensor] | None = None  # weights, epoch, their gradient with its graph
        self.backwards_only = ""
        """Why Jacobians are not computed by forward mode, once that has failed."""

    # -- residuals ----------------------------------------------------------------------------------------------

    def jacobian(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        """The Jacobian of the residuals at the point just asked; without an array if they have no graph."""
        evaluation, residuals = self._evaluation, self._evaluation.residuals
        assert residuals is not None
        assert request.x is not None
        if not evaluation.stands_at(request.x):
            evaluation.move(request.x)
        if evaluation.kept is None:
            with evaluation.undone_on_error():
                _, evaluation.kept = evaluation.value(False, True, False, again=True)
            for ledger in ledgers:
                ledger.recomputed += 1
        output = residuals.last
        assert output is not None
        if not output.requires_grad:
            return Answer()
        found = self._forward_mode(len(output), ledgers)
        if found is None:
            self._accounts.check(ledgers, 0, 0, len(output))
            found = jacobian.reverse(output, evaluation.vector.tensors, evaluation.one_by_one)
            self._accounts.pay(ledgers, 0, len(output))
        evaluation.kept, residuals.last = None, None
        if not np.isfinite(found).all():
            self._accounts.reject(math.nan, False, "Jacobian")
            raise Stop(ledgers[-1], Reason.NON_FINITE)
        return Answer(array=evaluation.to_solver(found))

    def _forward_mode(self, m: int, ledgers: Sequence[Ledger]) -> FloatArray | None:
        """The Jacobian by n forwards; None where m backwards are cheaper or torch cannot."""
        evaluation, vector = self._evaluation, self._evaluation.vector
        residuals, n = evaluation.residuals, vector.n
        assert residuals is not None
        pure = residuals.functional
        refused = evaluation.one_by_one or self.backwards_only
        if pure is None or refused or n >= ledgers[0].backward_cost * m:
            return None
        self._accounts.check(ledgers, 0, n, 0)
        x = torch.as_tensor(vector.read() if evaluation.x is None else evaluation.x)
        at = pure

        def function(x: Tensor) -> Tensor:
            return at(vector.unflatten(x))

        try:
            with evaluation.undone_on_error():
                found: FloatArray = evaluation.call(
                    lambda: jacobian.forward(function, x), evaluation.differentiates
                )
        except Exception as error:  # noqa: BLE001 - whatever torch raises, backwards can do without
            first = (str(error) or type(error).__name__).splitlines()[0]
            self._accounts.pay(ledgers, 1, 0)  # the functions were called once before it failed
            self.backwards_only = f"torch has no forward derivative of these residuals ({first[:120]})"
            return None
        self._accounts.pay(ledgers, n, 0)
        return found

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        return (
            [f"a Jacobian costs a backward a residual: {self.backwards_only}"] if self.backwards_only else []
        )

    # -- the Hessian --------------------------------------------------------------------------------------------

    def hessian(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        """The Hessian at a point, or its product with a direction, in solver coordinates.

        Raises:
            MissingGradient: the loss cannot be differentiated twice.
        """
        evaluation, vector = self._evaluation, self._evaluation.vector
        assert request.x is not None
        products = 1 if request.kind is Kind.HESSIAN_VECTOR else vector.n
        self._accounts.check(ledgers, 0, products, 2 * products)
        if not evaluation.stands_at(request.x):
            evaluation.move(request.x)
        assert evaluation.x is not None
        slope = vector.coordinates.slope(evaluation.x)
        try:
            gradient = self._gradient()
            if request.kind is Kind.HESSIAN_VECTOR:
                assert request.direction is not None
                direction = request.direction if slope is None else request.direction * slope
                seed = torch.as_tensor(direction)
                found = (
                    jacobian.pull(gradient, vector.tensors, seed).numpy()
                    if gradient.requires_grad
                    else np.zeros(vector.n)
                )
            else:
                found = (
                    jacobian.reverse(gradient, vector.tensors)
                    if gradient.requires_grad
                    else np.zeros((vector.n, vector.n))
                )
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise MissingGradient(
                f"Hessian: the loss cannot be differentiated twice ({str(error).splitlines()[0][:200]}); use a method "
                "that needs gradients alone, such as scipy.bfgs, scipy.lbfgsb or scipy.slsqp"
            ) from error
        self._accounts.pay(ledgers, products, 2 * products)
        if slope is not None:
            found = found * slope
        bend = self._bend(gradient, slope)
        if request.kind is Kind.HESSIAN:
            found = found if slope is None else found * slope[:, None]
            found = (found + found.T) / 2 + np.diag(bend)
        else:
            assert request.direction is not None
            found = found + bend * request.direction
        if not np.isfinite(found).all():
            self._accounts.reject(math.nan, False, "Hessian")
            found = np.zeros_like(found)
        return Answer(array=found)

    def _gradient(self) -> Tensor:
        """The gradient where the weights stand, shape (n,), with a graph; that of the last question if it is there."""
        evaluation, vector = self._evaluation, self._evaluation.vector
        assert evaluation.x is not None
        here = (evaluation.x.tobytes(), vector.epoch)
        if self._slopes is None or self._slopes[:2] != here:
            graph: Any = None
            with evaluation.undone_on_error():
                if evaluation.surrogate is not None:
                    graph = evaluation.call(evaluation.surrogate.call, True)
                    graph = graph[0] if isinstance(graph, tuple) else graph
                else:
                    _, kept = evaluation.value(False, True, False, again=True)
                    graph = None if kept is None else kept.graph
            if not isinstance(graph, Tensor) or not graph.requires_grad:
                raise MissingGradient(
                    "Hessian: the loss has no graph to the weights (a closure that calls backward() keeps none); use a "
                    "method that needs less, such as scipy.bfgs or scipy.slsqp"
                )
            self._slopes = (*here, jacobian.slopes(graph, vector.tensors))
        return self._slopes[2]

    def _bend(self, gradient: Tensor, slope: FloatArray | None) -> FloatArray:
        """What the curvature of logarithmic coordinates adds to the diagonal: g d²w/dz²."""
        vector = self._evaluation.vector
        bend = np.zeros(vector.n)
        if vector.log is not None and slope is not None:
            scale = np.ones(vector.n) if vector.scale is None else vector.scale
            g = gradient.detach().numpy()
            bend[vector.log] = (g * slope * scale)[vector.log]  # w = e^(scale z)
        return bend

    def forget(self) -> None:
        """Free the graph that the last Hessian question left."""
        self._slopes = None

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Which way Jacobians are computed: the two differ in the last bits."""
        return {"backwards_only": self.backwards_only}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on the way of the saved one."""
        self.backwards_only = state["backwards_only"]
        self.forget()
