"""CMA-ES with Margin: what it promises of each whole number, and what it is good for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import norm

from hybridopt.coordinates import cells
from hybridopt.population import CMAES
from hybridopt.population._margin import Margin
from hybridopt.population.cmaes import Search
from hybridopt.start import Start
from tests.population.drive import Floats


def mixed(x0: Any, integer: Any, low: float = -10, high: float = 10, log: Any = None) -> Start:
    x = np.array(x0, dtype=float)
    whole = np.array(integer)
    first, last = np.where(whole, low - 0.5, -math.inf), np.where(whole, high + 0.5, math.inf)
    if log is not None:
        first, last = np.where(log, np.log(first), first), np.where(log, np.log(last), last)
    return Start(x, first, last, np.full(len(x), 2.0**-52), 3, integer=whole, log=log)


@given(st.data())
def test_every_neighbour_keeps_its_probability(data: st.DataObject) -> None:
    """1 / (n popsize) for the one neighbour of an outermost number, half of that for each of two."""
    n = data.draw(st.integers(1, 6))
    high = data.draw(st.sampled_from([1, 2, 30]))
    log = np.full(n, True) if data.draw(st.booleans()) else None
    low = 1 if log is not None else 0
    popsize = data.draw(st.integers(4, 50))
    start = mixed(np.ones(n), np.full(n, True), low, low + high, log)
    scale = np.array(data.draw(st.lists(st.floats(0.1, 10), min_size=n, max_size=n)))
    mean = np.array(data.draw(st.lists(st.floats(-5, 40), min_size=n, max_size=n))) / scale
    stds = np.array(data.draw(st.lists(st.floats(1e-6, 30), min_size=n, max_size=n))) / scale
    moved, factors = Margin(start, scale).keep(mean, stds, popsize)
    assert (factors > 0).all()
    alpha = 1 / (n * popsize)
    for j in range(n):
        here = float(np.clip(mean[j] * scale[j], start.lower[j] + 1e-9, start.upper[j] - 1e-9))
        ends = cells(np.full(n, here), start.log)
        m, s = moved[j] * scale[j], stds[j] * factors[j] * scale[j]
        below, above = ndtr((ends[0][j] - m) / s), ndtr((m - ends[1][j]) / s)
        at_first, at_last = ends[0][j] <= start.lower[j] + 1e-6, ends[1][j] >= start.upper[j] - 1e-6
        if at_first:
            assert above >= alpha * (
                1 - 1e-6
            )  # rounding of the mean, of order 1e-15, over deviations from 1e-6
        elif at_last:
            assert below >= alpha * (1 - 1e-6)
        else:
            assert min(below, above) >= alpha / 2 * (1 - 1e-6)


def test_a_wide_distribution_is_left_alone() -> None:
    start = mixed([0.2, 3.4, 10.0, 5.0], [True, True, True, False])
    mean, stds = start.x0, np.array([2.0, 0.8, 1.0, 1e-9])
    moved, factors = Margin(start, np.ones(4)).keep(mean, stds, 10)
    np.testing.assert_array_equal(moved, mean)
    np.testing.assert_array_equal(factors, 1.0)


def test_a_narrow_one_is_widened_about_its_cell() -> None:
    """Both neighbours at alpha / 2 = 1 / 40, symmetric: the mean in the middle, the cell 2 × 1.96 deviations wide."""
    start = mixed([3.0], [True])
    moved, factors = Margin(start, np.ones(1)).keep(np.array([3.0]), np.array([1e-4]), 20)
    assert moved[0] == pytest.approx(3.0)
    assert factors[0] * 1e-4 == pytest.approx(1 / (2 * norm.isf(0.025)), rel=1e-9)
    # at the end the deviation stays, and the mean comes as near to the threshold as it takes
    moved, factors = Margin(start, np.ones(1)).keep(np.array([12.0]), np.array([1e-4]), 20)
    assert factors[0] == 1
    assert moved[0] == pytest.approx(9.5 + norm.isf(0.05) * 1e-4, rel=1e-12)


def solve(seed: int, margin: bool = True, **options: Any) -> tuple[float, str]:
    """Lowest loss of an ellipsoid whose steep axes are 5 of 10 weights that are whole."""
    integer = np.arange(10) >= 5
    start = mixed(np.random.default_rng(seed).uniform(1, 3, 10), integer)
    search, rng = Search(CMAES(sigma=1.0, **options), start), np.random.default_rng(seed)
    if not margin:
        search.margin = None
    best, evaluations = math.inf, 0
    while evaluations < 6000 and best > 1e-10:
        x = search.ask(rng)
        evaluations += len(x)
        w: Floats = np.where(integer, np.rint(x), x)
        losses = (1e6 ** (np.arange(10)[::-1] / 9) * w**2).sum(1)
        best = min(best, float(losses.min()))
        ending = search.tell(x, losses, rng)
        if ending is not None:
            return best, ending.message
    return best, ""


def test_it_solves_what_settles_on_wrong_numbers_without() -> None:
    assert sum(solve(seed)[0] <= 1e-10 for seed in range(5)) == 5
    assert sum(solve(seed, margin=False)[0] <= 1e-10 for seed in range(5)) == 0


@pytest.mark.parametrize("options", [{"covariance": "separable"}, {"learning_rate_adaptation": True}])
def test_the_other_forms_keep_it_too(options: Any) -> None:
    integer = np.array([True, True, False])
    start = mixed([2.0, 0.4, 1.0], integer)
    search, rng = Search(CMAES(sigma=1.0, **options), start), np.random.default_rng(0)
    for _ in range(60):
        x = search.ask(rng)
        w = np.where(integer, np.rint(x), x)
        if search.tell(x, (w**2).sum(1), rng) is not None:
            break
        assert search.margin is not None
        stds = search.sigma * search.shape.deviations() * search.stretch
        again, factors = search.margin.keep(search.mean, stds, search.popsize)
        np.testing.assert_allclose(again, search.mean, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(factors, 1.0, rtol=1e-6)


def test_whole_numbers_alone_end_when_nothing_changes_any_more() -> None:
    start = mixed([7.0, -4.0], [True, True])
    search, rng = Search(CMAES(sigma=2.0), start), np.random.default_rng(0)
    for _ in range(2000):
        x = search.ask(rng)
        ending = search.tell(x, (np.rint(x) ** 2).sum(1), rng)
        if ending is not None:
            break
    assert ending is not None
    assert ending.loss == 0
    assert "losses" in ending.message


def test_what_lies_beyond_the_outermost_number_is_clipped_not_mirrored() -> None:
    start = mixed([9.0, 0.0], [True, False], -10, 10)
    search = Search(CMAES(sigma=1.0), start)
    x = search.space.inside(np.array([[14.0, 99.0], [-30.0, 0.0], [3.3, 0.0]]))
    np.testing.assert_array_equal(x, [[10.5, 99.0], [-10.5, 0.0], [3.3, 0.0]])


def test_it_converges_when_the_other_weights_have() -> None:
    """A whole number's deviation never gets small, and does not keep the search from its end."""
    start = mixed([2.0, 0.4, 1.0], [True, True, False])
    search, rng = Search(CMAES(sigma=1.0, tolfun=0, tolfunhist=0), start), np.random.default_rng(0)
    for _ in range(2000):
        x = search.ask(rng)
        ending = search.tell(x, np.rint(x[:, 0]) ** 2 + np.rint(x[:, 1]) ** 2 + np.abs(x[:, 2]) ** 0.5, rng)
        if ending is not None:
            break
    assert ending is not None
    assert "tolx" in ending.message


@pytest.mark.parametrize("slower", [False, True])
def test_the_mean_moves_by_the_steps_that_were_drawn(slower: bool) -> None:
    """Stretched threefold, the same generation moves the mean three times as far."""
    moved = []
    for stretch in (1.0, 3.0):
        search = Search(CMAES(sigma=1.0, learning_rate_adaptation=slower), mixed([2.0, 1.0], [True, False]))
        assert search.stretch is not None
        search.stretch[0] = stretch
        search.margin = None
        before, rng = search.mean.copy(), np.random.default_rng(0)
        x = search.ask(rng)
        search.tell(x, np.arange(len(x), dtype=float), rng)
        moved.append(search.mean - before)
    np.testing.assert_allclose(moved[1], moved[0] * [3, 1], rtol=1e-12)
