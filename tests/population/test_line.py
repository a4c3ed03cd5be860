"""STEP along the coordinates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hybridopt
from hybridopt import Reason
from hybridopt.errors import BoundsError, MethodError
from hybridopt.population.line import CoordinateSearch, _Line
from hybridopt.testing import OptimizerContract


class TestCoordinateSearch(OptimizerContract):
    method = hybridopt.method("coordinate_search")
    bounds = (-2.0, 2.0)
    random = False


def rastrigin(x: np.ndarray) -> float:
    """Minimum 0 at 1.3, ten local minima a coordinate."""
    z = x - 1.3
    return float((z**2 - 10 * np.cos(2 * np.pi * z) + 10).sum())


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_a_separable_loss_is_minimised_one_weight_at_a_time(n: int) -> None:
    x0 = np.random.default_rng(n).uniform(-4, 4, n)
    result = hybridopt.minimize(rastrigin, x0, "coordinate_search", bounds=(-5, 5), budget=250 * n, seed=0)
    assert result.best_loss < 1e-6


def test_turns_serve_every_coordinate() -> None:
    """After k rounds every coordinate has been looked at k times."""
    seen: list[np.ndarray] = []

    def loss(x: np.ndarray) -> float:
        seen.append(x.copy())
        return rastrigin(x)

    hybridopt.minimize(loss, np.zeros(4), "coordinate_search", bounds=(-5, 5), budget=41, seed=0)
    values = [len(np.unique(np.array(seen)[:, i])) for i in range(4)]
    assert values == [11] * 4


def test_intervals() -> None:
    """The ends first; then in turn the lowest three points' parabola and the interval whose parabola is flattest."""
    line = _Line(CoordinateSearch(gain=1e-3), 1.0, 5.0, 0.0, 4.0)
    assert line.next() == 0.0
    line.add(0.0, 9.0)
    assert line.next() == 4.0
    line.add(4.0, 6.0)
    # through (0, 9), (1, 5), (4, 6): slopes -4 and 1/3, so 13/12 x² - 61/12 x + 9
    lowest = 61 / 26
    assert line.next() == pytest.approx(lowest, rel=1e-14)
    line.add(line.next(), 4.5)
    # spread 4.5, goal 4.4955: (1, 2.35) of width 1.35 against (2.35, 4) of width 1.65 and higher
    assert line.next() == pytest.approx((1.0 + lowest) / 2)
    line.add(line.next(), 4.0)
    assert line.best == 4.0
    assert line.x == pytest.approx([0.0, 1.0, (1.0 + lowest) / 2, lowest, 4.0])
    assert line.next() not in ((0.0 + 1.0) / 2, (lowest + 4.0) / 2)


def test_a_smooth_minimum_takes_few_evaluations() -> None:
    """A parabola's minimum at once, after the start and the ends."""
    seen: list[float] = []

    def loss(x: np.ndarray) -> float:
        seen.append(float(x[0]))
        return float((x[0] - 0.3) ** 2)

    hybridopt.minimize(loss, np.zeros(1), "coordinate_search", bounds=(-5, 5), budget=4, seed=0)
    assert seen[:3] == [0.0, -5.0, 5.0]
    assert seen[3] == pytest.approx(0.3, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_it_ends_where_the_loss_is_no_sum(n: int) -> None:
    """After n + 2 evaluations; a sum it goes on to minimise."""
    x0 = np.random.default_rng(n).uniform(-4, 4, n)

    def no_sum(x: np.ndarray) -> float:
        return rastrigin(x) + 1e-3 * float(x.sum()) ** 2

    kept = hybridopt.minimize(
        rastrigin, x0, "coordinate_search(separable=true)", bounds=(-5, 5), budget=250 * n, seed=0
    )
    assert kept.best_loss < 1e-6
    left = hybridopt.minimize(
        no_sum, x0, "coordinate_search(separable=true)", bounds=(-5, 5), budget=250 * n, seed=0
    )
    assert (left.reason is Reason.STALLED and left.evaluations == n + 2) == (n > 1)


def test_it_ends_where_no_coordinate_can_be_improved() -> None:
    result = hybridopt.minimize(
        lambda x: float((x**2).sum()),
        np.array([1.5, -0.7]),
        "coordinate_search",
        bounds=(-2, 2),
        budget=5000,
        seed=0,
    )
    assert result.reason is Reason.CONVERGED
    assert result.best_loss < 1e-10
    assert result.evaluations < 4000


def test_a_start_on_a_bound() -> None:
    result = hybridopt.minimize(
        rastrigin, np.array([-5.0, 5.0]), "coordinate_search", bounds=(-5, 5), budget=500, seed=0
    )
    assert result.best_loss < 1e-6


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"difficulty": -1.0}, {"gain": np.inf}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="expected a positive finite"):
        CoordinateSearch(**options)


def test_it_needs_a_box() -> None:
    with pytest.raises(BoundsError, match="coordinate_search: expected finite bounds"):
        hybridopt.minimize(rastrigin, np.zeros(2), "coordinate_search", budget=9, seed=0)


def test_ends_without_a_finite_loss() -> None:
    def loss(x: np.ndarray) -> float:
        return float("nan") if abs(x).max() > 4 else rastrigin(x)

    with pytest.warns(RuntimeWarning):
        result = hybridopt.minimize(
            loss, np.full(2, 3.0), "coordinate_search", budget=600, bounds=(-5, 5), seed=0
        )
    assert result.best_loss < 1e-4
