"""The best point: kept, held by the model at the end, and saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hybridopt.errors import (
    BoundsError,
)
from hybridopt.ledger import Ledger
from hybridopt.objective import Objective
from hybridopt.optimizer import Kind, Request
from hybridopt.vector import ParameterVector
from tests.objective.drive import at, saved

# -- the best point -------------------------------------------------------------------------------------------------


class Statistics(nn.Module):
    """A model whose loss depends on batch statistics that committed evaluations move."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=dtype))
        self.register_buffer("mean", torch.zeros((), dtype=dtype))

    def forward(self) -> Tensor:
        assert isinstance(self.mean, Tensor)
        loss = ((self.weight - 1) ** 2).sum() + self.mean.abs()
        self.mean += 1
        return loss


@pytest.mark.parametrize("best", ["at a point", "in place"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_best_point_comes_back_with_the_buffers_it_was_seen_with(best: str, dtype: torch.dtype) -> None:
    def mean(model: Statistics) -> float:
        assert isinstance(model.mean, Tensor)
        return model.mean.item()

    model, again = Statistics(dtype), Statistics(dtype)
    with Objective(lambda m: m(), model) as objective:
        if best == "at a point":
            first = objective.answer(at(Kind.VALUE, [1, 1]))
        else:
            first = objective.answer(at(Kind.VALUE_AND_GRADIENT, commit=True))
        assert first.loss == 0
        committed = float(best == "in place")
        assert mean(model) == committed
        for where in (
            [1.125, 1.0],
            [3.0, 1.0],
            [1.0, 1.0],
        ):  # ends at the best weights, with other statistics
            objective.vector.write(where)
            assert objective.answer(at(Kind.VALUE_AND_GRADIENT, commit=True)).loss > 0
        state = saved(objective)
        objective.restore_best()
        assert objective.vector.read().tolist() == [1, 1]
        assert mean(model) == committed
    with Objective(lambda m: m(), again) as resumed:
        resumed.load_state_dict(state)
        assert mean(again) == committed + 3
        resumed.restore_best()
        assert again.weight.tolist() == [1, 1]
        assert mean(again) == committed
        assert resumed.ledger.best_loss == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(-9, 9)), min_size=1, max_size=8))
def test_the_best_point_is_a_copy_in_flat_and_in_place_form(visits: list[tuple[bool, int]]) -> None:
    weight = torch.full((2,), 20.0, dtype=torch.float32)
    scope = Ledger()
    with Objective(lambda x: (x**2).sum(), weight) as objective:
        for in_place, where in visits:
            x = np.full(2, float(where))
            if in_place:
                with torch.no_grad():
                    weight.copy_(torch.from_numpy(x))
                objective.answer(at(Kind.VALUE_AND_GRADIENT, commit=True).within(scope))
            else:
                objective.answer(at(Kind.VALUE, x).within(scope))
                x[:] = 99  # solvers reuse their arrays
        best = min((abs(w) for _, w in visits))
        for ledger in (objective.ledger, scope):
            assert ledger.best_loss == 2 * best**2
            flat = ledger.best_point.flat(objective.vector)
            assert np.abs(flat).tolist() == [best, best]
            flat[:] = 99
        assert objective.ledger.best_point is not scope.best_point
        objective.restore_best()
        assert weight.abs().tolist() == [best, best]


def test_points_outside_the_bounds_are_refused_before_anything_is_evaluated() -> None:
    calls = []
    vector = ParameterVector(torch.zeros(2), bounds=(-1, 1), scale=2.0)
    with Objective(lambda x: calls.append(1) or x.sum(), vector) as objective:
        objective.answer(at(Kind.VALUE, [0.5, -0.5]))
        assert vector.read().tolist() == [1, -1]
        unscaled = ParameterVector(torch.zeros(2), bounds=(-1, 1))
    with Objective(lambda x: calls.append(1) or x.sum(), unscaled) as objective:
        for kind, x in (
            (Kind.VALUE, [0, 1.5]),
            (Kind.VALUE_AND_GRADIENT, [-9, 0]),
            (Kind.POPULATION, [[0, 0], [0, 2]]),
        ):
            with pytest.raises(
                BoundsError, match=r"a point outside the bounds: weight [01] at .*fault of the method"
            ):
                objective.answer(at(kind, x))
        assert (len(calls), objective.ledger.evaluations) == (2, 1), "the row before it was evaluated"
        assert unscaled.read().tolist() == [0, 0]


def test_gradients_are_told_in_solver_coordinates() -> None:
    vector = ParameterVector(torch.ones(2, dtype=torch.float64), scale=[2.0, 10.0])
    with Objective(lambda x: (x**2).sum(), vector) as objective:
        z = np.array([3.0, 0.5])
        answer = objective.answer(at(Kind.VALUE_AND_GRADIENT, z))
        assert answer.loss == 36 + 25
        assert answer.gradient is not None
        assert answer.gradient.tolist() == [2 * 6 * 2, 2 * 5 * 10]  # d/dz of (scale z)²
        assert objective.ledger.best_point.x.tolist() == [6, 5], "kept in weights"


def test_a_gradient_may_be_large() -> None:
    weight = torch.ones(2, dtype=torch.float64)
    with Objective(lambda x: (x * 1e300).sum(), weight) as objective:
        assert objective.answer(at(Kind.VALUE_AND_GRADIENT, [1, 1])).finite
        assert objective.answer(at(Kind.VALUE_AND_GRADIENT)).finite


def test_unused_weights_have_gradient_zero_or_none_in_place() -> None:
    used, unused = torch.ones(1), torch.ones(2)
    with Objective(lambda d: d["used"].sum(), {"used": used, "unused": unused}) as objective:
        both = objective.answer(at(Kind.VALUE_AND_GRADIENT, [1, 1, 1]))
        assert both.gradient is not None
        assert both.gradient.tolist() == [1, 0, 0]
        objective.answer(at(Kind.VALUE_AND_GRADIENT))
        assert unused.grad is None
        assert used.grad is not None


@pytest.mark.parametrize("request_", [at(Kind.VALUE_AND_GRADIENT, [1, 1]), at(Kind.VALUE_AND_GRADIENT)])
def test_sparse_gradients_are_kept_in_place_and_told_dense(request_: Request) -> None:
    table = nn.Embedding(3, 1, sparse=True)
    with Objective(lambda m: m(torch.tensor([2, 2])).sum(), table) as objective:
        request_ = request_ if request_.x is None else request_._replace(x=np.ones(3))
        answer = objective.answer(request_)
        if request_.x is None:
            assert table.weight.grad is not None
            assert table.weight.grad.is_sparse
            assert table.weight.grad.to_dense().flatten().tolist() == [0, 0, 2]
        else:
            assert answer.gradient is not None
            assert answer.gradient.tolist() == [0, 0, 2]
