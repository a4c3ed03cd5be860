"""Which point a population method names where a low loss is a lucky draw, and what it knows of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import ParameterVector
from hybridopt.errors import Stop
from hybridopt.objective import Objective
from hybridopt.optimizer import Answer, step
from hybridopt.population import CMAES, PGPE, SNES, XNES, DifferentialEvolution, OpenAIES, RandomSearch
from tests.population.drive import bowl

MEANS = [CMAES(), CMAES(covariance="separable"), SNES(), XNES(), OpenAIES(), PGPE()]
POINTS = [RandomSearch(popsize=8), CMAES(restarts="ipop")]


def begin(method: Any, seed: int = 1) -> Any:
    return method.start(ParameterVector(torch.full((3,), 0.9, dtype=torch.float64), bounds=(-1, 1)), seed)


def tell(run: Any, losses: Any, keeps_best: bool = False) -> None:
    run.tell(Answer(losses=losses, keeps_best=keeps_best))


@pytest.mark.parametrize("method", MEANS, ids=str)
def test_the_mean_is_named_with_a_loss_of_its_own(method: Any) -> None:
    run, rng = begin(method), np.random.default_rng(0)
    x = run.ask().x
    tell(run, bowl(x))
    drawn = len(run.strategy.ask(np.random.default_rng(5)))
    for _ in range(5):
        mean = run.strategy.favourite()
        x = run.ask().x
        assert len(x) == drawn + 1
        np.testing.assert_array_equal(x[0], mean)
        losses = bowl(x) + rng.standard_normal(len(x))
        losses[3] = -100.0  # a lucky draw
        tell(run, losses)
        assert run.incumbent.loss == losses[0]
        np.testing.assert_array_equal(run.incumbent.x, mean)


@pytest.mark.parametrize("method", [*MEANS, *POINTS, DifferentialEvolution()], ids=str)
def test_the_search_itself_is_the_same(method: Any) -> None:
    """The points to name come on top; they draw no random numbers, and teach no method what it knew."""
    quiet, noisy = begin(method), begin(method)
    for _ in range(6):
        x = quiet.ask().x
        y = noisy.ask().x
        np.testing.assert_array_equal(y[len(y) - len(x) :], x)
        tell(quiet, bowl(x), keeps_best=True)
        tell(noisy, bowl(y))
    assert len(y) > len(x)
    assert quiet.incumbent.loss == bowl(quiet.incumbent.x[None])[0]


@pytest.mark.parametrize("method", POINTS, ids=str)
def test_without_a_mean_the_lowest_is_judged_again(method: Any) -> None:
    """It is compared with the point named so far by the same random numbers, not by the loss that chose it."""
    run = begin(method)
    x = run.ask().x
    losses = bowl(x)
    losses[5] = -100.0
    tell(run, losses)
    lucky = x[5]
    x = run.ask().x
    np.testing.assert_array_equal(x[0], lucky)
    losses = bowl(x)
    tell(run, losses)
    assert run.incumbent.loss == losses[0]
    good = x[1 + losses[1:].argmin()]
    x = run.ask().x
    np.testing.assert_array_equal(x[:2], [lucky, good])
    losses = bowl(x)
    losses[0] = losses[1] + 1
    tell(run, losses)
    np.testing.assert_array_equal(run.incumbent.x, good)
    assert run.incumbent.loss == losses[1]


@pytest.mark.parametrize("method", [CMAES(), RandomSearch(popsize=8)], ids=str)
def test_saved_between_any_two_steps(method: Any) -> None:
    rng = np.random.default_rng(3)
    run = begin(method)
    for i in range(6):
        asked = i % 2
        if asked:
            run.ask()
        other = begin(method, seed=7)
        other.load_state_dict(run.state_dict())
        x, y = run.ask().x, other.ask().x
        np.testing.assert_array_equal(x, y)
        losses = bowl(x) + rng.standard_normal(len(x))
        tell(run, losses)
        tell(other, losses)
        assert run.incumbent.loss == other.incumbent.loss
        np.testing.assert_array_equal(run.incumbent.x, other.incumbent.x)


def noisy(x: torch.Tensor) -> torch.Tensor:
    return (x**2).sum() + 0.3 * torch.randn(())


def test_the_loss_of_what_is_named_is_no_lucky_draw() -> None:
    for seed in range(3):
        result = hybridopt.minimize(
            noisy, torch.full((5,), 2.0), CMAES(), budget=1500, seed=seed, noise="independent"
        )
        assert result.stochastic
        end = float((result.x**2).sum())
        assert end < 0.4  # 2 % of the start's 20
        assert abs(result.loss - end) < 4 * 0.3  # four deviations of the noise
        assert result.best_loss < end - 2 * 0.3  # the lowest of 1500 draws


def test_points_to_name_are_evaluations() -> None:
    with Objective(noisy, torch.ones(3), 81) as objective:
        run = CMAES().start(objective.vector, 0)
        for _ in range(10):  # the start, and 7 points; 8 in each further generation: 80
            step(run, objective)
        assert objective.ledger.evaluations == 80
        with pytest.raises(Stop):
            step(run, objective)
        assert objective.ledger.evaluations == 81
