"""SciPy's least squares: SciPy's own path and fit, robust losses, bounds, refused Jacobians."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.optimize
import torch

import hybridopt
from hybridopt import Reason
from hybridopt.errors import MemoryLimit, MethodError, NonFiniteLoss, ObjectiveError, StateError
from hybridopt.testing import OptimizerContract
from hybridopt_scipy import LeastSquares
from tests.driving import BOX

T = torch.linspace(0, 3, 25, dtype=torch.float64)
NOISE = torch.sin(17 * T) * 0.05
Y = 2 * torch.exp(-1.3 * T) + 0.5 + NOISE
START = [1.0, 1.0, 0.0]


def curve(x: torch.Tensor) -> torch.Tensor:
    return x[0] * torch.exp(-x[1] * T.to(x.dtype)) + x[2] - Y.to(x.dtype)


def scipys(**options: Any) -> Any:
    def fun(x: Any) -> Any:
        return curve(torch.as_tensor(x)).numpy()

    def jac(x: Any) -> Any:
        return torch.func.jacrev(curve)(torch.as_tensor(x)).numpy()

    return scipy.optimize.least_squares(fun, np.array(START), **{"jac": jac, "x_scale": "jac"} | options)


class TestLM(OptimizerContract):
    method = LeastSquares()
    random = False
    evaluations: ClassVar[int] = 15


@pytest.mark.slow
class TestTRF(OptimizerContract):
    method = LeastSquares()
    bounds = BOX
    random = False
    evaluations: ClassVar[int] = 30


class TestDogbox(OptimizerContract):
    method = LeastSquares(method="dogbox")
    bounds = BOX
    random = False
    evaluations: ClassVar[int] = 15


@pytest.mark.slow
class TestDifferences(OptimizerContract):
    method = LeastSquares(gradients="differences")
    random = False
    evaluations: ClassVar[int] = 30


@pytest.mark.slow
class TestNone(OptimizerContract):
    method = LeastSquares(gradients="none")
    random = False
    evaluations: ClassVar[int] = 30


@pytest.mark.parametrize("solver", ["lm", "trf", "dogbox"])
@pytest.mark.parametrize("gradients", ["auto", "autograd", "differences", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fits_as_scipy_does(solver: Any, gradients: Any, dtype: torch.dtype) -> None:
    x = torch.tensor(START, dtype=dtype)
    method = LeastSquares(method=solver, gradients=gradients, x_scale="jac")
    result = hybridopt.minimize(curve, x, method, budget=300, residuals=True)
    expected = scipys(method=solver)
    digits = 1e-7 if dtype is torch.float64 else 1e-3
    np.testing.assert_allclose(result.x, expected.x, rtol=digits, atol=digits)
    assert result.best_loss == pytest.approx(expected.cost, rel=1e-9 if dtype is torch.float64 else 1e-4)
    assert result.success


@pytest.mark.parametrize("solver", ["lm", "trf", "dogbox"])
def test_walks_scipys_path_without_our_derivatives(solver: Any) -> None:
    ours: list[bytes] = []
    theirs: list[bytes] = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        ours.append(x.detach().numpy().tobytes())
        return curve(x.detach())

    def fun(x: Any) -> Any:
        theirs.append(x.tobytes())
        return curve(torch.as_tensor(x)).numpy()

    method = LeastSquares(method=solver, gradients="none")
    x = torch.tensor(START, dtype=torch.float64)
    result = hybridopt.minimize(loss, x, method, budget=500, residuals=True)
    expected = scipy.optimize.least_squares(fun, np.array(START), method=solver)
    again = [x for i, x in enumerate(theirs) if i == 0 or x != theirs[i - 1]]
    assert ours == again
    assert result.loss == expected.cost
    assert result.message == expected.message


def test_a_jacobian_costs_the_cheaper_of_forward_and_reverse() -> None:
    """25 residuals of 3 weights: 3 forwards. 2 residuals of 5 weights: 2 backwards."""
    few = hybridopt.minimize(
        curve,
        torch.tensor(START, dtype=torch.float64),
        LeastSquares(gradients="autograd"),
        budget=100,
        residuals=True,
    )
    assert few.backward == 0
    assert few.forward > few.evaluations
    assert (few.forward - few.evaluations) % 3 == 0
    many = hybridopt.minimize(
        lambda x: torch.stack([x.sum() - 1, x[0] * x[1]]),
        torch.ones(5, dtype=torch.float64),
        LeastSquares(gradients="autograd"),
        budget=100,
        residuals=True,
    )
    assert many.forward == many.evaluations
    assert many.backward > 0
    assert many.backward % 2 == 0


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 9, 20])
def test_the_budget_is_never_passed(limit: int) -> None:
    result = hybridopt.minimize(
        curve,
        torch.tensor(START, dtype=torch.float64),
        LeastSquares(),
        budget=f"{limit}fe",
        residuals=True,
    )
    assert limit - 3 < result.forward_equivalents <= limit


@pytest.mark.parametrize("name", ["soft_l1", "huber", "cauchy", "arctan"])
def test_robust_losses_have_scipys_minimum(name: Any) -> None:
    spoiled = Y.clone()
    spoiled[[3, 11, 19]] += torch.tensor([1.5, -2.0, 1.0], dtype=torch.float64)

    def fit(x: torch.Tensor) -> torch.Tensor:
        return x[0] * torch.exp(-x[1] * T) + x[2] - spoiled

    expected = scipy.optimize.least_squares(
        lambda x: fit(torch.as_tensor(x)).numpy(),
        [1.5, 1.0, 0.3],
        loss=name,
        f_scale=0.2,
        xtol=1e-12,
        ftol=1e-12,
    )
    # SciPy's cost is in units of f_scale²: half the sum of f_scale² rho((r / f_scale)²)
    for method in ("least_squares", "lbfgsb(ftol=1e-14, gtol=1e-9)"):
        x = torch.tensor([1.5, 1.0, 0.3], dtype=torch.float64)
        result = hybridopt.minimize(fit, x, method, budget=500, residuals=(name, 0.2))
        assert result.best_loss == pytest.approx(expected.cost, rel=1e-6)
        np.testing.assert_allclose(result.x, expected.x, rtol=1e-3, atol=1e-4)


def test_bounds_are_kept() -> None:
    x = torch.tensor(START, dtype=torch.float64)
    result = hybridopt.minimize(
        curve, x, "least_squares", budget=200, residuals=True, bounds={"x": (-0.5, 1.2)}
    )
    expected = scipys(method="trf", bounds=(-0.5, 1.2))
    assert result.best_loss == pytest.approx(expected.cost, rel=1e-6)
    assert (result.x <= 1.2).all()


def test_a_wrong_jacobian_is_refused() -> None:
    """A detached term is missing from autograd's Jacobian; differences find the fit."""

    def fit(x: torch.Tensor) -> torch.Tensor:
        return x[0] * torch.exp(-x[1].detach() * T) + x[2] - Y + 0 * x[1]

    x = torch.tensor(START, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="autograd refused"):
        result = hybridopt.minimize(fit, x, LeastSquares(), budget=500, residuals=True)
    assert result.best_loss == pytest.approx(scipys(method="lm").cost, rel=1e-6)


