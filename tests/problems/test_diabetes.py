"""Fair classification and the Gaussian process, against NumPy, SciPy and scikit-learn."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy.optimize import NonlinearConstraint, minimize
from sklearn.datasets import load_diabetes
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from hybridopt import problems
from hybridopt.problems import _diabetes


def with_gradient(function: object, x: np.ndarray) -> tuple[float, np.ndarray]:
    point = torch.tensor(x, requires_grad=True)
    value = function(point)
    return value.item(), torch.autograd.grad(value, point)[0].numpy()


def standardised() -> tuple[np.ndarray, np.ndarray]:
    data = load_diabetes()
    return (data.data - data.data.mean(0)) / data.data.std(0, ddof=1), data.target


def test_fairness_against_numpy() -> None:
    inputs, progress = standardised()
    problem = problems.get("fairness", seed=3)
    x = problem.target.numpy()
    output = inputs @ x[:10] + x[10]
    sign = np.where(progress > np.sort(progress)[220], 1, -1)  # torch's median: the lower of the middle two
    expected = np.log1p(np.exp(-sign * output)).mean() + (x[:10] ** 2).sum() / 200
    assert problem.loss(problem.target).item() == pytest.approx(expected, rel=1e-12)
    covariance = (inputs[:, 0] * (output - output.mean())).mean()
    assert problem.constraints.function(problem.target).item() == pytest.approx(covariance, abs=1e-12)
    assert (problem.constraints.lower, problem.constraints.upper) == (-0.05, 0.05)


@pytest.mark.parametrize("seed", [0, 1])
def test_fairness_best_known_is_the_constrained_optimum(seed: int) -> None:
    problem = problems.get("fairness", seed)
    bound = problem.constraints

    def solve(constraints: tuple[object, ...]) -> tuple[float, float]:
        found = minimize(
            lambda x: with_gradient(problem.loss, x),
            problem.target.numpy(),
            jac=True,
            method="SLSQP",
            constraints=constraints,
            options={"ftol": 1e-15, "maxiter": 200},
        )
        return found.fun, bound.function(torch.tensor(found.x)).item()

    fair = NonlinearConstraint(
        lambda x: bound.function(torch.tensor(x)).item(),
        bound.lower,
        bound.upper,
        jac=lambda x: with_gradient(bound.function, x)[1],
    )
    loss, covariance = solve((fair,))
    assert loss == pytest.approx(problem.best_known, abs=1e-10)
    assert covariance == pytest.approx(bound.upper, abs=1e-9)
    loss, covariance = solve(())
    assert loss < problem.best_known - 0.01
    assert covariance > bound.upper + 0.1


def test_likelihood_against_scikit_learn() -> None:
    inputs, progress = standardised()
    problem = problems.get("gaussian_process", seed=1)
    x = problem.target.numpy()
    kernel = ConstantKernel(np.exp(2 * x[10])) * RBF(np.exp(x[:10])) + WhiteKernel(np.exp(2 * x[11]))
    model = GaussianProcessRegressor(kernel, optimizer=None, alpha=0)
    output = progress[:200]
    output = (output - output.mean()) / output.std(ddof=1)
    likelihood = model.fit(inputs[:200], output).log_marginal_likelihood_value_
    assert problem.loss(problem.target).item() == pytest.approx(-likelihood / 200, rel=1e-10)


@pytest.mark.parametrize(("seed", "which"), [(0, 1), (1, 0)])
def test_both_minima_of_the_likelihood_are_reached(seed: int, which: int) -> None:
    problem = problems.get("gaussian_process", seed)
    found = minimize(
        lambda x: with_gradient(problem.loss, x),
        problem.target.numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=[problem.bounds] * 12,
        options={"ftol": 1e-14, "gtol": 1e-8},
    )
    assert found.fun == pytest.approx(problem.minima[which], abs=1e-9)
    assert problem.best_known == min(problem.minima)


def test_a_covariance_that_cannot_be_factorised_has_no_likelihood() -> None:
    problem = problems.get("gaussian_process")
    x = torch.full((12,), 5.0, dtype=torch.float64)
    x[11] = -40
    assert not torch.isfinite(problem.loss(x))


@pytest.mark.parametrize("name", ["fairness", "gaussian_process"])
def test_batches_and_seeds(name: str) -> None:
    first, again, other = (problems.get(name, seed) for seed in (0, 0, 1))
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.target, other.target)
    x = torch.stack([first.target, other.target])
    told = torch.stack([first.loss(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(first.loss)(x), told, rtol=1e-10, atol=1e-10)


def test_without_scikit_learn_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    _diabetes._diabetes.cache_clear()
    with pytest.raises(problems.ProblemError, match=r"pip install 'torch-hybridopt\[problems\]'"):
        problems.get("fairness")
