"""The sampled loss: its expectation, its noise, and what sure logits draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import problems
from hybridopt.optimizer import Kind, Request


def test_mean_of_many_draws_is_the_exact_expectation() -> None:
    problem = problems.get("sampling", seed=1)
    x = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([problem.loss(x) for _ in range(2000)])
    assert drawn.std() > 0.01
    error = 5 * (drawn.std() / 2000**0.5).item()
    assert drawn.mean().item() == pytest.approx(-problem.score(x), abs=error)


def test_sure_logits_draw_the_secret_word_or_none_of_it() -> None:
    problem = problems.get("sampling", seed=4)
    secret = torch.randint(5, (6,), generator=torch.Generator().manual_seed(4))
    x = 200 * torch.nn.functional.one_hot(secret, 5).double().flatten()
    assert problem.loss(x) == problem.best_known == 0
    assert problem.score(x) == pytest.approx(0)
    assert problem.loss(x.view(6, 5).roll(1, 1).flatten()) == 1
    assert problem.score(5 * (x > 0) - 5.0 * (x == 0)) == pytest.approx(-4 * np.exp(-10), rel=1e-3)


def test_a_method_learns_the_word() -> None:
    problem = problems.get("sampling", seed=2)
    hybridopt.minimize(
        problem.loss, problem.target, "snes(sigma=1)", budget=1500, seed=0, bounds=problem.bounds
    )
    assert problem.score(problem.target) > -0.5  # from -0.8


def test_it_is_known_for_noise_and_a_population_shares_its_draws() -> None:
    problem = problems.get("sampling", seed=2)
    with hybridopt.Objective(problem.loss, problem.target, seed=1) as objective:
        told = objective.answer(Request(Kind.POPULATION, np.zeros((4, 30)))).losses
        assert objective.stochastic
    assert len(set(told)) == 1
