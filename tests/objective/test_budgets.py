"""Budgets of an objective are exact, whatever is asked."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridopt.errors import (
    Stop,
)
from hybridopt.ledger import Budget, Ledger, Reason
from hybridopt.objective import Objective
from hybridopt.optimizer import Kind
from tests.objective.drive import SMOOTH, X, at, made, saved

# -- budgets --------------------------------------------------------------------------------------------------------


def noisy(x: Tensor) -> Tensor:
    return (x**2).sum() + torch.rand(()) + float(np.random.randn()) + random.random()


POPULATION = np.arange(12.0).reshape(6, 2) / 7


@pytest.mark.parametrize("noise", ["shared", "independent", "fixed"])
@pytest.mark.parametrize("budget", [{"evaluations": 4}, {"forward_equivalents": 4.5}])
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_population_is_cut_at_the_budget_and_goes_on_exactly(
    noise: Any, budget: dict[str, Any], through_a_file: bool
) -> None:
    calls = []

    def loss(x: Tensor) -> Tensor:
        calls.append(x.tolist())
        return noisy(x)

    def new(limits: Any) -> Objective:
        start = torch.zeros(2, dtype=torch.float64)
        return Objective(loss, start, limits, seed=3, noise=noise, batch="loop")

    with new(None) as whole:
        whole.answer(at(Kind.VALUE, [1, 1]))
        expected = whole.answer(at(Kind.POPULATION, POPULATION))
        after = whole.answer(at(Kind.POPULATION, POPULATION[:2]))
        best, state = whole.ledger.best_loss, saved(whole)
    calls.clear()

    objective = new(budget)
    objective.answer(at(Kind.VALUE, [1, 1]))
    for _ in range(2):  # asking again without more budget changes nothing
        with pytest.raises(Stop) as stop:
            objective.answer(at(Kind.POPULATION, POPULATION))
        assert stop.value.ledger is objective.ledger
        assert objective.ledger.evaluations == 4
    assert calls == [[1, 1], *POPULATION[:3].tolist()]
    if through_a_file:
        kept = saved(objective)
        objective.close()
        objective = new(None)
        objective.load_state_dict(kept)
    objective.ledger.limit(Budget(evaluations=9))
    answer = objective.answer(at(Kind.POPULATION, POPULATION))
    assert calls == [[1, 1], *POPULATION.tolist()], "no row twice"
    assert answer.losses is not None
    assert expected.losses is not None
    assert answer.losses.tolist() == expected.losses.tolist()
    assert objective.ledger.evaluations == 7
    again = objective.answer(at(Kind.POPULATION, POPULATION[:2]))
    assert again.losses is not None
    assert after.losses is not None
    assert again.losses.tolist() == after.losses.tolist(), "the numbers drawn afterwards are the same too"
    assert objective.ledger.best_loss == best
    got = saved(objective)
    for key in ("best", "buffers"):
        torch.testing.assert_close(got[key], state[key], rtol=0, atol=0)
    assert got["generations"]["begun"] is None
    objective.close()


def test_a_population_that_is_asked_anew_is_evaluated_anew() -> None:
    objective = Objective(lambda x: (x**2).sum(), torch.zeros(2), 3)
    with objective:
        with pytest.raises(Stop):
            objective.answer(at(Kind.POPULATION, POPULATION))
        objective.ledger.limit(Budget(evaluations=100))
        other = objective.answer(at(Kind.POPULATION, POPULATION[:2]))
        assert other.losses is not None
        assert len(other.losses) == 2
        assert objective.ledger.evaluations == 5
        for _ in range(2):
            objective.answer(at(Kind.POPULATION, POPULATION))
        assert objective.ledger.evaluations == 17


@pytest.mark.parametrize("form", SMOOTH)
@pytest.mark.parametrize("kind", [Kind.VALUE, Kind.VALUE_AND_GRADIENT, Kind.POPULATION])
def test_an_evaluation_that_would_pass_the_budget_is_not_begun(form: str, kind: Kind) -> None:
    own = form == "closure with backward"
    cost = 3 if own or kind is Kind.VALUE_AND_GRADIENT else 1
    objective, meter = made(form, {"forward_equivalents": 3 * cost + 0.5})
    x = [X] if kind is Kind.POPULATION else X
    with objective:
        for _ in range(3):
            objective.answer(at(kind, x))
        with pytest.raises(Stop) as stop:
            objective.answer(at(kind, x))
    assert stop.value.reason is Reason.FORWARD_EQUIVALENTS
    assert (meter.forward, objective.ledger.forward_equivalents) == (3, 3 * cost)


def test_seconds_are_looked_at_before_each_evaluation() -> None:
    now = [0.0]

    def slow(x: Tensor) -> Tensor:
        now[0] += 1
        return x.sum()

    objective = Objective(slow, torch.ones(2), {"seconds": 2.5}, batch="loop")
    objective.ledger._clock = lambda: now[0]
    with objective, pytest.raises(Stop) as stop:
        objective.answer(at(Kind.POPULATION, np.zeros((9, 2))))
    assert stop.value.reason is Reason.SECONDS
    assert objective.ledger.evaluations == now[0] == 3


def test_a_target_ends_the_run_before_the_next_evaluation() -> None:
    objective = Objective(lambda x: (x**2).sum(), torch.ones(2), {"evaluations": 9, "target": 1.0})
    with objective:
        assert objective.answer(at(Kind.VALUE, [1, 0])).loss == 1
        with pytest.raises(Stop) as stop:
            objective.answer(at(Kind.VALUE, [0, 0]))
    assert stop.value.reason is Reason.TARGET


def test_stages_are_limited_on_their_own_and_booked_in_the_run() -> None:
    objective = Objective(lambda x: (x**2).sum(), torch.ones(2), {"evaluations": 7})
    outer, inner = Ledger(Budget(evaluations=5)), Ledger(Budget(forward_equivalents=3), backward_cost=9)
    with objective:
        value = at(Kind.VALUE, [1, 0]).within(inner).within(outer)
        assert value.scopes == (outer, inner)
        for _ in range(3):
            assert objective.answer(value).stop is None
        stop = objective.answer(value).stop
        assert stop is not None
        assert (stop.ledger, stop.reason) == (inner, Reason.FORWARD_EQUIVALENTS)
        cut = objective.answer(at(Kind.POPULATION, [[0, 0], [3, 0], [2, 0]]).within(outer))
        assert cut.stop is not None
        assert cut.stop.ledger is outer
        assert [w.evaluations for w in (objective.ledger, outer, inner)] == [5, 5, 3]
        assert [w.best_loss for w in (objective.ledger, outer, inner)] == [0, 0, 1]
        assert inner.best_point.x.tolist() == [1, 0]
        # what a stage's stop cut off is not kept for somebody else's question
        late = Ledger()
        asked = at(Kind.POPULATION, [[0, 0], [3, 0], [2, 0]]).within(late)
        with pytest.raises(Stop) as caught:
            objective.answer(asked)
        assert caught.value.ledger is objective.ledger
        assert (objective.ledger.evaluations, late.evaluations) == (7, 2)
        assert inner.backward_cost == objective.ledger.backward_cost == 2, "one currency"
