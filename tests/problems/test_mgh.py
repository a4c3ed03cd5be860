"""The 35 problems of Moré, Garbow and Hillstrom, against published values and SciPy's Levenberg-Marquardt."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import least_squares

import hybridopt
from hybridopt import problems

# Sums of squares at the start and at the minima as published, six digits (ACM TOMS 7, 1981; starts: the value is
# listed by Moré and Wild, SIAM J. Optim. 20, 2009, for the problems that both have in the same size).
STARTS = {
    1: 24.2,
    2: 400.5,
    3: 1.13526,
    4: 999998000003.0,
    5: 14.203125,
    6: 4171.306,
    7: 2500.0,
    8: 41.68170,
    9: 3.88811e-6,
    10: 1.693608e9,
    11: 12.11070,
    12: 1031.154,
    13: 215.0,
    14: 19192.0,
    15: 5.313172e-3,
    16: 7926693.0,
    17: 0.8790260,
    18: 0.779070,
    19: 2.093420,
    20: 30.0,
}
MINIMA = {
    2: (0, 48.9842),
    6: (124.362,),
    8: (8.21487e-3, 17.4286),
    9: (1.12793e-8,),
    10: (87.9458,),
    15: (3.07505e-4, 1.02734e-3),
    16: (85822.2,),
    17: (5.46489e-5,),
    18: (0, 5.65565e-3, 0.306367),
    19: (4.01377e-2,),
    20: (2.28767e-3,),
    23: (7.08765e-5,),
    24: (2.93660e-4,),
    26: (0, 2.79506e-5),
    27: (0, 1),
    32: (10,),
    33: (4.63415,),
    34: (6.13514,),
    35: (3.51687e-3,),
}
EVERY = pytest.mark.parametrize("number", range(1, 36))


@EVERY
def test_published_values(number: int) -> None:
    problem = problems.get(f"mgh(number={number})")
    residuals = problem.residuals(problem.target)
    assert problem.loss(problem.target).item() == pytest.approx((residuals**2).sum().item() / 2, rel=1e-14)
    if number in STARTS:
        assert 2 * problem.loss(problem.target).item() == pytest.approx(STARTS[number], rel=2e-6)
    assert [2 * f for f in problem.minima] == pytest.approx(MINIMA.get(number, (0,)), rel=1e-5)
    assert problem.best_known == min(problem.minima)


@EVERY
def test_levenberg_marquardt_ends_at_a_listed_minimum(number: int) -> None:
    problem = problems.get(f"mgh(number={number})")
    slopes = torch.func.jacrev(problem.residuals)
    result = least_squares(
        lambda x: problem.residuals(torch.tensor(x)).numpy(),
        problem.target.numpy(),
        jac=lambda x: slopes(torch.tensor(x)).numpy(),
        method="lm",
        **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15),
    )
    start = problem.loss(problem.target).item()
    assert min(abs(result.cost - f) - 1e-8 * (start - f) for f in problem.minima) <= 0
    assert result.cost >= problem.best_known * (1 - 1e-10)


@EVERY
def test_a_batch_and_vmap_tell_what_single_points_tell(number: int) -> None:
    problem = problems.get(f"mgh(number={number})")
    noise = torch.rand(
        3, len(problem.target), dtype=torch.float64, generator=torch.Generator().manual_seed(number)
    )
    x = problem.target * (1 + 0.1 * noise)
    residuals = torch.stack([problem.residuals(row) for row in x])
    torch.testing.assert_close(problem.residuals(x), residuals, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.vmap(problem.residuals)(x), residuals, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(problem.loss(x), (residuals**2).sum(1) / 2, rtol=1e-10, atol=1e-12)


@EVERY
def test_gradient_agrees_with_differences(number: int) -> None:
    problem = problems.get(f"mgh(number={number})")
    x = (problem.target + 0.01 * (1 + problem.target.abs())).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.loss(x), x)
    steps = 1e-6 * torch.diag(torch.clamp(x.detach().abs(), min=1e-2))
    differences = (problem.loss(x + steps) - problem.loss(x - steps)).detach() / (2 * steps.diag())
    torch.testing.assert_close(gradient, differences, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def by_loops(number: int, x: list[float]) -> list[float]:
    """The coupled problems written out as printed, indices from 1."""
    n = len(x)
    h = 1 / (n + 1)
    at = {0: 0.0, **dict(enumerate(x, 1)), n + 1: 0.0}
    t = {i: i * h for i in range(n + 2)}
    rows = range(1, n + 1)
    if number == 25:
        total = sum(i * (at[i] - 1) for i in rows)
        return [at[i] - 1 for i in rows] + [total, total**2]
    if number == 27:
        return [at[i] + sum(x) - (n + 1) for i in rows[:-1]] + [math.prod(x) - 1]
    if number == 28:
        return [2 * at[i] - at[i - 1] - at[i + 1] + h**2 * (at[i] + t[i] + 1) ** 3 / 2 for i in rows]
    if number == 29:
        left = {i: sum(t[j] * (at[j] + t[j] + 1) ** 3 for j in range(1, i + 1)) for i in rows}
        right = {i: sum((1 - t[j]) * (at[j] + t[j] + 1) ** 3 for j in range(i + 1, n + 1)) for i in rows}
        return [at[i] + h * ((1 - t[i]) * left[i] + t[i] * right[i]) / 2 for i in rows]
    if number == 30:
        return [(3 - 2 * at[i]) * at[i] - at[i - 1] - 2 * at[i + 1] + 1 for i in rows]
    near = {i: [j for j in range(max(1, i - 5), min(n, i + 1) + 1) if j != i] for i in rows}  # 31
    return [at[i] * (2 + 5 * at[i] ** 2) + 1 - sum(at[j] * (1 + at[j]) for j in near[i]) for i in rows]


@pytest.mark.parametrize("number", [25, 27, 28, 29, 30, 31])
def test_coupled_problems_against_loops(number: int) -> None:
    """Their minimum is 0 for other couplings too, so that reaching it would prove nothing."""
    x = torch.linspace(-1, 2, 10, dtype=torch.float64)
    told = problems.get(f"mgh(number={number})").residuals(x)
    assert told.tolist() == pytest.approx(by_loops(number, x.tolist()), rel=1e-12)


def test_a_method_solves_one_by_name() -> None:
    problem = problems.get("mgh(number=5)")
    result = hybridopt.minimize(problem.loss, problem.target, "scipy.bfgs", budget="500fe", seed=0)
    assert result.best_loss < 1e-12


@pytest.mark.parametrize("number", [0, 36, 1.5, "'rosenbrock'"])
def test_wrong_numbers(number: object) -> None:
    with pytest.raises(problems.ProblemError, match="expected number to be a whole number from 1 to 35"):
        problems.get(f"mgh(number={number})")
