"""Losses that are not finite or raise, and what stays as it was."""

from __future__ import annotations

import contextlib
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybridopt.errors import BoundsError, NonFiniteLoss, Stop
from hybridopt.ledger import Reason
from hybridopt.objective import Objective
from hybridopt.optimizer import Kind, Request
from hybridopt.vector import ParameterVector
from tests.batch.drive import BAD, INPUTS, ROWS, ask, linear, on, population, rooted, way


def test_members_that_are_not_finite_are_rejected_as_one_by_one() -> None:
    found = []
    for choice in ("loop", "auto", 3):
        with Objective(rooted, torch.ones(2, dtype=torch.float64), batch=choice) as objective:
            with pytest.warns(RuntimeWarning, match="loss nan at evaluation 1: rejected") as caught:
                answer = objective.answer(ask(BAD))
            assert len(caught) == 1
            ledger = objective.ledger
            assert answer.losses is not None
            found.append((
                answer.losses.tolist(), answer.finite, answer.loss, ledger.nonfinite, ledger.nonfinite_in_a_row,
                ledger.best_loss, ledger.best_evaluation, ledger.best_point.x.tolist(), ledger.worst_loss,
            ))  # fmt: skip
            assert way(objective)[0] == ("loop" if choice == "loop" else "vmap")
            for _ in range(30):
                assert ledger.nonfinite_in_a_row < 30
                objective.answer(ask([[-1.0, 0]] * 5))
            with pytest.raises(Stop) as stop:
                objective.answer(ask(BAD))
            assert stop.value.reason is Reason.NON_FINITE
            assert ledger.evaluations == len(BAD) + 150
    assert found[0] == found[1] == found[2]
    assert found[0][0] == [math.inf, 3, math.inf, 3, 5, math.inf, 5, 0]


def test_a_warning_in_a_batch_names_its_evaluation() -> None:
    with Objective(rooted, torch.ones(2, dtype=torch.float64), batch="auto") as objective:
        with pytest.warns(RuntimeWarning, match="loss nan at evaluation 5: rejected"):
            objective.answer(ask([[1, 1]] * 4 + BAD))


def test_raise_on_request_books_the_whole_batch() -> None:
    with Objective(rooted, torch.ones(2, dtype=torch.float64), nonfinite="raise", batch="auto") as objective:
        for evaluations in (9, 14):  # asked again, the rows before the first bad one are known
            with pytest.raises(NonFiniteLoss, match="loss: got nan at evaluation"):
                objective.answer(ask([[1, 1]] * 4 + [[-1, 0]] + [[2, 1]] * 4))
            assert objective.ledger.evaluations == evaluations
        assert objective.ledger.nonfinite == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("from the loss")])
@pytest.mark.parametrize("call", range(1, 6))
def test_after_an_exception_the_population_can_be_asked_again(error: BaseException, call: int) -> None:
    calls = [0]
    points = [population(ParameterVector(torch.zeros(3)), 6, seed) for seed in (0, 1)]

    def path(fails: int | None) -> Any:
        calls[0] = 0

        def loss(x: Tensor) -> Tensor:
            calls[0] += 1
            noise = torch.rand(3) + float(np.random.rand()) + random.random()
            if calls[0] == fails:
                raise error
            return ((x - noise) ** 2).sum()

        found = []
        with Objective(loss, torch.zeros(3), seed=1, batch="auto") as objective:
            for x in points:
                with contextlib.suppress(type(error)):
                    found.append(objective.answer(ask(x)).losses)
                    continue
                found.append(objective.answer(ask(x)).losses)
            return (
                found,
                objective.ledger.evaluations,
                way(objective),
                objective.randomness.state_dict()["now"],
            )

    # calls: two rows, the check, the batch, the next population
    expected, got = path(None), path(call)
    assert expected[1] == got[1] == 12
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    torch.testing.assert_close(got[3], expected[3], rtol=0, atol=0)
    swallowed = isinstance(error, RuntimeError) and call >= 3
    assert got[2] == (("loop", "RuntimeError: from the loss") if swallowed else ("vmap", "")), (
        "never silently"
    )


