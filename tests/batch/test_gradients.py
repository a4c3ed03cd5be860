"""Values and gradients of a population."""

from __future__ import annotations

import contextlib
import gc
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybridopt import batch as batching
from hybridopt.errors import MissingGradient, Stop
from hybridopt.ledger import Budget, Ledger
from hybridopt.objective import Objective
from hybridopt.vector import FloatArray
from tests.batch.drive import (
    BAD,
    CASES,
    GENERATIONS,
    INPUTS,
    ROWS,
    ask,
    linear,
    new,
    on,
    population,
    rooted,
    watch,
    way,
)

# -- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mlp", "convolution", "dropout", "tied", "frozen part", "two dtypes", "bounds and scale", "mapping",
             "tensor", "batch norm, train", "lstm", "branch", "bfloat16", "captured: small penalty", "attention"],
)  # fmt: skip
def test_values_and_gradients_of_many_points(name: str) -> None:
    def answered(choice: Any) -> Any:
        torch.manual_seed(5)
        loss, target, reason, options = CASES[name]()
        with Objective(loss, target, seed=3, batch=choice, **options) as objective:
            x = objective.vector.encode(population(objective.vector))
            found = [objective.values_and_gradients(x) for _ in range(2)]
            assert all(t.grad is None for t in objective.vector.tensors)
            return found, objective, reason, objective.randomness.state_dict()

    looped, plain, _, drawn = answered("loop")
    batched, objective, reason, drawn_too = answered("auto")
    ledger = objective.ledger
    eps = max(torch.finfo(t.dtype).eps for t in objective.vector.tensors)
    for (losses, gradients), (expected, slopes) in zip(batched, looped, strict=True):
        assert gradients.shape == (ROWS, objective.vector.n)
        np.testing.assert_allclose(losses, expected, rtol=200 * eps)
        np.testing.assert_allclose(gradients, slopes, atol=200 * eps * np.abs(slopes).max())
    for key in ("now", "mark"):
        torch.testing.assert_close(drawn_too[key], drawn[key], rtol=0, atol=0)
    check = 2 * ("weights" not in reason)
    assert (plain.ledger.evaluations, plain.ledger.forward, plain.ledger.backward) == (14, 14, 14)
    assert (ledger.evaluations, ledger.forward, ledger.backward) == (14, 14 + check, 14 + check)
    assert ledger.best_loss == pytest.approx(plain.ledger.best_loss, rel=200 * eps)
    state = objective.state_dict()["generations"]["gradient_batch"]
    assert state["way"] == ("loop" if reason else "vmap")


def test_values_and_gradients_are_all_or_nothing_and_rejected_as_at_one_point() -> None:
    for choice in ("loop", "auto", 3):
        with Objective(rooted, torch.ones(2, dtype=torch.float64), 40, batch=choice, scale=2.0) as objective:
            with pytest.warns(RuntimeWarning, match="loss nan at evaluation 1"):
                losses, gradients = objective.values_and_gradients(np.array(BAD) / 2)
            # at (0, 0) the loss is finite, its gradient is not
            assert losses.tolist() == [math.inf, 3, math.inf, 3, 5, math.inf, 5, math.inf]
            slopes = np.array(
                [[0, 0], [1 / 4, 2], [0, 0], [1 / 6, 0], [1 / 2, 4], [0, 0], [1 / 8, 2], [0, 0]]
            )
            np.testing.assert_allclose(gradients, slopes * 2, rtol=1e-15)
            assert (objective.ledger.nonfinite, objective.ledger.nonfinite_in_a_row) == (3, 0)
            before = objective.ledger.spent()
            with pytest.raises(Stop):
                objective.values_and_gradients(np.ones((33, 2)))
            assert {**objective.ledger.spent(), "seconds": 0} == {**before, "seconds": 0}
            scope = Ledger()
            objective.values_and_gradients(np.ones((32, 2)), (scope,))
            assert (scope.evaluations, scope.forward, scope.backward) == (32, 32, 32)


def test_the_check_of_gradients_must_fit_too() -> None:
    x = np.arange(8.0).reshape(4, 2)
    for limit, evaluations in ((17, 0), (18, 4)):  # 4 rows and 2 of the check, each a forward and a backward
        with Objective(lambda x: (x**2).sum(), torch.zeros(2), {"forward_equivalents": limit}) as objective:
            with contextlib.suppress(Stop):
                objective.values_and_gradients(x)
            assert objective.ledger.evaluations == evaluations
            assert objective.ledger.forward_equivalents in (0, 18)


