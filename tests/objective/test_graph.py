"""The graph that is kept for a gradient of the point just asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybridopt.errors import (
    Stop,
)
from hybridopt.ledger import Budget, Reason
from hybridopt.objective import Objective
from hybridopt.optimizer import Kind
from tests.objective.drive import SMOOTH, X, at, made, saved, slope

# -- the kept graph -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SMOOTH)
@pytest.mark.parametrize("event", ["write", "touch", "another objective", "another point", "asked twice"])
def test_a_graph_is_used_only_while_it_is_true(form: str, event: str) -> None:
    objective, meter = made(form)
    own = form == "closure with backward"
    x = np.array(X)
    with objective:
        objective.answer(at(Kind.VALUE, x, keep_graph=True))
        where = x
        if event == "write":
            objective.vector.write([9.0, 9.0, 9.0])
        elif event == "touch":
            objective.vector.touch()
        elif event == "another objective":
            takes_none = form.startswith("closure")
            with Objective((lambda: 0.0) if takes_none else (lambda _: 0.0), objective.vector) as other:
                other.answer(at(Kind.VALUE, [7.0, 7.0, 7.0]))
        elif event == "another point":
            where = np.array([0.0, 1.0, 2.0])
        else:
            objective.answer(at(Kind.GRADIENT, x))
        answer = objective.answer(at(Kind.GRADIENT, where))
        assert answer.gradient is not None
        np.testing.assert_allclose(answer.gradient, slope(where))
        ledger = objective.ledger
        assert (ledger.evaluations, ledger.forward, ledger.recomputed) == (1, 1, 1)
        assert ledger.backward == 1 + (event == "asked twice" or own)
        assert (meter.forward, meter.backward) == (2, ledger.backward)


@pytest.mark.parametrize("form", SMOOTH)
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_budget_may_end_between_a_value_and_its_gradient(form: str, through_a_file: bool) -> None:
    own = form == "closure with backward"
    objective, meter = made(form, {"forward_equivalents": 3})
    with objective:
        objective.answer(at(Kind.VALUE, X, keep_graph=True))
        objective.ledger.limit(Budget(forward_equivalents=3 if own else 2))
        if own:
            assert objective.answer(at(Kind.GRADIENT, X)).gradient is not None, "it was paid with the value"
            return
        with pytest.raises(Stop) as stop:
            objective.answer(at(Kind.GRADIENT, X))
        assert stop.value.reason is Reason.FORWARD_EQUIVALENTS
        if through_a_file:
            state = saved(objective)
            objective.close()
            objective, meter = made(form, {"forward_equivalents": 3})
            objective.load_state_dict(state)
        objective.ledger.limit(Budget(forward_equivalents=3))
        answer = objective.answer(at(Kind.GRADIENT, X))
        assert answer.gradient is not None
        assert answer.gradient.tolist() == slope(np.array(X)).tolist()
        ledger = objective.ledger
        # a forward that only a resume made necessary is no part of the budget
        assert (ledger.forward, ledger.backward, ledger.recomputed) == (1, 1, int(through_a_file))
        assert meter.forward == 1
        objective.close()


@pytest.mark.parametrize("noise", ["shared", "independent", "fixed"])
def test_a_value_and_its_gradient_see_the_same_noise(noise: Any) -> None:
    def loss(x: Tensor) -> Tensor:
        return (x * torch.rand(3)).sum() * float(np.random.rand())

    for lost in (False, True):
        with Objective(loss, torch.ones(3), seed=1, noise=noise) as objective:
            for x in ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]):
                value = objective.answer(at(Kind.VALUE, x, keep_graph=True)).loss
                if lost:
                    objective.vector.touch()
                gradient = objective.answer(at(Kind.GRADIENT, x)).gradient
                assert gradient is not None
                assert float(gradient @ np.array(x)) == pytest.approx(value)  # the loss is linear
            both = objective.answer(at(Kind.VALUE_AND_GRADIENT, x))
            assert both.gradient is not None
            assert float(both.gradient @ np.array(x)) == pytest.approx(both.loss)
            if not lost:
                path = both.loss
            else:
                assert both.loss == path, "a repeated forward leaves the later draws as they were"


def test_a_buffer_that_the_loss_moves_may_be_part_of_its_graph() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("size", torch.ones(2))

        def forward(self) -> Tensor:
            assert isinstance(self.size, Tensor)
            self.size += 1
            return (self.weight * self.size).sum()

    model = Running()
    with Objective(lambda m: m(), model) as objective:
        objective.answer(at(Kind.VALUE, [1, 1], keep_graph=True))
        gradient = objective.answer(at(Kind.GRADIENT, [1, 1])).gradient
        assert gradient is not None
        assert gradient.tolist() == [2, 2]
        both = objective.answer(at(Kind.VALUE_AND_GRADIENT, [1, 1])).gradient
        assert both is not None
        assert both.tolist() == [2, 2]
        assert model.size.tolist() == [1, 1], "nothing was committed"  # type: ignore[operator]


@pytest.mark.parametrize("kind", [Kind.VALUE, Kind.VALUE_AND_GRADIENT])
def test_a_loss_may_differentiate_inside(kind: Kind) -> None:
    """A residual of a differential equation: the loss itself needs autograd, whatever is asked."""

    def loss(model: nn.Module) -> Tensor:
        t = torch.linspace(0, 1, 5)[:, None].requires_grad_()
        u = model(t)
        (rate,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return ((rate + u) ** 2).mean()

    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    with Objective(loss, model) as objective:
        x = objective.vector.read()
        assert objective.answer(at(kind, x)).loss == pytest.approx(loss(model).item())
        objective.answer(at(Kind.POPULATION, [x, x]))


def test_gradients_in_place_may_be_written_into_like_those_of_backward() -> None:
    a, b, c = torch.ones(3), torch.ones(3), torch.ones(2, 3)
    with Objective(lambda d: (d["a"] + d["b"]).sum() + c.sum(), {"a": a, "b": b, "c": c}) as objective:
        objective.answer(at(Kind.VALUE_AND_GRADIENT))
        assert a.grad is not None
        assert b.grad is not None
        a.grad.mul_(2)  # as clipping and some optimizers do
        assert (a.grad.tolist(), b.grad.tolist()) == ([2, 2, 2], [1, 1, 1])
        assert a.grad.stride() == a.stride()