def test_an_error_that_one_alone_raises_too_is_the_losss_own() -> None:
    def loss(x: Tensor) -> Tensor:
        if broken:
            raise ValueError("broken")
        return (x**2).sum()

    broken: list[int] = []
    with Objective(loss, torch.zeros(3), batch="auto") as objective:
        objective.answer(ask(np.eye(5, 3)))
        broken.append(1)
        with pytest.raises(ValueError, match="broken"):
            objective.answer(ask(np.eye(6, 3)))
        assert (objective.ledger.evaluations, way(objective)) == (5, ("vmap", ""))
        broken.clear()
        objective.answer(ask(np.eye(6, 3)))
        assert (objective.ledger.evaluations, way(objective)) == (11, ("vmap", ""))


def test_a_model_that_stops_being_batchable_is_looped_from_then_on() -> None:
    model = nn.Sequential(linear(), nn.BatchNorm1d(2), nn.Tanh()).eval()
    with Objective(on(INPUTS), model, batch="auto") as objective:
        x = population(objective.vector)
        objective.answer(ask(x))
        assert way(objective)[0] == "vmap"
        model.train()
        batched = objective.answer(ask(x)).losses
        assert way(objective)[0] == "loop"
        assert "Batch norm got a batched tensor" in objective.notes[0]
        assert objective.ledger.evaluations == 2 * ROWS
        looped = objective.answer(ask(x)).losses
        assert batched is not None
        assert looped is not None
        assert batched.tolist() == looped.tolist()
        assert model[1].num_batches_tracked == 0


def test_points_outside_the_bounds_are_refused_before_anything_is_evaluated() -> None:
    with Objective(lambda x: x.sum(), torch.zeros(2), bounds=(-1, 1), batch="auto") as objective:
        objective.answer(ask(np.zeros((5, 2))))
        with pytest.raises(BoundsError, match=r"outside the bounds: weight 1 at 1\.5"):
            objective.answer(ask([[0, 0]] * 4 + [[0, 1.5]]))
        assert objective.ledger.evaluations == 5


# -- what stays as it was ---------------------------------------------------------------------------------------------


def test_the_request_and_the_model_are_not_written() -> None:
    def greedy(x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(2)
        return x.sum()

    start = torch.zeros(2, dtype=torch.float64)
    with Objective(greedy, start, batch="auto") as objective:
        x = np.ones((6, 2))
        for _ in range(2):
            answer = objective.answer(ask(x))
        assert answer.losses is not None
        assert answer.losses.tolist() == [4.0] * 6
        assert (x == 1).all()
        assert objective.ledger.best_point.x.tolist() == [1, 1]


def test_a_gradient_after_a_batch_is_that_of_its_own_point() -> None:
    with Objective(lambda x: (x**2).sum(), torch.zeros(2, dtype=torch.float64), batch="auto") as objective:
        objective.answer(Request(Kind.VALUE, np.array([1.0, 2.0]), keep_graph=True))
        objective.answer(ask(np.eye(5, 2), probe=True))
        answer = objective.answer(Request(Kind.GRADIENT, np.array([1.0, 2.0])))
        assert answer.gradient is not None
        assert answer.gradient.tolist() == [2, 4]
        for _ in range(2):  # the second time no row comes alone, and the weights stand where none of them is
            objective.answer(Request(Kind.VALUE, np.array([1.0, 2.0]), keep_graph=True))
            objective.answer(ask([[0, 1]] * 5 + [[3, 4]]))
            assert objective.evaluation.kept is None, "the memory of its graph is given back"
        answer = objective.answer(Request(Kind.GRADIENT, np.array([3.0, 4.0])))
        assert answer.gradient is not None
        assert answer.gradient.tolist() == [6, 8]


def test_best_points_found_in_a_batch_are_copies() -> None:
    with Objective(lambda x: (x**2).sum(), torch.zeros(2, dtype=torch.float64), batch="auto") as objective:
        x = np.arange(20.0, 0, -1).reshape(10, 2)
        objective.answer(ask(x))
        first = objective.ledger.best_point
        assert objective.vector.read().tolist() == [18, 17], "where the second row, the last alone, left them"
        assert first.x.tolist() == [2, 1]
        assert first.x.base is None, "not a row that keeps its whole population alive"
        x[:] = 0
        objective.answer(ask(x - 7))
        assert first.x.tolist() == [2, 1]
        objective.restore_best()
        assert objective.vector.read().tolist() == [2, 1]