def test_gradients_of_a_surrogate_come_one_by_one() -> None:
    objective = Objective(torch.sum, torch.zeros(2), surrogate=lambda x: (x**2).sum(), batch="auto")
    with objective:
        losses, gradients = objective.values_and_gradients(np.array([[1.0, 2.0]] * 5))
        assert losses.tolist() == [3] * 5
        assert gradients.tolist() == [[2, 4]] * 5
        assert (objective.ledger.forward, objective.ledger.backward) == (10, 5)


def test_a_closure_and_a_surrogate_each_pay_their_backward() -> None:
    x = torch.zeros(2)

    def closure() -> Tensor:
        loss = (x**2).sum()
        loss.backward()
        return loss

    with Objective(closure, x, surrogate=lambda: x.sum(), batch="auto") as objective:
        _, gradients = objective.values_and_gradients(np.eye(5, 2))
        assert gradients.tolist() == [[1, 1]] * 5
        assert (objective.ledger.forward, objective.ledger.backward) == (10, 10)
        objective.ledger.limit(Budget(forward_equivalents=30 + 29.5))
        with pytest.raises(Stop):
            objective.values_and_gradients(np.eye(5, 2))
        assert objective.ledger.evaluations == 5


def test_gradients_need_a_graph_and_memory() -> None:
    with Objective(lambda x: x.detach().sum(), torch.zeros(2), batch="auto") as objective:
        with pytest.raises(MissingGradient):
            objective.values_and_gradients(np.ones((5, 2)))
    sizes: list[int] = []
    with new() as objective:
        watch(objective, sizes, most=5)
        objective.values_and_gradients(GENERATIONS[0])
        assert sizes == [2, 9, 4, 4, 1]


def test_an_objective_that_is_merely_dropped_gives_everything_back_at_once() -> None:
    model = linear()
    model.weight.grad = mark = torch.ones(2, 4)
    objective = Objective(on(INPUTS), model, batch="auto")
    objective.answer(ask(population(objective.vector)))
    objective.values_and_gradients(population(objective.vector))
    assert model.weight.grad is None
    gc.disable()
    try:
        del objective
        assert model.weight.grad is mark, "no cycle of references waits for the collector"
    finally:
        gc.enable()


def test_other_gradients_in_a_batch_are_found_out() -> None:
    with Objective(rooted, torch.ones(2, dtype=torch.float64), batch="auto") as objective:
        batch = objective._generations.gradient_batch
        evaluate = batch.evaluate

        def wrong(x: FloatArray, fresh: bool, **how: bool) -> Any:
            losses, gradients = evaluate(x, fresh, **how)
            assert gradients is not None
            return losses, gradients * [1, 1 + 1e-9]

        batch.evaluate = wrong  # type: ignore[method-assign]
        _, gradients = objective.values_and_gradients(np.ones((5, 2)))
        assert gradients.tolist() == [[0.5, 2]] * 5
        assert (objective.ledger.forward, objective.ledger.backward) == (7, 7)
        assert objective.notes == [
            "gradients of populations are evaluated one by one: one forward and backward for two members told other "
            "gradients than one alone"
        ]


def test_members_are_never_given_common_numbers_where_they_should_have_their_own() -> None:
    """Noise that the first evaluation did not show: a model that is trained later."""
    model = nn.Sequential(linear(), nn.Dropout(0.5)).eval()
    with Objective(on(INPUTS), model, noise="independent", batch="auto") as objective:
        x = np.tile(objective.vector.read(), (6, 1))
        objective.answer(ask(x))
        assert way(objective)[0] == "vmap"
        model.train()
        losses = objective.answer(ask(x)).losses
        assert losses is not None
        assert len(set(losses.tolist())) == 6
        assert "random" in objective.notes[0]


def test_a_reason_is_not_a_call_for_reports() -> None:
    """torch's text asks for an issue at its own place; users of ours would follow it."""
    told = batching._first_line(RuntimeError("no batching rule for x. Please file us an issue\nsecond line"))
    assert told == "RuntimeError: no batching rule for x."


def test_it_is_said_how_batches_with_gradients_were_evaluated() -> None:
    """Populations and these have a batch each, of their own size, and each a reason of its own where there is none."""
    x = np.arange(12.0).reshape(6, 2)
    with Objective(lambda x: (x**2).sum(), torch.ones(2, dtype=torch.float64)) as objective:
        assert "with gradients" not in repr(objective)
        objective.values_and_gradients(x)
        assert re.search(
            r"tensor, populations not asked yet, with gradients populations \d+ rows a forward;",
            repr(objective),
        )
    with Objective(lambda x: (x**2).sum(), torch.ones(2), batch="loop") as objective:
        objective.values_and_gradients(x)
        assert re.search(r"with gradients populations one by one \(.+\)", repr(objective))
