"""What population methods hand to a successor, and what they make of what they are handed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hybridopt import ParameterVector
from hybridopt.optimizer import Answer, HandOver
from hybridopt.population import CMAES, PGPE, PSO, SNES, XNES, DifferentialEvolution, OpenAIES, RandomSearch
from tests.population.drive import bowl

NORMAL = [
    CMAES(popsize=400),
    CMAES(popsize=400, covariance="separable"),
    CMAES(popsize=400, covariance="limited"),
    SNES(popsize=400),
    XNES(popsize=400),
    OpenAIES(popsize=400),
    PGPE(popsize=400),
]


def at_work(method: Any, warm: Any = None, generations: int = 5, box: Any = None, seed: int = 1) -> Any:
    run = method.start(ParameterVector(torch.full((3,), 0.3, dtype=torch.float64), bounds=box), seed, warm)
    for _ in range(generations):
        x = run.ask().x
        run.tell(Answer(losses=bowl(x)))
    return run


@pytest.mark.parametrize("method", NORMAL, ids=str)
def test_the_distribution_is_handed_over_as_it_samples(method: Any) -> None:
    run = at_work(method)
    warm = run.hand_over()
    assert warm.covariance is not None
    variances = warm.covariance if warm.covariance.ndim == 1 else warm.covariance.diagonal()
    assert np.log(variances).mean() == pytest.approx(0, abs=1e-12)
    drawn = np.concatenate([run.strategy.ask(np.random.default_rng(s)) for s in range(30)])
    seen = np.cov(drawn.T)
    if warm.covariance.ndim == 2:
        np.testing.assert_allclose(warm.sigma**2 * warm.covariance, seen, atol=0.06 * seen.diagonal().max())
    np.testing.assert_allclose(warm.sigma**2 * variances, seen.diagonal(), rtol=0.06)


C = np.array([[4.0, 1.8, 0.0], [1.8, 1.0, 0.0], [0.0, 0.0, 0.25]])  # geometric mean of the diagonal 1


@pytest.mark.parametrize("method", NORMAL, ids=str)
@pytest.mark.parametrize("full", [True, False])
def test_a_distribution_handed_over_is_what_is_sampled_first(method: Any, full: bool) -> None:
    """Of a full covariance methods without correlations take the diagonal."""
    warm = HandOver(np.array([1.0, 2.0, 3.0]), 0.5, 0.2, C if full else C.diagonal())
    drawn = np.concatenate(
        [
            method.start(ParameterVector(torch.zeros(3, dtype=torch.float64)), seed, warm).ask().x
            for seed in range(30)
        ]
    )
    expected = C if full and (isinstance(method, XNES) or method == NORMAL[0]) else np.diag(C.diagonal())
    np.testing.assert_allclose(drawn.mean(0), [1, 2, 3], atol=0.02)
    np.testing.assert_allclose(np.cov(drawn.T) / 0.04, expected, atol=0.15)


@pytest.mark.parametrize("method", [CMAES(popsize=400), XNES(popsize=400), SNES(popsize=400)], ids=str)
def test_what_one_hands_over_another_goes_on_with(method: Any) -> None:
    before = at_work(method, generations=1)
    warm = before.hand_over()._replace(x=before.incumbent.x, loss=before.incumbent.loss)
    again = at_work(method, warm, generations=0).hand_over()
    assert again.sigma == pytest.approx(warm.sigma, rel=1e-9)
    np.testing.assert_allclose(again.covariance, warm.covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [CMAES, XNES, SNES, OpenAIES])
def test_a_sigma_given_says_more_than_a_predecessors(method: Any) -> None:
    """It is the size; the shape is still the one handed over."""
    warm = HandOver(np.zeros(3), sigma=0.2, covariance=C)
    given = at_work(method(sigma=0.7), warm, generations=0).hand_over()
    taken = at_work(method(), warm, generations=0).hand_over()
    assert given.sigma == pytest.approx(0.7 / 0.2 * taken.sigma)
    np.testing.assert_allclose(given.covariance, taken.covariance, atol=1e-12)


def test_a_collapsed_predecessor_leaves_room_to_search() -> None:
    """A tenth of the usual width, 0.3 × the range or 0.5, at least."""
    warm = HandOver(np.zeros(3), sigma=1e-12)
    assert at_work(CMAES(), warm, generations=0).hand_over().sigma == pytest.approx(0.05)
    boxed = at_work(CMAES(), warm, generations=0, box=(-1, 1)).hand_over()
    assert boxed.sigma == pytest.approx(0.06)


def test_a_matrix_that_is_no_covariance_gives_its_diagonal() -> None:
    wrong = np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    for method in (CMAES(), XNES()):
        handed = at_work(
            method, HandOver(np.zeros(3), sigma=0.2, covariance=wrong), generations=0
        ).hand_over()
        np.testing.assert_allclose(handed.covariance, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("method", [PSO(swarmsize=12), DifferentialEvolution(popsize=12)], ids=str)
def test_swarms_hand_over_and_take_points(method: Any) -> None:
    run = at_work(method, box=(-1, 1))
    warm = run.hand_over()
    assert (np.diff(warm.losses) >= 0).all()
    np.testing.assert_array_equal(bowl(warm.points), warm.losses)
    assert len(warm.points) == 12
    assert warm.losses[0] == run.incumbent.loss
    assert warm.sigma == pytest.approx(np.exp(np.log(warm.points.std(axis=0)).mean()))
    assert warm.covariance is None
    warm = warm._replace(x=run.incumbent.x, loss=run.incumbent.loss)
    first = at_work(method, warm, generations=0, box=(-1, 1), seed=2).ask().x
    np.testing.assert_array_equal(first[0], warm.x)
    np.testing.assert_array_equal(first[1], warm.points[1])  # the start is not there twice
    assert not (first[2:, None] == warm.points).all(-1).any()  # a tenth of the places, no more


def test_rejected_points_are_not_handed_over() -> None:
    run = PSO(swarmsize=5).start(ParameterVector(torch.zeros(2), bounds=(-1, 1)), 0)
    run.ask()
    run.tell(Answer(losses=np.array([math.inf, 3.0, math.inf, 1.0, 2.0])))
    assert run.hand_over().losses.tolist() == [1, 2, 3]


def test_nothing_learnt_is_nothing_handed_over() -> None:
    assert at_work(RandomSearch()).hand_over() == HandOver()
    for method in (PSO(), DifferentialEvolution()):
        assert at_work(method, generations=0, box=(-1, 1)).hand_over() == HandOver()
