"""What every method does with losses that misbehave, and how it behaves itself."""

from __future__ import annotations

import copy
import math
import pickle
import random

import torch
from torch import Tensor

import hybridopt
from hybridopt import registry
from hybridopt.errors import ClosedError, MissingGradient, NonFiniteLoss
from hybridopt.ledger import Reason
from hybridopt.optimizer import Need
from hybridopt.testing._driver import SEED, Driver, generators, quiet, through_a_file
from hybridopt.testing._losses import Model, bowl, flat, valley
from hybridopt.vector import ParameterVector


class Manners(Driver):
    """Losses that are not finite, flat or raise; closing, ending, and leaving things as they were."""

    # -- losses that misbehave ----------------------------------------------------------------------------------

    def test_nan_half_of_the_time(self) -> None:
        """Losses that are nan are counted, survived, and never the best."""
        draws = random.Random(SEED)

        def spoil(value: Tensor, call: int) -> Tensor:
            return value * math.nan if call > 1 and draws.random() < 0.5 else value

        self._survives(self._loss(valley, spoil))

    def test_inf_now_and_then(self) -> None:
        """Losses that are inf or -inf are counted, survived, and never the best."""
        draws = random.Random(SEED)

        def spoil(value: Tensor, call: int) -> Tensor:
            return value + draws.choice([math.inf, -math.inf, 0, 0]) if call > 1 else value

        self._survives(self._loss(valley, spoil))

    def test_nan_after_the_start(self) -> None:
        """When only the first loss is finite, its point is the best one, and the model holds it."""
        self._survives(self._loss(valley, lambda value, call: value * math.nan if call > 1 else value))

    def test_nothing_finite(self) -> None:
        """Without any finite loss the reason is `non_finite` (or an error, of a method that follows gradients)."""
        model = Model([-1.2, 1.0])
        before = model.bits()
        loss = self._loss(valley, lambda value, call: value * math.nan)
        try:
            with quiet():
                result = self._minimize(loss, model, 400)
        except NonFiniteLoss:
            assert Need.GRADIENT in self.method.needs | self.method.uses, (
                "it follows no gradients: no error expected"
            )
        else:
            assert Need.GRADIENT not in self.method.needs, (
                "a method that needs gradients cannot begin at a nan"
            )
            assert result.reason is Reason.NON_FINITE, f"the reason is {result.reason}"
            assert result.best_loss == math.inf, f"the best loss is {result.best_loss}"
            assert result.loss == math.inf, f"the method's own loss is {result.loss}"
            assert not result.success, "it claims success"
        assert model.bits() == before, "the model does not hold its start again"

    def test_flat_loss(self) -> None:
        """A loss that is the same everywhere is no reason to fail or to go over the budget."""
        loss = self._loss(flat)
        model = Model([-1.2, 1.0])
        with quiet():
            result = self._minimize(loss, model, 137)
        assert self._made(loss, result) <= 137, f"{loss.calls} evaluations with a budget of 137"
        assert result.best_loss == 3, f"the best loss is {result.best_loss}"

    def test_nothing_better_than_the_start(self) -> None:
        """The model ends with the best point evaluated: the start, if that was evaluated and is the optimum."""
        model = Model([0.5, 0.5])
        before = model.bits()
        run, rows = self._run(self.evaluations, loss=self._loss(bowl), model=model)
        self._finish(run)
        if rows.rows[0].x == torch.full((2,), 0.5, dtype=torch.float64).numpy().tobytes():
            assert model.bits() == before, "the start was the best point; the model holds another one"

    def test_loss_without_gradient(self) -> None:
        """A loss without a graph is minimised, or refused by `MissingGradient`."""
        model = Model([-1.0, 1.5, -0.5])
        loss = self._loss(bowl, lambda value, call: value.detach().numpy())
        start = self._value(bowl, model.x())
        try:
            with quiet():
                result = self._minimize(loss, model, {"forward_equivalents": self.budget})
        except MissingGradient:
            assert Need.GRADIENT in self.method.needs | self.method.uses, (
                "it follows no gradients: no error expected"
            )
        else:
            assert Need.GRADIENT not in self.method.needs, "it needs gradients, and there were none"
            assert result.best_loss <= 0.1 * start, f"from {start} only down to {result.best_loss}"

    def test_weight_without_gradient(self) -> None:
        """A weight that the loss does not depend on does no harm."""
        model = Model([-1.0, 1.5, -0.5, 0.25])

        def spoil(value: Tensor, call: int) -> Tensor:
            return self._form(bowl)(model.a)

        with quiet():
            result = self._minimize(self._loss(bowl, spoil), model, {"forward_equivalents": self.budget})
        assert result.best_loss <= 0.425, f"from 4.25 only down to {result.best_loss}"

    def test_exception_in_the_loss(self) -> None:
        """An exception of the loss comes out as the same object, and a retry continues the same path."""
        self._raises(ValueError("the loss cannot be computed here"))

    def test_interrupt_in_the_loss(self) -> None:
        """A KeyboardInterrupt comes out as the same object, and a retry continues the same path."""
        self._raises(KeyboardInterrupt())

    # -- manners ------------------------------------------------------------------------------------------------

    def test_closed(self) -> None:
        """A closed optimizer refuses to be asked, can be closed again, and can still be saved."""
        run, rows = self._run(self.evaluations)
        for _ in range(3):
            run.step()
        done = len(rows.rows)
        run.optimizer.close()
        run.optimizer.close()
        try:
            run.optimizer.ask()
        except ClosedError:
            pass
        else:
            raise AssertionError("a closed optimizer answered ask()")
        state = through_a_file(run.state_dict())
        run.objective.close()
        whole, all_rows = self._run(self.evaluations)
        self._finish(whole)
        assert self._resume(state, self.evaluations) == all_rows.rows[done:], (
            "saved after close(), the path is another"
        )

    def test_ended(self) -> None:
        """A run that ended can be saved and loaded; it is still at its end."""
        first, begun = self._run(self.evaluations)
        self._finish(first)
        assert self._resume(through_a_file(first.state_dict()), self.evaluations) == [], (
            "it went on after its end"
        )

    def test_leaves_the_caller_alone(self) -> None:
        """Gradients, modes and the global generators are as they were found."""
        model = Model([-1.0, 1.5, -0.5])
        model.eval()
        model.a.grad = torch.full_like(model.a, 3.0)
        grad = model.a.grad
        before = generators()
        self._minimize(self._loss(bowl), model, self.evaluations)
        assert generators() == before, "a global random generator has moved"
        assert model.a.grad is grad, "a weight's .grad is another tensor"
        assert bool((grad == 3).all()), "a weight's .grad was written"
        assert model.b.grad is None, "a weight's .grad was left behind"
        assert not model.training, "the model was left in training mode"
        vector = ParameterVector(Model([-1.0, 1.5, -0.5]), bounds=self._bounds())
        optimizer = self.method.start(vector, SEED)
        optimizer.ask()  # nobody lends it generators here
        optimizer.close()
        assert generators() == before, "the method itself moves a global random generator"

    def test_text_and_copies(self) -> None:
        """The method prints as text that reads back equal, and survives copying and pickling."""
        text = str(self.method)
        copies = [copy.deepcopy(self.method), pickle.loads(pickle.dumps(self.method))]
        if self.method.name in (*registry.names(), "chain", "stage", "torch"):
            copies.append(hybridopt.method(text))  # text stands for what is registered (by entry point)
        for again in copies:
            assert again == self.method, f"{text!r} became {again!r}"
            assert hash(again) == hash(self.method), f"{text!r}: equal, but not of equal hash"
            assert str(again) == text, f"{text!r} became {str(again)!r}"
