"""Constraints on the model: what they cost, which point is the best, who may be asked, and known minima."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

import hybridopt
from hybridopt import Constraint, Objective, Reason
from hybridopt.errors import MethodError, ObjectiveError
from hybridopt.optimizer import Kind, Request

INF = math.inf
CENTRE = torch.tensor([3.0, 1.0], dtype=torch.float64)


def far(x: torch.Tensor) -> torch.Tensor:
    """Its minimum lies outside of everything below."""
    return ((x - CENTRE.to(x.dtype)) ** 2).sum()


def disc(x: torch.Tensor) -> torch.Tensor:
    return 2 - (x**2).sum()


# name -> constraints, and the minimum of `far` under them
KNOWN: dict[str, tuple[Any, list[float]]] = {
    # the nearest point of the circle of radius √2: √2 (3, 1) / √10
    "callable": (disc, [3 / math.sqrt(5), 1 / math.sqrt(5)]),
    "upper": (Constraint(lambda x: (x**2).sum(), -INF, 2.0), [3 / math.sqrt(5), 1 / math.sqrt(5)]),
    # (x - c) ∥ (1, 1), x + y = 1: (3 - 1.5, 1 - 1.5)
    "linear": (Constraint.linear([1, 1], -INF, 1), [1.5, -0.5]),
    "linear equality": (Constraint.linear([[1.0, 1.0]], 1, 1), [1.5, -0.5]),
    # x = y² and x + y <= 1: y² + y = 1 at the upper end, y = (√5 - 1)/2
    "two": (
        {
            "parabola": Constraint(lambda x: x[0] - x[1] ** 2, 0, 0),
            "line": Constraint.linear([1, 1], -INF, 1),
            "upper branch": lambda x: x[1],
        },
        [((math.sqrt(5) - 1) / 2) ** 2, (math.sqrt(5) - 1) / 2],
    ),
    "several numbers": (Constraint(lambda x: x, [-1, -2], [0.5, 0.25]), [0.5, 0.25]),
}
METHODS = {
    "slsqp(ftol=1e-9)": None,
    "slsqp(gradients=differences, ftol=1e-9)": None,
    "slsqp(gradients=none, ftol=1e-9)": None,
    "trust_constr(barrier_tol=1e-10)": None,
    "trust_constr(hess=autograd, barrier_tol=1e-10)": None,
    "scipy.cobyla(tol=1e-6)": None,
    "scipy.cobyqa": None,
    "scipy.differential_evolution(popsize=8)": (-4, 4),
    "scipy.differential_evolution(popsize=8, updating=deferred)": (-4, 4),
    "scipy.shgo(sampling_method=sobol, n=32)": (-4, 4),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(
    "text", [pytest.param(text, marks=pytest.mark.slow) if "evolution" in text else text for text in METHODS]
)
def test_known_minima(text: str, name: str) -> None:
    constraints, minimum = KNOWN[name]
    x = torch.zeros(2, dtype=torch.float64)
    result = hybridopt.minimize(
        far, x, text, budget=3000, bounds=METHODS[text], constraints=constraints, seed=1
    )
    assert result.violation == 0
    np.testing.assert_allclose(result.x, minimum, atol=2e-3)
    assert result.best_loss == far(x).item()
    assert result.best_loss == pytest.approx(far(torch.tensor(minimum, dtype=torch.float64)).item(), abs=2e-3)


@pytest.mark.parametrize("text", ["slsqp", "trust_constr", "scipy.cobyqa"])
def test_float32_weights(text: str) -> None:
    x = torch.zeros(2)
    result = hybridopt.minimize(far, x, text, budget=300, constraints=disc, seed=1)
    assert result.violation == 0
    assert result.best_loss == pytest.approx((math.sqrt(10) - math.sqrt(2)) ** 2, abs=1e-3)


def test_fair_logistic_regression_reaches_scipys_own_answer() -> None:
    """A bound on the covariance of the decision with a sensitive attribute (Zafar et al. 2017)."""
    torch.manual_seed(3)
    n = 300
    group = (torch.rand(n) < 0.5).double()
    features = (
        torch.randn(n, 4, dtype=torch.float64) + group[:, None] * torch.tensor([0.9, 0.2, 0.0, -0.4]).double()
    )
    label = (features @ torch.tensor([1.0, -0.5, 0.8, 0.3]).double() + torch.randn(n).double() > 0.4).double()
    centred = group - group.mean()
    model = nn.Linear(4, 1).double()

    def loss(model: nn.Module) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(features)[:, 0], label)

    def covariance(model: nn.Module) -> torch.Tensor:
        return (centred * model(features)[:, 0]).mean()

    free = hybridopt.minimize(loss, model, "lbfgsb", budget=300, seed=0)
    assert abs(covariance(model).item()) > 0.05
    fair = hybridopt.minimize(
        loss,
        model,
        "slsqp(ftol=1e-12)",
        budget=500,
        constraints={"fair": Constraint(covariance, -0.02, 0.02)},
        seed=0,
    )
    assert abs(covariance(model).item()) <= 0.02 + 1e-6
    assert fair.violation == 0
    a, y, z = features.numpy(), label.numpy(), centred.numpy()

    def direct(w: Any) -> float:
        t = a @ w[:4] + w[4]
        return float((np.logaddexp(0, t) - y * t).mean())

    def kept(w: Any) -> Any:
        c = (z * (a @ w[:4] + w[4])).mean()
        return np.array([c + 0.02, 0.02 - c])

    expected = scipy.optimize.minimize(
        direct,
        np.zeros(5),
        method="SLSQP",
        constraints={"type": "ineq", "fun": kept},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert fair.best_loss == pytest.approx(expected.fun, abs=1e-7)
    np.testing.assert_allclose(fair.x, expected.x, atol=1e-3)
    assert free.best_loss < fair.best_loss


# -- which point is the best -------------------------------------------------------------------------------------


def ask(objective: Objective, *points: list[float], kind: Kind = Kind.VALUE, probe: bool = False) -> None:
    for x in points:
        objective.answer(Request(kind, np.array(x), probe))


def test_the_best_is_the_lowest_that_keeps_them() -> None:
    with Objective(far, torch.zeros(2, dtype=torch.float64), constraints=disc) as objective:
        ledger = objective.ledger
        ask(objective, [2.0, 2.0])  # breaks it by 6
        assert (ledger.best_violation, ledger.best_loss) == (6.0, 2.0)
        ask(objective, [3.0, 1.0])  # by 8, with a lower loss
        assert (ledger.best_violation, ledger.best_loss) == (6.0, 2.0)
        ask(objective, [-2.0, 0.0])  # by 2, with a higher one
        assert (ledger.best_violation, ledger.best_loss) == (2.0, 26.0)
        ask(objective, [0.0, 0.0])
        assert (ledger.best_violation, ledger.best_loss) == (0.0, 10.0)
        ask(objective, [3.0, 1.0], [2.0, 1.0])
        assert ledger.best_loss == 10.0
        ask(objective, [1.0, 1.0])
        assert ledger.best_loss == 4.0
        ask(objective, [1.2, 0.5], probe=True)  # would be better, but nobody asked whether it keeps them
        assert ledger.best_loss == 4.0
        objective.restore_best()
    assert objective.vector.read().tolist() == [1.0, 1.0]


def test_a_target_counts_only_where_they_are_kept() -> None:
    x = torch.tensor([2.5, 1.0], dtype=torch.float64)  # a loss of 0.25, and breaks the constraint
    bounds = {"constraints": disc, "bounds": (-4, 4)}
    result = hybridopt.minimize(
        far, x, "slsqp(ftol=1e-9)", budget={"evaluations": 200, "target": 2.0}, **bounds
    )
    assert result.reason is Reason.CONVERGED  # every point below 2 breaks the constraint
    reached = hybridopt.minimize(
        far, x.zero_(), "slsqp(ftol=1e-9)", budget={"evaluations": 200, "target": 3.1}, **bounds
    )
    assert reached.reason is Reason.TARGET
    assert reached.violation == 0


def test_nothing_keeps_them() -> None:
    x = torch.tensor([3.0, 1.0], dtype=torch.float64)
    impossible = Constraint(lambda x: (x**2).sum(), -INF, -1.0)
    result = hybridopt.minimize(far, x, "slsqp", budget=60, constraints=impossible)
    assert result.violation == pytest.approx((x**2).sum().item() + 1)
    assert result.violation < 11  # less than at the start


@pytest.mark.parametrize(
    "text",
    [
        "differential_evolution(polish=False, popsize=4, maxiter=8)",
        "differential_evolution(polish=False, popsize=4, maxiter=8, updating=deferred)",
        "pyswarm.pso(swarmsize=10, maxiter=5)",
        "pyswarm.pso(swarmsize=10, maxiter=5) > slsqp(maxiter=2)",
    ],
)
def test_methods_that_ask_no_loss_where_they_are_broken_return_the_point_that_breaks_them_least(
    text: str,
) -> None:
    calls: list[float] = []

    def far_off(x: torch.Tensor) -> torch.Tensor:
        value = x.sum() - 5  # at most -3.5 in the box
        calls.append(float(value.detach()))
        return value

    start = torch.zeros(3, dtype=torch.float64)
    result = hybridopt.minimize(
        lambda x: (x**2).sum(), start, text, budget="2000fe", bounds=(-1, 0.5), constraints=far_off, seed=0
    )
    assert result.violation == pytest.approx(-(result.x.sum() - 5), abs=1e-12)
    assert result.violation <= -max(calls) + 1e-12
    assert result.violation < 4.9  # 5 at the start
    if ">" not in text:
        assert (result.evaluations, result.best_loss, result.success) == (0, INF, False)
        assert result.forward == len(calls)


@pytest.mark.parametrize("kind, known", [(Kind.VALUE, [2.0, 2.0]), (Kind.POPULATION, [[2.0, 2.0]])])
def test_a_point_whose_loss_is_known_goes_before_one_that_only_breaks_less(kind: Kind, known: Any) -> None:
    with Objective(far, torch.zeros(2, dtype=torch.float64), constraints=disc) as objective:
        ledger = objective.ledger
        for x, violation in (([2.0, 2.0], 6.0), ([3.0, 1.0], 6.0), ([1.0, 2.0], 3.0)):
            ask(objective, x, kind=Kind.CONSTRAINTS)
            assert (ledger.best_violation, ledger.best_loss) == (violation, INF)
        ask(objective, [2.0, 1.0], probe=True)  # no point of the method's own
        assert ledger.best_violation == 3.0
        objective.restore_best()
        assert objective.vector.read().tolist() == [1.0, 2.0]
        ask(objective, known, kind=kind)
        assert (ledger.best_violation, ledger.best_loss) == (6.0, 2.0)
        ask(objective, [0.0, 0.0], kind=Kind.CONSTRAINTS)  # keeps them, but its loss is unknown
        assert (ledger.best_violation, ledger.best_loss) == (6.0, 2.0)
        objective.restore_best()
    assert objective.vector.read().tolist() == [2.0, 2.0]


def test_the_tolerance() -> None:
    for tolerance, kept in ((None, 0.0), (1e-9, 5e-7)):
        rule = Constraint(lambda x: x.sum(), -INF, 1.0, tolerance=tolerance)
        with Objective(far, torch.zeros(2, dtype=torch.float64), constraints=rule) as objective:
            ask(objective, [1.0 + 5e-7, 0.0])
            assert objective.ledger.best_violation == pytest.approx(kept, rel=1e-6)


def test_constraints_that_are_no_number() -> None:
    """Such a point is never taken for one that keeps them."""
    rule = Constraint(lambda x: torch.log(x[0] + 1))
    with Objective(far, torch.zeros(2, dtype=torch.float64), constraints=rule) as objective:
        with pytest.warns(RuntimeWarning, match="constraint '0': nan or inf counts as broken"):
            ask(objective, [-2.0, 0.0])
        assert objective.ledger.best_violation == INF
        ask(objective, [-3.0, 0.0])  # said once
        told = objective.answer(Request(Kind.CONSTRAINTS, np.array([-2.0, 0.0]))).array
        assert told is not None
        assert told.tolist() == [-INF]
        ask(objective, [1.0, 0.0])
        assert objective.ledger.best_violation == 0


# -- what they cost ----------------------------------------------------------------------------------------------


def test_each_function_costs_a_forward_and_a_point_is_paid_once() -> None:
    rules = [disc, Constraint(lambda x: x[0]), Constraint.linear([1, 1], -INF, 1)]
    with Objective(far, torch.zeros(2, dtype=torch.float64), constraints=rules) as objective:
        ledger = objective.ledger

        def spent() -> tuple[int, int, int, int]:
            return ledger.evaluations, ledger.forward, ledger.backward, ledger.recomputed

        x = np.array([0.5, 0.5])
        objective.answer(Request(Kind.VALUE, x, keep_graph=True))
        assert spent() == (1, 3, 0, 0)
        c = objective.answer(Request(Kind.CONSTRAINTS, x)).array
        assert c is not None
        assert c.tolist() == [1.5, 0.5, 1.0]
        assert spent() == (1, 3, 0, 0)
        j = objective.answer(Request(Kind.CONSTRAINT_JACOBIAN, x)).array
        assert j is not None
        assert j.tolist() == [[-1.0, -1.0], [1.0, 0.0], [1.0, 1.0]]
        assert spent() == (1, 3, 2, 0)
        objective.answer(Request(Kind.CONSTRAINTS, np.array([[0.5, 0.5], [0.1, 0.2], [0.3, 0.3]])))
        assert spent() == (1, 7, 2, 0)
        objective.answer(Request(Kind.POPULATION, np.array([[0.1, 0.2], [0.3, 0.3]])))
        assert spent() == (3, 9, 2, 0)
        objective.answer(Request(Kind.VALUE, np.array([0.7, 0.7]), probe=True))
        assert spent() == (4, 10, 2, 0)
        limits = objective.answer(Request(Kind.LIMITS, x)).array
        assert limits is not None
        assert limits.tolist() == [[0, 0, -INF], [INF, INF, 1], [0, 0, 1]]


@pytest.mark.parametrize("text", ["slsqp", "scipy.cobyla", "scipy.differential_evolution(updating=deferred)"])
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 21, 50])
def test_a_budget_of_forward_equivalents_is_never_passed(text: str, limit: int) -> None:
    calls = [0]

    def counted(function: Any) -> Any:
        def called(x: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            return function(x)

        return called

    x = torch.zeros(2, dtype=torch.float64)
    bounds = (-4, 4) if "evolution" in text else None
    result = hybridopt.minimize(
        counted(far),
        x,
        text,
        budget=f"{limit}fe",
        bounds=bounds,
        constraints=counted(disc),
        seed=1,
        batch="loop",
    )
    assert result.forward_equivalents <= limit
    assert calls[0] <= result.forward + 3  # graphs lost to the check of autograd are made again, unpaid


# -- who may be asked, and wrong arguments -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["adam", "cmaes", "lbfgsb", "cmaes(evaluations=50) > slsqp", "pyswarm.pso > adam"]
)
def test_methods_that_would_pass_over_them_are_refused(text: str) -> None:
    with pytest.raises(MethodError, match=r"it cannot keep constraints; methods that can: .*scipy.slsqp"):
        hybridopt.minimize(far, torch.zeros(2), text, budget=50, bounds=(-4, 4), constraints=disc)


def test_a_chain_hands_on_a_point_that_keeps_them() -> None:
    x = torch.zeros(2, dtype=torch.float64)
    text = "scipy.differential_evolution(evaluations=60, polish=False) > slsqp(ftol=1e-10)"
    result = hybridopt.minimize(far, x, text, budget=600, bounds=(-4, 4), constraints=disc, seed=1)
    assert result.violation == 0
    assert result.best_loss == pytest.approx((math.sqrt(10) - math.sqrt(2)) ** 2, abs=1e-5)


@pytest.mark.parametrize(
    "given, text",
    [
        (3.0, "expected a function of the model, or a hybridopt.Constraint, got float"),
        (lambda x: None, "expected a tensor or numbers, got None; is its return missing?"),
        (lambda x: [1.0, None], "expected a tensor or numbers, got [1.0, None]"),
        (
            lambda x: [x[0], x[1]],
            "got [tensor(0., grad_fn=<SelectBackward0>), tensor(0., grad_fn=<SelectBackward0>)]; join",
        ),
        (lambda x: "one", "expected a tensor or numbers, got 'one'"),
        (lambda x: x.sum() <= 1, "expected numbers that say by how much it is kept, got True or False"),
        (
            lambda x: float(x.sum()) <= 1,
            "expected numbers that say by how much it is kept, got True or False",
        ),
        (lambda: 1.0, "expected a function of the model (or weights), got one without arguments"),
        (Constraint(disc, [0, 0, 0]), "expected lower to be one number, or one for each of 1, got [0, 0, 0]"),
        (Constraint.linear([1, 1, 1]), "expected a matrix of finite numbers with 2 columns"),
        (Constraint.linear([1, 1], weights="y*"), "no weights match 'y*'; their names are x"),
        (Constraint(disc, tolerance=-1), "expected tolerance >= 0, got -1"),
    ],
)
def test_wrong_constraints(given: Any, text: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        hybridopt.minimize(far, torch.zeros(2), "slsqp", budget=9, constraints={"mine": given})
    assert str(caught.value).startswith("constraint 'mine': ")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "limits, text",
    [
        ({"lower": 2, "upper": 1}, "expected lower <= upper, got 2 and 1"),
        ({"lower": [0, 0, 0], "upper": [1, -1, 1]}, "expected lower <= upper, got [0, 0, 0] and [1, -1, 1]"),
        ({"lower": math.nan}, "expected lower to be numbers, got nan"),
        ({"upper": "much"}, "expected upper to be numbers, got 'much'"),
        ({"upper": None}, "expected upper to be numbers, got None"),
    ],
)
def test_wrong_limits_are_refused_at_once(limits: Any, text: str) -> None:
    for make in (functools.partial(Constraint, disc), functools.partial(Constraint.linear, [1, 1])):
        with pytest.raises(ObjectiveError) as caught:
            make(**limits)
        assert str(caught.value).startswith(f"constraint: {text}")


def test_linear_constraints_of_some_tensors() -> None:
    model = nn.Linear(2, 1).double()
    target = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    result = hybridopt.minimize(
        lambda m: ((m.weight - target) ** 2).sum() + (m.bias - 5) ** 2,
        model,
        "slsqp(ftol=1e-12)",
        budget=100,
        constraints=Constraint.linear([1, 1], 0, 0, weights="weight"),
    )
    np.testing.assert_allclose(result.x, [0.5, -0.5, 5.0], atol=1e-6)


def test_scaled_and_logarithmic_weights() -> None:
    x = torch.tensor([0.5, 0.5], dtype=torch.float64)
    for options in ({"scale": np.array([10.0, 0.1])}, {"log": True}):
        result = hybridopt.minimize(
            far,
            x.fill_(0.5),
            "slsqp(ftol=1e-12, maxiter=500)",
            budget=2000,
            constraints=[disc, Constraint.linear([1, 2], -INF, 2.0)],
            **options,
        )
        reference = scipy.optimize.minimize(
            lambda v: float((v[0] - 3) ** 2 + (v[1] - 1) ** 2),
            np.array([0.5, 0.5]),
            method="SLSQP",
            constraints=[
                {"type": "ineq", "fun": lambda v: 2 - v @ v},
                {"type": "ineq", "fun": lambda v: 2 - v[0] - 2 * v[1]},
            ],
            options={"ftol": 1e-12},
        )
        np.testing.assert_allclose(result.x, reference.x, atol=1e-3)
