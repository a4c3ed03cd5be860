"""Residuals, Jacobians and Hessians as the objective answers them: right, paid for, and the same after a resume."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hybridopt import Objective, ParameterVector
from hybridopt.errors import ObjectiveError, Stop
from hybridopt.optimizer import Answer, Kind, Request

A = torch.tensor(
    [[1.0, 2.0], [0.5, -1.0], [2.0, 0.3], [-1.0, 1.0], [0.1, 0.2], [1.5, 0.7]], dtype=torch.float64
)
Z = np.array([0.3, -0.4, 0.2])


class Bent(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.1, 0.2], dtype=dtype))
        self.b = nn.Parameter(torch.tensor([0.3], dtype=dtype))

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return torch.tanh(a @ self.w) + self.b**2


def residuals(model: nn.Module) -> torch.Tensor:
    told: torch.Tensor = model(A.to(next(model.parameters()).dtype)) - 0.5
    return told.reshape(2, 3)


def flat(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(A @ x[:2]) + x[2] ** 2 - 0.5


def loss(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (flat(x) ** 2).sum()


def ask(objective: Objective, kind: Kind, x: Any = Z, **options: Any) -> Answer:
    return objective.answer(Request(kind, np.array(x), **options))


def array(answer: Answer) -> np.ndarray[Any, Any]:
    assert answer.array is not None
    return answer.array


def exact(function: Any, x: Any = Z) -> np.ndarray[Any, Any]:
    """By central differences of complex accuracy: reverse mode in float64, the other way than the code under test."""
    return np.asarray(torch.autograd.functional.jacobian(function, torch.as_tensor(x)).numpy())


@pytest.mark.parametrize("batch", ["auto", "loop"])
def test_residuals_and_their_jacobian(batch: Any) -> None:
    """6 residuals of 3 weights: by forward mode 3 forwards; one by one, 6 backwards."""
    with Objective(residuals, Bent(), residuals=True, batch=batch) as objective:
        first = ask(objective, Kind.RESIDUALS, keep_graph=True)
        np.testing.assert_allclose(array(first), flat(torch.as_tensor(Z)).numpy(), rtol=1e-14)
        assert first.loss == pytest.approx(0.5 * float(array(first) @ array(first)), rel=1e-14)
        np.testing.assert_allclose(array(ask(objective, Kind.JACOBIAN)), exact(flat), rtol=1e-12, atol=1e-14)
        spent = objective.ledger.spent()
        expected = (1, 4, 0) if batch == "auto" else (1, 1, 6)
        assert tuple(spent[name] for name in ("evaluations", "forward", "backward")) == expected


def test_the_jacobian_without_its_graph_is_made_again() -> None:
    with Objective(residuals, Bent(), residuals=True) as objective:
        ask(objective, Kind.RESIDUALS, keep_graph=True)
        objective.vector.touch()
        np.testing.assert_allclose(array(ask(objective, Kind.JACOBIAN)), exact(flat), rtol=1e-12, atol=1e-14)
        assert (objective.ledger.forward, objective.ledger.recomputed) == (4, 1)


def test_every_other_question_sees_half_the_squared_norm() -> None:
    with Objective(residuals, Bent(), residuals=True) as objective:
        value = ask(objective, Kind.VALUE, keep_graph=True)
        assert value.loss == pytest.approx(loss(torch.as_tensor(Z)).item(), rel=1e-14)
        gradient = ask(objective, Kind.GRADIENT).gradient
        assert gradient is not None
        np.testing.assert_allclose(gradient, exact(loss), rtol=1e-12)
        losses = ask(objective, Kind.POPULATION, [Z, 2 * Z, 3 * Z, -Z, Z / 2]).losses
        assert losses is not None
        expected = [loss(torch.as_tensor(k * Z)).item() for k in (1, 2, 3, -1, 0.5)]
        np.testing.assert_allclose(losses, expected, rtol=1e-12)


def test_arrays_and_what_comes_along() -> None:
    with Objective(lambda x: (x**2 - 1, "aux"), np.ones(3), residuals=True) as objective:
        assert array(ask(objective, Kind.RESIDUALS, [1.0, 2.0, 3.0])).tolist() == [0, 3, 8]
        assert objective.aux == "aux"
        assert ask(objective, Kind.JACOBIAN, [1.0, 2.0, 3.0]).array is None  # no graph: differences


def test_residuals_that_are_not_finite() -> None:
    with Objective(lambda x: torch.sqrt(x), torch.ones(2), residuals=True) as objective:
        ask(objective, Kind.VALUE, [1.0, 1.0])
        with pytest.warns(RuntimeWarning, match="rejected"):
            told = ask(objective, Kind.RESIDUALS, [-1.0, 1.0])
    assert not told.finite
    assert array(told).tolist() == [np.inf, np.inf]


def test_a_loss_of_one_number_has_no_residuals() -> None:
    with (
        Objective(lambda x: (x**2).sum(), torch.ones(2)) as objective,
        pytest.raises(ObjectiveError, match="a vector of them needs residuals=True"),
    ):
        ask(objective, Kind.RESIDUALS, [1.0, 1.0])


def test_a_jacobian_that_does_not_fit_the_budget_is_not_begun() -> None:
    with Objective(residuals, Bent(), "3fe", residuals=True) as objective:
        ask(objective, Kind.RESIDUALS, keep_graph=True)
        for _ in range(2):
            with pytest.raises(Stop):
                ask(objective, Kind.JACOBIAN)
        assert objective.ledger.forward_equivalents == 1
        objective.ledger.limit(type(objective.ledger.budget).parse("4fe"))
        assert array(ask(objective, Kind.JACOBIAN)).shape == (6, 3)
        assert objective.ledger.forward_equivalents == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hessian_and_its_products(dtype: torch.dtype) -> None:
    digits = 1e-10 if dtype is torch.float64 else 2e-5
    expected = torch.autograd.functional.hessian(loss, torch.as_tensor(Z)).numpy()
    direction = np.array([1.0, -2.0, 0.5])
    with Objective(residuals, Bent(dtype), residuals=True) as objective:
        np.testing.assert_allclose(array(ask(objective, Kind.HESSIAN)), expected, rtol=digits, atol=digits)
        product = ask(objective, Kind.HESSIAN_VECTOR, direction=direction)
        np.testing.assert_allclose(array(product), expected @ direction, rtol=digits, atol=digits)
        spent = objective.ledger.spent()
        # the Hessian as 3 products, each a forward and two backwards
        assert tuple(spent[name] for name in ("evaluations", "forward", "backward")) == (0, 4, 8)


@pytest.mark.parametrize("options", [{"scale": np.array([2.0, 0.5, 3.0])}, {"log": [True, False, True]}])
def test_in_solver_coordinates(options: dict[str, Any]) -> None:
    """The chain rule, by differentiating through `decode` itself."""
    x = torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64)
    vector = ParameterVector(x, **options)

    def decoded(z: torch.Tensor) -> torch.Tensor:
        scale = torch.ones(3).double() if vector.scale is None else torch.as_tensor(vector.scale)
        log = torch.tensor([False] * 3 if vector.log is None else vector.log.tolist())
        return torch.where(log, torch.exp(z * scale), z * scale)

    z = vector.encode(x.numpy().copy())
    direction = np.array([1.0, -2.0, 0.5])
    with Objective(flat, vector, residuals=True) as objective:
        ask(objective, Kind.RESIDUALS, z, keep_graph=True)
        np.testing.assert_allclose(
            array(ask(objective, Kind.JACOBIAN, z)),
            exact(lambda z: flat(decoded(z)), z),
            rtol=1e-10,
            atol=1e-14,
        )
        expected = torch.autograd.functional.hessian(lambda z: loss(decoded(z)), torch.as_tensor(z)).numpy()
        np.testing.assert_allclose(array(ask(objective, Kind.HESSIAN, z)), expected, rtol=1e-9, atol=1e-12)
        product = array(ask(objective, Kind.HESSIAN_VECTOR, z, direction=direction))
        np.testing.assert_allclose(product, expected @ direction, rtol=1e-9, atol=1e-12)


def test_products_at_one_point_share_their_graph_until_the_weights_move() -> None:
    calls = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return loss(x)

    with Objective(counted, torch.zeros(3, dtype=torch.float64)) as objective:
        first = array(ask(objective, Kind.HESSIAN_VECTOR, direction=np.ones(3)))
        second = array(ask(objective, Kind.HESSIAN_VECTOR, direction=np.ones(3)))
        assert len(calls) == 1
        objective.vector.write(np.zeros(3))
        third = array(ask(objective, Kind.HESSIAN_VECTOR, direction=np.ones(3)))
        assert len(calls) == 2
    assert first.tolist() == second.tolist() == third.tolist()


def test_a_loss_without_curvature() -> None:
    with Objective(lambda x: x.sum(), torch.ones(3)) as objective:
        assert array(ask(objective, Kind.HESSIAN)).tolist() == np.zeros((3, 3)).tolist()
        assert array(ask(objective, Kind.HESSIAN_VECTOR, direction=Z)).tolist() == [0, 0, 0]
