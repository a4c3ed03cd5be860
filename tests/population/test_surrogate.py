"""lq-CMA-ES: its models, when it trusts them, and what that saves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

import hybridopt
from hybridopt import Reason, Run
from hybridopt.errors import MethodError
from hybridopt.population import surrogate
from hybridopt.population.surrogate import LOOK, LQCMAES, Model, Surrogate, tau
from hybridopt.testing import OptimizerContract


class TestContract(OptimizerContract):
    method = LQCMAES()
    random = True


class TestContractRestarts(OptimizerContract):
    method = LQCMAES(sigma=0.3, restarts="bipop")
    random = True


def turned(x: np.ndarray) -> float:
    """An ellipsoid of condition 10^6 or more whose axes are no coordinates; minimum 0."""
    z = np.cumsum(x) - 1
    return float(np.logspace(0, 6, len(x)) @ z**2)


def noise(x: np.ndarray) -> float:
    """Without any order, and yet a function."""
    return float(np.modf(np.sin(x @ np.arange(1, len(x) + 1)) * 43758.5453)[0])


# -- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_a_quadratic_loss_is_its_own_model(n: int) -> None:
    """Least squares reproduce what they can express, in badly scaled coordinates too."""
    rng = np.random.default_rng(n)
    root = rng.standard_normal((n, n))
    H, at = root @ root.T + np.eye(n), rng.standard_normal(n)
    scale = np.logspace(-3, 3, n)
    x = rng.standard_normal((3 * (n + 1) * (n + 2) // 2, n)) * scale + 5

    def losses(x: np.ndarray) -> np.ndarray:
        z = (x - 5) / scale - at
        return 0.5 * ((z @ H) * z).sum(1) - 7

    model = Model.fitted(x, losses(x))
    assert len(model.coefficients) == (n + 1) * (n + 2) // 2
    new = rng.standard_normal((20, n)) * scale + 5
    np.testing.assert_allclose(np.diff(model(new)), np.diff(losses(new)), rtol=1e-6, atol=1e-6)
    assert model.minimum is not None
    np.testing.assert_allclose((model.minimum - 5) / scale, at, atol=1e-6)


def test_it_grows_with_the_points() -> None:
    """1.1 points a coefficient, counting the better three quarters."""
    x = np.random.default_rng(0).standard_normal((200, 3))
    losses = x[:, 0] + (x**2).sum(1)
    sizes = [len(Model.fitted(x[:k], losses[:k]).coefficients) for k in range(2, 30)]
    assert sizes == sorted(sizes)
    assert [2 + sizes.index(size) for size in (4, 7, 10)] == [6, 10, 14]  # ceil(3/4 · k) >= 4.4, 7.7, 11
    assert sizes[0] == 1


def test_linear_and_diagonal_models() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((7, 3))
    slope = np.array([3.0, -1.0, 0.5])
    model = Model.fitted(x, x @ slope)
    np.testing.assert_allclose(np.diff(model(x)), np.diff(x @ slope), atol=1e-9)
    assert model.minimum is None
    x = rng.standard_normal((12, 3))
    losses = ((x - 1) ** 2 * [1, 10, 100]).sum(1)
    model = Model.fitted(x, losses)
    assert len(model.coefficients) == 7
    assert model.minimum == pytest.approx(np.ones(3))
    assert Model.fitted(x, -losses).minimum is None  # it has a maximum only


def test_points_in_a_plane() -> None:
    """A weight that never moved, at a bound say, leaves the others their model."""
    x = np.random.default_rng(2).standard_normal((40, 3))
    x[:, 1] = 2.0
    losses = (x[:, 0] - 1) ** 2 + 3 * (x[:, 2] + x[:, 0]) ** 2
    model = Model.fitted(x, losses)
    np.testing.assert_allclose(np.diff(model(x)), np.diff(losses), atol=1e-6)


def test_equal_losses_have_no_model() -> None:
    x = np.random.default_rng(3).standard_normal((40, 3))
    assert (Model.fitted(x, np.ones(40))(x) == 0).all()


def test_the_best_points_weigh_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no model fits everywhere, it fits better where the losses are low."""
    x = np.random.default_rng(5).standard_normal((40, 2))
    losses = (x**4).sum(1)
    best = np.argsort(losses)[:10]

    def error() -> float:
        return float(np.std(Model.fitted(x, losses)(x[best]) - losses[best]))

    weighted = error()
    monkeypatch.setattr(surrogate, "HEAVIEST", 1)
    assert weighted < 0.8 * error()


