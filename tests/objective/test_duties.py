"""An objective as a pure function, its other duties, and two on the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hybridopt
from hybridopt.errors import (
    ClosedError,
    HybridoptError,
    ObjectiveError,
    StateError,
)
from hybridopt.ledger import Ledger
from hybridopt.objective import Objective
from hybridopt.optimizer import Kind, Request
from tests.objective.drive import CENTRE, FORMS, Meter, at, made, saved

# -- as a pure function ---------------------------------------------------------------------------------------------


# torch's forward mode compiles its own decompositions with torch.jit on first use
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("form", ["module", "mapping", "loss on a model with ties"])
def test_the_loss_as_a_pure_function(form: str) -> None:
    if form == "loss on a model with ties":
        model = nn.Module()
        model.a = model.b = nn.Parameter(torch.ones(3, dtype=torch.float64))
        model.register_buffer("two", torch.tensor(2.0, dtype=torch.float64))
        loss, target = (lambda m: (m.a * m.b * m.two).sum()), model
    else:

        def smooth(*parts: Tensor) -> Tensor:
            return ((torch.cat([p.reshape(-1) for p in parts]) - torch.from_numpy(CENTRE)) ** 2).sum()

        target = FORMS[form](Meter())[1]
        loss = (
            (lambda m: smooth(m.weight, m.bias)) if form == "module" else (lambda d: smooth(d["a"], d["b"]))
        )
    objective = Objective(loss, target)
    before = objective.vector.read()
    pure = objective.functional()
    population = torch.randn(4, 3, dtype=torch.float64)
    batched = torch.func.vmap(pure)(population)
    hessian = torch.func.hessian(pure)(population[0])
    torch.testing.assert_close(hessian, torch.eye(3, dtype=torch.float64) * (4 if "ties" in form else 2))
    assert objective.ledger.evaluations == 0, "it is not counted"
    assert objective.vector.read().tolist() == before.tolist()
    with objective:
        looped = objective.answer(at(Kind.POPULATION, population.numpy())).losses
    np.testing.assert_allclose(batched.numpy(), looped, rtol=1e-13)


@pytest.mark.parametrize("form", ["array", "closure", "closure with backward"])
def test_not_every_form_is_a_pure_function(form: str) -> None:
    with pytest.raises(
        ObjectiveError, match=r"functional: a loss of the form .* cannot be called at other weights"
    ):
        made(form)[0].functional()


# -- the rest -------------------------------------------------------------------------------------------------------


def test_listeners_hear_of_every_evaluation_with_the_counters_after_it() -> None:
    heard: list[tuple[Any, ...]] = []

    class Listener:
        def evaluated(self, ledger: Ledger, scopes: Sequence[Ledger], loss: float, probe: bool) -> None:
            heard.append((ledger.evaluations, ledger.forward, ledger.backward, tuple(scopes), loss, probe))

    scope = Ledger()
    with Objective(lambda x: x.sum(), torch.ones(2)) as objective:
        objective.listeners.append(Listener())
        objective.answer(at(Kind.VALUE, [1, 2], keep_graph=True).within(scope))
        objective.answer(at(Kind.GRADIENT, [1, 2]).within(scope))
        objective.answer(at(Kind.POPULATION, [[0, 0], [1, 1]], probe=True))
        objective.answer(at(Kind.VALUE_AND_GRADIENT))
    assert heard == [
        (1, 1, 0, (scope,), 3.0, False),
        (2, 2, 1, (), 0.0, True),
        (3, 3, 1, (), 2.0, True),
        (4, 4, 2, (), 2.0, False),
    ]


def test_a_closed_objective_answers_no_more() -> None:
    objective = Objective(lambda x: x.sum(), torch.ones(2))
    objective.answer(at(Kind.VALUE))
    objective.close()
    objective.close()
    with pytest.raises(ClosedError, match="it was closed; make a new one"):
        objective.answer(at(Kind.VALUE))


def test_a_state_of_other_weights_is_refused() -> None:
    state = saved(Objective(lambda x: x.sum(), torch.ones(2)))
    others: list[tuple[Any, str]] = [
        (torch.ones(3), r"shapes \[\[2\]\], this objective has \[\[3\]\]"),
        (
            torch.ones(2, dtype=torch.float64),
            r"dtypes \['torch\.float32'\], this objective has \['torch\.float64'\]",
        ),
        ({"y": torch.ones(2)}, r"names \['x'\], this objective has \['y'\]"),
    ]
    for target, message in others:
        with pytest.raises(StateError, match=message):
            Objective(lambda x: 0.0, target).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nonfinite": "ignore"}, r"nonfinite: expected one of 'reject', 'raise', got 'ignore'"),
        ({"keep": "first"}, r"keep: expected one of 'auto', 'best', 'last', got 'first'"),
        ({"noise": "none"}, r"noise: expected one of 'shared', 'independent', 'fixed', got 'none'"),
        (
            {"batch": "fast"},
            r"batch: expected 'auto', 'vmap', 'compiled', 'loop' or a number of rows per forward, got 'fast'",
        ),
        ({"backward_cost": 0}, r"backward_cost: expected a number > 0, got 0"),
        ({"backward_cost": math.nan}, r"backward_cost: expected a number > 0, got nan"),
        ({"backward_cost": math.inf}, r"backward_cost: expected a number > 0, got inf"),
        ({"backward_cost": "2"}, r"backward_cost: expected a number > 0, got '2'"),
        ({"budget": 0}, r"budget: expected evaluations > 0, got 0"),
        ({"surrogate": 3}, r"loss: expected a function, got int|surrogate: expected a function, got int"),
    ],
)
def test_wrong_arguments_are_said_clearly(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HybridoptError, match=message):
        Objective(lambda x: x.sum(), torch.ones(2), **arguments)


@pytest.mark.parametrize(
    ("loss", "request_", "message"),
    [
        (
            lambda x: x,
            at(Kind.VALUE, [1, 1]),
            r"loss: expected one real number, got a tensor of shape \(2,\)",
        ),
        (lambda x: x, at(Kind.VALUE_AND_GRADIENT), r"loss: expected one real number"),
        (
            lambda x: None,
            at(Kind.POPULATION, [[1, 1]]),
            r"loss: expected a number or a one-element tensor, got NoneType",
        ),
        (lambda x: x.sum(), at(Kind.RESIDUALS, [1, 1]), r"residuals: this loss returns one number"),
        (
            lambda x: x.detach().sum(),
            at(Kind.VALUE_AND_GRADIENT),
            r"gradient: the loss has no graph to the weights",
        ),
    ],
)
def test_losses_that_cannot_be_used_are_said_clearly(
    loss: Callable[..., Any], request_: Request, message: str
) -> None:
    with Objective(loss, torch.ones(2)) as objective:
        with pytest.raises(HybridoptError, match=message):
            objective.answer(request_)
        assert objective.ledger.evaluations == 0


def test_a_loss_without_a_graph_has_no_gradient_at_a_point() -> None:
    with Objective(lambda x: torch.round(x.detach()).sum(), torch.ones(2)) as objective:
        answer = objective.answer(at(Kind.VALUE_AND_GRADIENT, [1, 1]))
        assert (answer.loss, answer.gradient, answer.finite) == (2, None, True)
        objective.answer(at(Kind.VALUE, [1, 1], keep_graph=True))
        assert objective.answer(at(Kind.GRADIENT, [1, 1])).gradient is None
        assert (objective.ledger.forward, objective.ledger.backward) == (2, 0), (
            "nothing was done, nothing is paid"
        )


# -- two runs on the same weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["adam", "slsqp"])
def test_an_in_place_method_whose_weights_another_run_moved_says_so(other: str) -> None:
    def loss(model: nn.Module) -> torch.Tensor:
        return sum(((p - 3) ** 2).sum() for p in model.parameters())  # type: ignore[return-value]

    model = nn.Linear(2, 1)
    first = hybridopt.Run(loss, model, "adam", budget=50, seed=0)
    second = hybridopt.Run(loss, model, other, budget=50, seed=0)
    first.step()
    second.step()
    with pytest.raises(ObjectiveError, match=r"another run has moved them.*a model of its own"):
        first.step()
    second.finish()
    first.finish()
    again = hybridopt.minimize(loss, model, "adam(lr=0.1)", budget=20, seed=0)  # one after the other is right
    assert again.evaluations == 20


def test_solvers_that_bring_the_weights_to_each_point_may_take_turns() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return ((x - 3) ** 2).sum() + x.prod()

    def path(take_turns: bool) -> list[float]:
        x = torch.ones(3, dtype=torch.float64)
        run = hybridopt.Run(loss, x, "slsqp", budget=40, seed=0)
        other = hybridopt.Run(loss, x, "lbfgsb", budget=40, seed=0)
        with run, other:
            found = []
            while (step := run.step()) is not None:
                found.append(step.loss)
                if take_turns:
                    other.step()
        return found

    assert path(True) == path(False)
