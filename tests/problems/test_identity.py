"""The seed problem, against its definition written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import hybridopt
from hybridopt import problems


def as_defined() -> tuple[nn.Module, torch.Tensor, np.ndarray]:
    """The definition word by word, drawing from the global generators in the order model, input, start."""
    torch.manual_seed(42)
    np.random.seed(42)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).double()
    data = torch.randn(32, 2).double()
    data[:, 1] *= 1000
    return model, data, 0.1 * np.random.randn(10)


def test_same_numbers_as_the_definition() -> None:
    model, data, start = as_defined()
    problem = problems.get("identity")
    assert np.array_equal(hybridopt.ParameterVector(problem.target).read(), start)
    hybridopt.ParameterVector(model).write(start)
    assert torch.equal(problem.loss(problem.target), ((model(data) - data) ** 2).mean())


def test_start_loss() -> None:
    problem = problems.get("identity")
    assert problem.loss(problem.target).item() == pytest.approx(307090.483493, abs=5e-7)
    assert problem.bounds == (-1.0, 1.0)


def test_global_generators_are_left_as_found() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    problems.get("identity")
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_equal(np.random.get_state(), numpy_state)


def test_fresh_at_every_call_and_the_same_for_every_seed() -> None:
    first, second = problems.get("identity", 42), problems.get("identity", 7)
    assert first.target is not second.target
    assert first.loss(first.target) == second.loss(second.target)
    with torch.no_grad():
        first.target[0].weight.zero_()
    assert first.loss(first.target) != second.loss(second.target)


def test_best_known_is_reached_and_not_passed() -> None:
    """0.7830541615: the lowest of 12 runs of annealing or a swarm, then SLSQP with ftol 1e-15 (scipy 1.17.1)."""
    problem = problems.get("identity")
    chain = "scipy.dual_annealing(evaluations=500, gradients=none) > scipy.slsqp(ftol=1e-15)"
    result = hybridopt.minimize(
        problem.loss, problem.target, chain, budget=2000, seed=42, bounds=problem.bounds
    )
    assert result.best_loss == pytest.approx(problem.best_known, abs=2e-9)
