"""pycma's CMA-ES: its own path, bit for bit; generations, bounds, and its stray habits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cma
import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import Reason, method
from hybridopt.errors import MethodError
from tests.driving import rosenbrock

Points = list[list[float]]
X0 = [-1.2, 1.0, 0.3]


def ours(text: str, budget: int = 600, bounds: Any = None, seed: int = 3) -> tuple[Points, Any]:
    points: Points = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        points.append(x.tolist())
        return rosenbrock(x)

    x = torch.tensor(X0, dtype=torch.float64)
    return points, hybridopt.minimize(loss, x, text, budget=budget, bounds=bounds, seed=seed)


def theirs(evaluations: int, sigma: float = 0.5, seed: int = 3, **options: Any) -> tuple[Points, Any]:
    """pycma called directly, with the solutions it handed out given back as they are."""
    points: Points = []
    es = cma.CMAEvolutionStrategy(
        X0,
        sigma,
        {"seed": math.nan, "randn": np.random.RandomState(seed).randn, "tolfun": 1e-11, "tolx": 1e-11,
         "verbose": -9, "verb_log": 0, **options},
    )  # fmt: skip
    while len(points) < evaluations and not es.stop():
        solutions = es.ask()
        points += [s.tolist() for s in solutions]
        es.tell(solutions, [rosenbrock(torch.tensor(s)).item() for s in solutions])
    return points[:evaluations], es


@pytest.mark.parametrize("options", [{}, {"popsize": 4}, {"diagonal": True}, {"maxiter": 20}])
def test_walks_pycmas_path(options: dict[str, Any]) -> None:
    points, result = ours(str(method("cma.cmaes", **options)))
    direct = {"CMA_diagonal": options.pop("diagonal")} if "diagonal" in options else options
    expected, es = theirs(600, **direct)
    assert points == expected
    if "maxiter" in options:
        assert result.evaluations == len(points)
        assert (result.reason, result.message) == (Reason.STALLED, "maxiter")
        assert result.loss == es.best.f


def test_walks_pycmas_path_within_bounds() -> None:
    points, result = ours("cma.cmaes", 400, bounds=(-1.3, 1.05))
    expected, _ = theirs(400, sigma=0.3 * 2.35, bounds=[-1.3, 1.05])
    assert points == np.array(expected).clip(-1.3, 1.05).tolist()
    assert np.array(points).min() >= -1.3
    assert np.array(points).max() <= 1.05
    assert any(1.05 in p or -1.3 in p for p in np.array(points).round(3).tolist())


def test_spread_of_each_weight_follows_its_range() -> None:
    """0.3 × the range where there is one, 0.5 where there is none."""
    bounds = np.array([(-1.3, 1.7), (-math.inf, math.inf), (-99, 101)])
    points, _ = ours("cma.cmaes(popsize=2000)", 2000, bounds=bounds)
    spread = np.array(points).std(axis=0)
    assert spread[1] == pytest.approx(0.5, rel=0.1)
    assert spread[2] == pytest.approx(60, rel=0.2)  # (folded at the bounds)


def test_converges_and_says_so() -> None:
    _, result = ours("cma.cmaes", 5000)
    assert result.reason is Reason.CONVERGED
    assert result.best_loss < 1e-10
    assert "tol" in result.message


def test_a_flat_loss_ends_soon() -> None:
    x = torch.zeros(3, dtype=torch.float64)
    result = hybridopt.minimize(lambda x: (x * 0).sum() + 2, x, "cma.cmaes", budget=2000, seed=0)
    assert result.best_loss == 2
    assert result.evaluations < 2000


def test_a_budget_inside_a_generation_evaluates_what_fits() -> None:
    whole, _ = ours("cma.cmaes(popsize=8)", 100)
    for budget in (1, 7, 9, 37):
        points, result = ours("cma.cmaes(popsize=8)", budget)
        assert points == whole[:budget]
        assert result.evaluations == budget


def test_a_part_of_a_generation_may_be_nan() -> None:
    """Rejected members are ranked last; the others are told as they are."""
    calls: list[int] = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return rosenbrock(x) * (math.nan if len(calls) % 5 == 1 else 1.0)

    with pytest.warns(RuntimeWarning, match="rejected"):
        result = hybridopt.minimize(loss, torch.tensor(X0), "cma.cmaes", budget=1500, seed=1, batch="loop")
    assert result.best_loss < 0.05
    assert result.nonfinite == 300


def test_a_whole_generation_may_be_nan() -> None:
    """Then nothing was learnt, and the next one is drawn from the same distribution."""
    calls: list[int] = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return rosenbrock(x) * (math.nan if len(calls) <= 14 else 1.0)

    with pytest.warns(RuntimeWarning, match="rejected"):
        result = hybridopt.minimize(
            loss, torch.tensor(X0), "cma.cmaes(maxiter=2)", budget=1500, seed=1, batch="loop"
        )
    assert result.loss == result.best_loss < 100
    assert result.evaluations == 14 + 2 * 7

    with pytest.warns(RuntimeWarning, match="rejected"):
        nothing = hybridopt.minimize(
            lambda x: x.sum() * math.nan, torch.tensor(X0), "cma.cmaes(maxiter=2)", budget=1500, seed=1
        )
    assert nothing.loss == math.inf
    assert nothing.reason is Reason.NON_FINITE
    assert nothing.evaluations == 30 * 7


def test_writes_no_files_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ours("cma.cmaes", 5000)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_single_bounded_weight() -> None:
    """pycma 4.5 bails when it would limit the only standard deviation."""
    x = torch.zeros(1, dtype=torch.float64)
    result = hybridopt.minimize(
        lambda x: ((x - 1.9) ** 2).sum(), x, "cma.cmaes", budget=400, bounds=(-2, 2), seed=0
    )
    assert result.best_loss < 1e-6


@pytest.mark.parametrize(
    "options, text",
    [({"sigma": 0}, "expected sigma > 0, got 0"), ({"popsize": 1}, "expected popsize >= 2, got 1")],
)
def test_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(MethodError, match=f"cma.cmaes: {text}"):
        method("cma.cmaes", **options)
