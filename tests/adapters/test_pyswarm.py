"""pyswarm's PSO: its own path, bit for bit, and its traps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyswarm
import pytest
import torch

import hybridopt
from hybridopt import Reason, method
from hybridopt.errors import BoundsError, MethodError
from tests.driving import rosenbrock

Points = list[list[float]]
BOUNDS = [(-1.5, 2.0), (-1.0, 1.5), (0.0, 1.0)]


def ours(text: str, budget: int = 5000, seed: int = 3) -> tuple[Points, Any]:
    points: Points = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        points.append(x.tolist())
        return rosenbrock(x)

    x = torch.full((3,), 0.5, dtype=torch.float64)
    return points, hybridopt.minimize(loss, x, text, budget=budget, bounds=np.array(BOUNDS), seed=seed)


def theirs(seed: int = 3, **options: Any) -> tuple[Points, Any]:
    points: Points = []

    def f(x: Any) -> float:
        points.append(x.tolist())
        return rosenbrock(torch.tensor(x)).item()

    return points, pyswarm.pso(f, bounds=BOUNDS, seed=seed, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"swarmsize": 8, "maxiter": 12},
        {"swarmsize": 8, "maxiter": 30, "omega": 0.7298, "phip": 1.49618, "phig": 1.49618},
        {"swarmsize": 10, "minstep": 0.05},
        {"swarmsize": 10, "minfunc": 0.5},
        {"swarmsize": 10, "patience": 2},
    ],
)
def test_walks_pyswarms_path(options: dict[str, Any]) -> None:
    points, result = ours(str(method("pyswarm.pso", **options)))
    expected_points, expected = theirs(**options)
    assert points == expected_points
    assert result.loss == expected.fun == result.best_loss
    assert result.x.tolist() == expected.x.tolist()
    assert result.message == expected.message
    ran_out = expected.message == "Maximum iterations reached"
    assert result.reason is (Reason.STALLED if ran_out else Reason.CONVERGED)


def test_the_path_does_not_depend_on_the_budget() -> None:
    """pyswarm draws all random numbers up front, so `maxiter` shapes the path and must not follow from a budget."""
    whole, _ = ours("pyswarm.pso(swarmsize=8)", budget=300)
    for budget in (1, 8, 100, 299):
        assert ours("pyswarm.pso(swarmsize=8)", budget=budget)[0] == whole[:budget]


def test_infeasible_words_are_never_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """pyswarm prints when nothing but 1e300 and above was seen."""
    x = torch.full((3,), 0.5, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="rejected"):
        result = hybridopt.minimize(
            lambda x: x.sum() * torch.inf,
            x,
            "pyswarm.pso(swarmsize=3, maxiter=4)",
            budget=500,
            bounds=(0, 1),
            seed=0,
        )
    assert result.reason is Reason.NON_FINITE
    assert result.loss == np.inf
    assert x.tolist() == [0.5, 0.5, 0.5]
    assert capfd.readouterr() == ("", "")


def test_needs_a_box() -> None:
    with pytest.raises(BoundsError, match=r"pyswarm.pso: expected finite bounds.*bounds=\(-1, 1\)"):
        hybridopt.minimize(rosenbrock, torch.zeros(2), "pyswarm.pso", budget=10)


@pytest.mark.parametrize("option", ["swarmsize", "maxiter"])
def test_wrong_options(option: str) -> None:
    with pytest.raises(MethodError, match=f"pyswarm.pso: expected {option} >= 1, got 0"):
        method("pyswarm.pso", **{option: 0})