def test_tau() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((2, 15))
    assert tau(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert tau(a, np.exp(a)) == 1
    assert tau(a, -a) == -1
    assert tau(np.zeros(4), np.arange(4.0)) == 0


# -- the search --------------------------------------------------------------------------------------------------


def generations(loss: Any, n: int, budget: int, **options: Any) -> tuple[list[int], list[Surrogate]]:
    """How many points of each generation were evaluated."""
    run = Run(loss, np.zeros(n), LQCMAES(sigma=0.5, **options), budget=budget, seed=0)
    counts, before, strategies = [], 0, []
    while run.step() is not None:
        strategy = run.optimizer.strategy
        if strategy.generation is None:
            counts.append(run.objective.ledger.evaluations - before)
            before += counts[-1]
            strategies.append(strategy)
    return counts, strategies


@pytest.mark.parametrize("n", [2, 5])
def test_a_quadratic_loss_takes_few_evaluations(n: int) -> None:
    """Three times fewer than CMA-ES, and not many more than a quadratic has coefficients."""

    def spent(method: str) -> int:
        budget = hybridopt.Budget(evaluations=9000, target=1e-8)
        return hybridopt.minimize(turned, np.zeros(n), method, budget=budget, seed=0).evaluations

    assert spent("lq_cmaes(sigma=0.5)") < spent("cmaes(sigma=0.5)") / 3
    assert spent("lq_cmaes(sigma=0.5)") < 10 * (n + 1) * (n + 2) // 2


def test_a_model_that_is_wrong_is_not_followed() -> None:
    counts, _ = generations(noise, 4, 400)
    assert np.mean(np.array(counts[3:]) == 8) > 0.8


def test_a_quarter_is_evaluated_at_least() -> None:
    """Of a generation without a new best point; of another one evaluation may do."""
    run = Run(turned, np.zeros(3), LQCMAES(sigma=0.5, popsize=16), budget=400, seed=0)
    small, before, best, lowest = 0, 0, np.inf, np.inf
    while (step := run.step()) is not None:
        lowest = min(lowest, step.loss)
        if run.optimizer.strategy.generation is None:
            count = run.objective.ledger.evaluations - before
            before += count
            assert count >= LOOK * 16 or lowest < best
            small += count < LOOK * 16
            best, lowest = min(best, lowest), np.inf
    assert small > 10


def test_the_model_is_that_of_the_points_known() -> None:
    """Also after a generation, a restart, and from a state."""
    method = LQCMAES(sigma=0.5, restarts="ipop")
    run = Run(turned, np.zeros(2), method, budget=900, seed=0)
    other = Run(turned, np.zeros(2), method, budget=900, seed=1)
    for _ in range(5):
        other.step()
    while run.step() is not None:
        strategy = run.optimizer.strategy
        fresh = Model.fitted(strategy.x, strategy.losses)
        assert np.array_equal(strategy._fitted().coefficients, fresh.coefficients)
    assert strategy.search.restarted
    other.load_state_dict(run.state_dict())
    assert np.array_equal(other.optimizer.strategy._fitted().coefficients, fresh.coefficients)


def test_a_restart_forgets() -> None:
    run = Run(turned, np.zeros(2), LQCMAES(sigma=0.5, restarts="ipop"), budget=2000, seed=0)
    restarted = 0
    while run.step() is not None and restarted < 2:
        strategy = run.optimizer.strategy
        if strategy.search.restarted > restarted:
            restarted = strategy.search.restarted
            assert len(strategy.losses) == 0
    assert restarted == 2


def test_the_end_names_a_point_that_was_evaluated() -> None:
    """Not the model's word of one that was spared."""
    seen: dict[bytes, float] = {}

    def loss(x: np.ndarray) -> float:
        seen[x.tobytes()] = turned(x)
        return seen[x.tobytes()]

    run = Run(loss, np.zeros(3), LQCMAES(sigma=0.5), budget=5000, seed=0)
    while (step := run.step()) is not None and step.reason is None:
        pass
    assert step is not None
    assert step.reason is Reason.CONVERGED
    incumbent = run.optimizer.incumbent
    assert incumbent.x is not None
    assert incumbent.loss == min(seen.values()) == seen[incumbent.x.tobytes()]


def test_losses_that_are_not_finite() -> None:
    def loss(x: np.ndarray) -> float:
        return float("nan") if x[0] > 0.7 else float(((x - 0.5) ** 2).sum())

    with pytest.warns(RuntimeWarning, match="loss nan"):
        result = hybridopt.minimize(loss, np.zeros(3), "lq_cmaes(sigma=0.5)", budget=300, seed=0)
    assert result.best_loss < 1e-10


def test_bad_options() -> None:
    with pytest.raises(MethodError, match="lq_cmaes: expected a positive finite sigma"):
        LQCMAES(sigma=-1.0)
    with pytest.raises(MethodError, match="lq_cmaes: expected popsize >= 2"):
        LQCMAES(popsize=1)


def test_a_region_that_is_rejected_is_not_taken_for_the_best() -> None:
    """What the model promises beyond a wall, where it knows no point, is not believed."""
    sizes = 10.0 ** np.linspace(0, 3, 5)

    def walled(x: Any) -> float:
        return float(np.sum(sizes * x**2)) if x[0] >= 1 else math.nan

    for seed in range(3):
        with pytest.warns(RuntimeWarning, match="counted"):
            result = hybridopt.minimize(walled, np.full(5, 2.0), LQCMAES(sigma=0.3), budget=1500, seed=seed)
        assert result.best_loss - 1 < 1e-4, "the lowest loss is 1, on the wall"
