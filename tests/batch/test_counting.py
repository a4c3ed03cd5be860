"""Batches are counted, cut by budgets, and gone on with after a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridopt.errors import StateError, Stop
from hybridopt.ledger import Budget, Ledger, Reason
from hybridopt.objective import Objective
from tests.batch.drive import GENERATIONS, ask, bits, new, through_a_file, way


def run(objective: Objective, budgets: list[Any], through: bool) -> tuple[list[list[str]], Any, Objective]:
    """Three generations under growing budgets; losses bit for bit, and the random state at the end."""
    found = []
    todo = list(budgets)
    for x in GENERATIONS:
        while True:
            try:
                answer = objective.answer(ask(x))
                break
            except Stop:
                spent = objective.ledger
                assert spent.evaluations <= (spent.budget.evaluations or math.inf)
                assert spent.forward_equivalents <= (spent.budget.forward_equivalents or math.inf)
                if through:
                    state = through_a_file(objective.state_dict())
                    objective.close()
                    objective = new(noise=objective.randomness.policy)
                    objective.load_state_dict(state)
                objective.ledger.limit(todo.pop(0) if todo else Budget())
        assert answer.losses is not None
        found.append(bits(answer.losses))
    with objective:
        return found, objective.randomness.state_dict(), objective


@pytest.mark.parametrize("noise", ["shared", "independent"])
@pytest.mark.parametrize("choice", ["auto", 4])
@pytest.mark.parametrize("unit", ["evaluations", "forward_equivalents"])
@settings(max_examples=25)
@given(data=st.data(), through=st.booleans())
def test_however_a_run_is_cut_it_walks_the_same_path_bit_for_bit(
    choice: Any, noise: Any, unit: str, data: st.DataObject, through: bool
) -> None:
    limits = sorted(data.draw(st.sets(st.integers(1, 36), max_size=4)))
    budgets = [Budget(**{unit: limit}) for limit in limits]
    whole, drawn, one = run(new(None, choice, noise), [], False)
    cut, drawn_too, other = run(new(budgets[0] if budgets else None, choice, noise), budgets[1:], through)
    assert cut == whole
    for key in ("now", "mark", "last"):
        torch.testing.assert_close(drawn_too[key], drawn[key], rtol=0, atol=0)
    a, b = one.ledger, other.ledger
    assert (a.evaluations, a.forward, a.backward, a.recomputed) == (33, 35, 0, 0)
    assert (b.evaluations, b.forward, b.backward) == (33, 35, 0)
    assert (a.best_loss, a.best_evaluation, a.worst_loss) == (b.best_loss, b.best_evaluation, b.worst_loss)
    np.testing.assert_array_equal(a.best_point.x, b.best_point.x)
    assert way(other)[0] == "vmap"


def test_batched_and_looped_losses_are_not_the_same_bits() -> None:
    """Else the test above would compare nothing."""
    paths = [run(new(None, choice), [], False)[0] for choice in ("loop", "auto", 4)]
    assert paths[0] != paths[1] != paths[2] != paths[0]


@pytest.mark.parametrize("limits", [{"evaluations": 5}, {"forward_equivalents": 7.5}])
def test_of_a_batch_only_the_rows_that_fit_are_evaluated(limits: dict[str, Any]) -> None:
    objective = new(limits)
    seen = []

    class Listening:
        def evaluated(self, ledger: Ledger, scopes: Any, loss: float, probe: bool) -> None:
            seen.append((ledger.evaluations, ledger.forward, loss, probe))

    objective.listeners.append(Listening())
    with objective:
        for _ in range(2):
            with pytest.raises(Stop):
                objective.answer(ask(GENERATIONS[0], probe=True))
        ledger = objective.ledger
        assert (ledger.evaluations, ledger.forward, ledger.recomputed) == (5, 7, 6)
        assert [row[:2] for row in seen] == [(1, 1), (2, 2), (3, 5), (4, 6), (5, 7)]
        assert all(row[3] for row in seen)
        assert math.isnan(ledger.last_loss), "probes"
        ledger.limit(Budget(evaluations=100))
        answer = objective.answer(ask(GENERATIONS[0], probe=True))
    assert answer.losses is not None
    assert [row[2] for row in seen] == answer.losses.tolist()
    assert (ledger.evaluations, ledger.forward, ledger.recomputed) == (11, 13, 9)


def test_rows_that_do_not_fit_are_not_looked_at() -> None:
    """In their place stand copies of a row that does."""
    seen: list[list[float]] = []

    def loss(x: Tensor) -> Tensor:
        seen.extend(torch.func.debug_unwrap(x).detach().reshape(-1, 2).tolist())
        return (x**2).sum()

    x = np.arange(12.0).reshape(6, 2)
    with Objective(loss, torch.zeros(2), budget=4, batch=4) as objective, pytest.raises(Stop):
        objective.answer(ask(x))
    rows = x.tolist()
    assert seen == [*rows[:2], *rows[:2], rows[2], rows[3], rows[2], rows[2]]


def test_the_check_is_not_begun_where_it_does_not_fit() -> None:
    for limits, evaluations in (
        ({"forward_equivalents": 4.9}, 2),
        ({"evaluations": 2}, 2),
        ({"evaluations": 1}, 1),
    ):
        with new(limits) as objective:
            with pytest.raises(Stop):
                objective.answer(ask(GENERATIONS[0]))
            assert (objective.ledger.evaluations, objective.ledger.forward) == (evaluations, evaluations)
            assert way(objective)[0] == "open"


def test_a_stage_is_cut_in_a_batch_and_the_next_one_goes_on() -> None:
    stage, following = Ledger(Budget(evaluations=5)), Ledger(Budget(forward_equivalents=6))
    with new(18) as objective:
        answer = objective.answer(ask(GENERATIONS[0]).within(stage))
        assert answer.stop is not None
        assert (answer.stop.ledger, stage.evaluations, stage.forward) == (stage, 5, 7)
        answer = objective.answer(ask(GENERATIONS[0]).within(following))
        assert answer.stop is not None
        assert (following.evaluations, following.forward) == (6, 6), "it was checked before"
        with pytest.raises(Stop):
            objective.answer(ask(GENERATIONS[1]))
        assert (objective.ledger.evaluations, objective.ledger.forward) == (18, 20)


def test_seconds_are_looked_at_before_each_batch() -> None:
    now = [0.0]

    def slow(x: Tensor) -> Tensor:
        now[0] += 1
        return x.sum()

    objective = Objective(slow, torch.ones(2), {"seconds": 4.5}, batch=3)
    objective.ledger._clock = lambda: now[0]
    with objective, pytest.raises(Stop) as stop:
        objective.answer(ask(np.arange(40.0).reshape(20, 2)))
    assert stop.value.reason is Reason.SECONDS
    assert (now[0], objective.ledger.evaluations) == (5, 2 + 2 * 3), "two alone, the check, two batches"


def test_a_target_ends_the_run_before_the_next_batch() -> None:
    objective = Objective(lambda x: (x**2).sum(), torch.ones(1), {"evaluations": 99, "target": 0.0}, batch=4)
    with objective, pytest.raises(Stop) as stop:
        objective.answer(ask(np.arange(3.0, -20, -1)[:, None]))
    assert stop.value.reason is Reason.TARGET
    assert objective.ledger.evaluations == 2 + 4
    assert objective.ledger.best_evaluation == 4


def test_the_way_and_the_size_of_a_batch_are_state() -> None:
    with new(None, 4) as objective:
        objective.answer(ask(GENERATIONS[0]))
        state = through_a_file(objective.state_dict())
        expected = [bits(objective.answer(ask(x)).losses) for x in GENERATIONS[1:]]  # type: ignore[arg-type]
    for choice in ("auto", "loop", "vmap", 9):
        with new(None, choice) as other:
            other.load_state_dict(state)
            found = [bits(other.answer(ask(x)).losses) for x in GENERATIONS[1:]]  # type: ignore[arg-type]
            assert found == expected
            assert (other.ledger.evaluations, other.ledger.forward) == (33, 35), "checked once"


def test_a_batched_state_is_refused_where_there_can_be_no_batch() -> None:
    start = torch.zeros(3)
    with Objective(lambda x: x.sum(), start, batch="auto") as objective:
        objective.answer(ask(np.arange(30.0).reshape(10, 3)))
        state = objective.state_dict()
    with Objective(lambda: start.sum(), start, batch="auto") as other:
        with pytest.raises(StateError, match="its populations were evaluated in batches; here a closure"):
            other.load_state_dict(state)
