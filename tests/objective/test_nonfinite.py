"""Losses and gradients that are not finite."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridopt.errors import (
    NonFiniteLoss,
    Stop,
)
from hybridopt.ledger import Ledger, Reason
from hybridopt.objective import NONFINITE_PATIENCE, Objective
from hybridopt.optimizer import Kind, Request
from tests.objective.drive import at, saved

# -- losses that are not finite -------------------------------------------------------------------------------------

BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("form", ["array", "tensor"])
def test_a_loss_that_is_not_finite_is_rejected_counted_and_said_once(bad: float, form: str) -> None:
    def loss(x: Any) -> Any:
        return (x * x).sum() if x[0] < 5 else x[0] * 0 + bad

    objective = Objective(loss, np.zeros(2) if form == "array" else torch.zeros(2, dtype=torch.float64))
    with objective:
        objective.answer(at(Kind.VALUE, [1, 1]))
        with pytest.warns(RuntimeWarning) as caught:  # noqa: PT031 - all of these warn once
            answer = objective.answer(at(Kind.VALUE, [9, 0]))
            assert (answer.loss, answer.finite) == (math.inf, False)
            population = objective.answer(at(Kind.POPULATION, [[9, 0], [0.5, 0], [8, 0]]))
            assert population.losses is not None
            assert population.losses.tolist() == [math.inf, 0.25, math.inf]
            assert (population.loss, population.finite) == (0.25, False)
            if form == "tensor":
                both = objective.answer(at(Kind.VALUE_AND_GRADIENT, [9, 0]))
                assert (both.loss, both.finite) == (math.inf, False)
                assert both.gradient is not None
                assert both.gradient.tolist() == [0, 0]
        assert [str(w.message).partition(";")[0] for w in caught] == [
            f"loss {bad} at evaluation 2: rejected (told to the method as +inf, never the best)"
        ]
        ledger = objective.ledger
        assert ledger.nonfinite == 3 + (form == "tensor")
        assert (ledger.best_loss, ledger.best_evaluation) == (0.25, 4)
        assert ledger.best_point.x.tolist() == [0.5, 0]
        state = saved(objective)
    other = Objective(loss, np.zeros(2) if form == "array" else torch.zeros(2, dtype=torch.float64))
    other.load_state_dict(state)
    with other:
        other.answer(at(Kind.VALUE, [9, 0]))  # a resumed run does not warn again (warnings are errors here)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", [Kind.VALUE, Kind.VALUE_AND_GRADIENT, Kind.POPULATION])
def test_raise_on_request(bad: float, kind: Kind) -> None:
    objective = Objective(lambda x: x.sum() * bad, torch.ones(2), nonfinite="raise")
    with objective:
        with pytest.raises(NonFiniteLoss, match=r"got -?(nan|inf)"):
            objective.answer(at(kind, [[1, 1]] if kind is Kind.POPULATION else [1, 1]))
        assert (objective.ledger.evaluations, objective.ledger.nonfinite) == (1, 1)
        assert objective.ledger.best_point is None


@pytest.mark.parametrize("bad", BAD)
def test_a_method_that_follows_gradients_in_place_cannot_begin_where_there_is_none(bad: float) -> None:
    with Objective(lambda x: x.sum() * bad, torch.ones(2)) as objective:
        with pytest.raises(
            NonFiniteLoss, match=r"at the start point.*cannot begin here: change the initial weights"
        ):
            objective.answer(at(Kind.VALUE_AND_GRADIENT))
    # a finite loss with a gradient that is not: sqrt at 0
    with Objective(lambda x: torch.sqrt(x - 1).sum(), torch.ones(2)) as objective:
        with pytest.raises(NonFiniteLoss, match="at the start point"):
            objective.answer(at(Kind.VALUE_AND_GRADIENT))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "request_", [at(Kind.VALUE_AND_GRADIENT, [1, 1]), at(Kind.VALUE, [1, 1], keep_graph=True)]
)
def test_a_first_point_that_a_method_chose_is_a_rejected_one(bad: float, request_: Request) -> None:
    """A global search asks elsewhere first; whether it can begin there it knows itself."""
    with Objective(lambda x: x.sum() * bad, torch.ones(2)) as objective:
        with pytest.warns(RuntimeWarning, match=r"at evaluation 1: rejected"):
            answer = objective.answer(request_)
        assert (answer.loss, answer.finite) == (math.inf, False)


def test_a_gradient_that_is_not_finite_is_told_as_a_rejected_point_and_nothing_is_learned_from_it() -> None:
    objective = Objective(lambda x: torch.sqrt(x).sum(), torch.ones(2))
    with objective:
        objective.answer(at(Kind.VALUE_AND_GRADIENT, [1, 1]))
        with pytest.warns(RuntimeWarning, match=r"gradient.* at evaluation 2: rejected"):
            answer = objective.answer(at(Kind.VALUE_AND_GRADIENT, [0, 0]))
        assert (answer.loss, answer.finite) == (math.inf, False)
        assert answer.gradient is not None
        assert answer.gradient.tolist() == [0, 0]
        objective.answer(at(Kind.VALUE, [0, 0], keep_graph=True))
        with pytest.raises(Stop) as stop:  # asked for at an accepted point: there is no way on
            objective.answer(at(Kind.GRADIENT, [0, 0]))
        assert stop.value.reason is Reason.NON_FINITE


def _rejected(objective: Objective, request: Request, times: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(times):
            assert not objective.answer(request).finite


@pytest.mark.parametrize(
    "request_",
    [
        at(Kind.VALUE, [-1, 0]),
        at(Kind.POPULATION, [[-1, 0], [-2, 0], [-3, 0]]),
        at(Kind.VALUE_AND_GRADIENT, [-1, 0]),
        at(Kind.VALUE_AND_GRADIENT, [0, 0]),  # the loss is finite there, its gradient is not
    ],
)
def test_thirty_questions_in_a_row_without_a_finite_answer_end_the_run(request_: Request) -> None:
    assert NONFINITE_PATIENCE == 30
    objective = Objective(lambda x: torch.sqrt(x[0]), torch.ones(2))
    with objective:
        objective.answer(at(Kind.VALUE, [1, 0]))
        _rejected(objective, request_, 29)
        objective.answer(at(Kind.VALUE_AND_GRADIENT, [1, 0]))  # a finite one: counted anew
        objective.answer(at(Kind.VALUE, [1, 0]))
        _rejected(objective, request_, 30)
        before = objective.ledger.evaluations
        with pytest.raises(Stop) as stop:
            objective.answer(request_)
        assert (stop.value.reason, stop.value.ledger) == (Reason.NON_FINITE, objective.ledger)
        assert objective.ledger.evaluations == before


def test_a_generation_with_one_finite_loss_is_a_finite_answer() -> None:
    objective = Objective(lambda x: torch.sqrt(x[0]), torch.ones(2))
    with objective, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(40):
            objective.answer(at(Kind.POPULATION, [[1, 0], *[[-1, 0]] * 40]))
        assert objective.ledger.nonfinite == 1600


def test_a_stage_without_a_finite_loss_ends_and_the_next_one_begins() -> None:
    objective = Objective(lambda x: torch.sqrt(x[0]), torch.ones(2))
    first, second = Ledger(), Ledger()
    with objective:
        objective.answer(at(Kind.VALUE, [1, 0]))
        _rejected(objective, at(Kind.VALUE, [-1, 0]).within(first), 30)
        stop = objective.answer(at(Kind.VALUE, [-1, 0]).within(first)).stop
        assert stop is not None
        assert (stop.ledger, stop.reason) == (first, Reason.NON_FINITE)
        answer = objective.answer(at(Kind.VALUE, [1, 0]).within(second))
        assert (answer.stop, answer.loss) == (None, 1)


@pytest.mark.filterwarnings("ignore:loss nan")
@pytest.mark.parametrize("batch", ["loop", "vmap"])
def test_a_point_with_a_nan_in_it_is_no_point(batch: Any) -> None:
    """Whatever a loss says there: what counts, rounds or compares is finite at nan."""
    called = []

    def loss(x: Tensor) -> Tensor:
        called.append(1)
        return (x > 0.5).sum() * x.isfinite().all() + 0 * x.detach().nan_to_num().sum()

    with Objective(loss, torch.ones(3), batch=batch) as objective:
        good, bad = np.full(3, 0.7), np.array([0.7, np.nan, 0.7])
        for kind in (Kind.VALUE, Kind.VALUE_AND_GRADIENT):
            answer = objective.answer(Request(kind, bad))
            assert (answer.loss, answer.finite) == (math.inf, False)
        assert called == []
        losses = objective.answer(Request(Kind.POPULATION, np.array([good, good, bad, good, bad]))).losses
        assert losses is not None
        assert np.isinf(losses).tolist() == [False, False, True, False, True]
        assert objective.ledger.best_loss == 3
        assert objective.ledger.nonfinite == 4
        assert objective.ledger.evaluations == 7
        objective.restore_best()
        assert objective.vector.read().tolist() == pytest.approx([0.7] * 3)
