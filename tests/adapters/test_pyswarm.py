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
from hybridopt.optimizer import Answer, HandOver
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
        {"swarmsize": 8, "maxiter": 30, "omega": 0.5, "phip": 0.5, "phig": 0.5},
        {"swarmsize": 10, "minstep": 0.05},
        {"swarmsize": 10, "minfunc": 0.5},
        {"swarmsize": 10, "patience": 2},
    ],
)
def test_walks_pyswarms_path(options: dict[str, Any]) -> None:
    points, result = ours(str(method("pyswarm.pso", **options)))
    constriction = {"omega": 0.7298, "phip": 1.49618, "phig": 1.49618}  # not pyswarm's own default
    expected_points, expected = theirs(**constriction | options)
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


# -- constraints, whole numbers, points handed over ----------------------------------------------------------------


def test_constraints_walk_pyswarms_path() -> None:
    """Its `f_ieqcons` with ours; the loss is asked of particles that keep them alone."""
    asked: Points = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        asked.append(x.tolist())
        return rosenbrock(x)

    ring = hybridopt.Constraint(lambda x: torch.stack([(x**2).sum(), x[0]]), [0.5, -np.inf], [1.5, 0.3])
    x = torch.full((3,), 0.5, dtype=torch.float64)
    text = "pyswarm.pso(swarmsize=8, maxiter=20)"
    result = hybridopt.minimize(loss, x, text, budget=3000, bounds=np.array(BOUNDS), seed=3, constraints=ring)
    points: Points = []

    def f(x: Any) -> float:
        points.append(x.tolist())
        return rosenbrock(torch.tensor(x)).item()

    expected = pyswarm.pso(
        f,
        bounds=BOUNDS,
        seed=3,
        swarmsize=8,
        maxiter=20,
        omega=0.7298,
        phip=1.49618,
        phig=1.49618,
        f_ieqcons=lambda x: np.array([(x**2).sum() - 0.5, 1.5 - (x**2).sum(), 0.3 - x[0]]),
    )
    assert asked == points
    assert result.best_loss == expected.fun
    assert result.violation == 0
    assert result.x[0] <= 0.3


@pytest.mark.parametrize("seed", range(6))
def test_constraints_that_no_first_particle_keeps_walk_pyswarms_path(seed: int) -> None:
    """A small disc: found late or never, and pyswarm itself says "Sorry" where it is never found."""
    asked: Points = []
    centre = torch.tensor([0.7, -0.6], dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        asked.append(x.tolist())
        return rosenbrock(x)

    disc = hybridopt.Constraint(lambda x: ((x - centre) ** 2).sum(), -np.inf, 0.02)
    x = torch.zeros(2, dtype=torch.float64)
    text = "pyswarm.pso(swarmsize=5, maxiter=15)"
    hybridopt.minimize(loss, x, text, budget=3000, bounds=(-1, 1), seed=seed, constraints=disc)
    points: Points = []

    def f(x: Any) -> float:
        points.append(x.tolist())
        return rosenbrock(torch.tensor(x)).item()

    options: Any = {"omega": 0.7298, "phip": 1.49618, "phig": 1.49618, "swarmsize": 5, "maxiter": 15}
    pyswarm.pso(
        f,
        bounds=[(-1, 1)] * 2,
        seed=seed,
        f_ieqcons=lambda x: np.array([0.02 - ((x - centre.numpy()) ** 2).sum()]),
        **options,
    )
    assert asked == points


def test_nothing_is_printed_where_no_particle_keeps_the_constraints(
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked: list[int] = []
    x = torch.zeros(2, dtype=torch.float64)
    result = hybridopt.minimize(
        lambda x: asked.append(0) or x.sum(),  # type: ignore[func-returns-value]
        x,
        "pyswarm.pso(swarmsize=10, maxiter=5)",
        budget=500,
        bounds=(-1, 0.5),
        seed=0,
        constraints=hybridopt.Constraint(lambda x: x.sum() - 5, 0, np.inf),
    )
    assert capfd.readouterr() == ("", "")
    assert not asked
    assert result.violation > 0


def test_equalities_are_refused() -> None:
    plane = hybridopt.Constraint.linear([1, 1], 1, 1)
    with pytest.raises(MethodError, match=r"expected inequality constraints alone, 1 are equalities.*slsqp"):
        hybridopt.minimize(
            rosenbrock, torch.zeros(2), "pyswarm.pso", budget=99, bounds=(-1, 1), constraints=plane
        )


def test_whole_numbers() -> None:
    """As integer weights they are pyswarm's `intvar`: the same path, and no coordinate between them."""
    x = torch.tensor([4.0, 1.0], dtype=torch.float64)
    asked: Points = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        asked.append(x.tolist())
        return ((x - 2.3) ** 2).sum()

    result = hybridopt.minimize(
        loss,
        x,
        "pyswarm.pso(swarmsize=8, maxiter=20)",
        budget=3000,
        bounds=(-5, 5),
        integer=[True, False],
        seed=3,
    )
    points: Points = []

    def f(x: Any) -> float:
        points.append(x.tolist())
        return float(((x - 2.3) ** 2).sum())

    options: Any = {"omega": 0.7298, "phip": 1.49618, "phig": 1.49618, "swarmsize": 8, "maxiter": 20}
    pyswarm.pso(f, bounds=[(-5, 5), (-5, 5)], seed=3, intvar=[0], **options)
    assert asked == points
    assert result.x[0] == 2.0


def test_points_handed_over_begin_the_swarm() -> None:
    vector = hybridopt.ParameterVector(torch.zeros(2, dtype=torch.float64), bounds=(-2, 2))
    good = np.array([[1.0, 1.5], [-0.5, 0.25]])
    warm = HandOver(good[0], 1.0, points=good, losses=np.array([1.0, 2.0]))
    optimizer = method("pyswarm.pso(swarmsize=5)").start(vector, 1, warm)
    asked = []
    for loss in range(5):
        question = optimizer.ask()
        assert question.x is not None
        asked.append(question.x.tolist())
        optimizer.tell(Answer(float(loss)))
    optimizer.close()
    assert asked[:2] == good.tolist()
    assert len({tuple(x) for x in asked}) == 5