def test_residuals_without_a_forward_derivative_fall_back() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return 2 * x

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            return 2 * g

    x = torch.tensor(START, dtype=torch.float64)
    result = hybridopt.minimize(
        lambda x: curve(Twice.apply(x) / 2), x, LeastSquares(), budget=100, residuals=True
    )
    assert any("a backward a residual" in note for note in result.notes)
    assert result.backward > 0
    assert result.best_loss == pytest.approx(scipys(method="lm").cost, rel=1e-9)


@pytest.mark.parametrize("start", range(8))
def test_lsmr_of_a_single_weight(start: int) -> None:
    a = torch.randn(6, 1, generator=torch.Generator().manual_seed(start), dtype=torch.float64)
    y = 0.7 * a[:, 0] + 0.1
    x = torch.randn(1, generator=torch.Generator().manual_seed(start + 99), dtype=torch.float64)
    result = {
        solver: hybridopt.minimize(
            lambda x: torch.exp(a @ x - y) - 1,
            x.clone(),
            LeastSquares(method="trf", tr_solver=solver),
            budget=200,
            residuals="cauchy",
        ).best_loss
        for solver in ("exact", "lsmr")
    }
    assert result["lsmr"] == result["exact"]


@pytest.mark.parametrize("solver", ["trf", "dogbox"])
def test_scipys_differences_beside_residuals_that_are_nan(solver: Any) -> None:
    x = torch.ones(2, dtype=torch.float64)  # at the edge of what the root takes
    with pytest.warns(RuntimeWarning, match="rejected"):
        result = hybridopt.minimize(
            lambda x: torch.sqrt(1 - x) + x - 2.5,
            x,
            LeastSquares(method=solver, gradients="none"),
            budget=100,
            residuals=True,
            bounds=(-1, 1.5),
        )
    assert result.reason is Reason.STALLED
    assert "residuals that are not finite near the point" in result.message
    assert result.best_loss <= 2.25


def test_refusals() -> None:
    x = torch.tensor(START, dtype=torch.float64)
    with pytest.raises(ObjectiveError, match=r"expected a loss that returns residuals.*residuals=True"):
        hybridopt.minimize(lambda x: (x**2).sum(), x, "least_squares", budget=10)
    with pytest.raises(StateError, match='method="lm" cannot keep within bounds'):
        hybridopt.minimize(curve, x, LeastSquares(method="lm"), budget=9, residuals=True, bounds=(-9, 9))
    with pytest.raises(MethodError, match="at least as many residuals as weights, got 1 and 3"):
        hybridopt.minimize(lambda x: x.sum()[None], x, LeastSquares(method="lm"), budget=10, residuals=True)
    with (
        pytest.warns(RuntimeWarning, match="rejected"),
        pytest.raises(NonFiniteLoss, match="expected finite"),
    ):
        hybridopt.minimize(
            lambda x: x * math.nan, x, LeastSquares(gradients="none"), budget=9, residuals=True
        )
    with pytest.raises(ObjectiveError, match=r"residuals: expected True, one of arctan.*got 'l1'"):
        hybridopt.minimize(curve, x, "least_squares", budget=10, residuals="l1")
    sizes = iter(range(2, 100))
    with pytest.raises(ObjectiveError, match="expected 2 of them at every call, got "):
        hybridopt.minimize(
            lambda x: x.sum() * torch.ones(next(sizes)),
            x,
            LeastSquares(method="trf"),
            budget=9,
            residuals=True,
        )


@pytest.mark.parametrize("solver", ["lm", "trf"])
def test_interleaved_runs_walk_their_own_paths(solver: Any) -> None:
    """MINPACK keeps its callback in a C variable: on one thread two of them would crash."""

    def begin(k: int) -> tuple[hybridopt.Run, list[list[float]]]:
        points: list[list[float]] = []

        def fit(x: torch.Tensor) -> torch.Tensor:
            points.append(x.tolist())
            return curve(x)

        x = torch.tensor([1.0 + 0.1 * k, 1.0, 0.0], dtype=torch.float64)
        method = LeastSquares(method=solver)
        return hybridopt.Run(fit, x, method, budget=40, residuals=True, batch="loop"), points

    alone = []
    for k in range(4):
        run, points = begin(k)
        with run:
            for _ in run:
                pass
        alone.append(points)
    together = [begin(k) for k in range(4)]
    for _ in range(41):
        for run, _points in together:
            run.step()
    for run, _ in together:
        run.finish()
    assert [points for _, points in together] == alone


def test_an_abandoned_run_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.tensor(START, dtype=torch.float64)
    run = hybridopt.Run(curve, x, LeastSquares(method="lm"), budget=40, residuals=True)
    for _ in range(2):
        run.step()
    run.finish()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", ["lm", "trf"])
def test_a_jacobian_that_does_not_fit_is_refused_before_it_is_made(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many residuals there are shows the first evaluation."""
    monkeypatch.setattr("hybridopt.machine.available_memory", lambda: 2**20)
    calls = []

    def fit(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return (x[:, None] * torch.ones(500, dtype=x.dtype)).reshape(-1) - 1

    x = torch.zeros(30, dtype=torch.float64)
    with pytest.raises(
        MemoryLimit,
        match=r"least_squares: .* for 30 weights, .*Jacobian has 15000 rows: return fewer residuals",
    ):
        hybridopt.minimize(
            fit, x, LeastSquares(method=method, gradients="autograd"), budget=9, residuals=True
        )
    assert len(calls) == 1
    assert x.tolist() == [0.0] * 30
