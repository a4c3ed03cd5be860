"""Random and Sobol search: where their points lie, and that Sobol's go on where they stood."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest, qmc

import hybridopt
from hybridopt.errors import MethodError
from hybridopt.population.sampling import RandomSearch, SobolSearch
from hybridopt.testing import OptimizerContract
from tests.population.drive import begin, bowl, first

BOX = (-2.0, 6.0)


class TestContractRandom(OptimizerContract):
    method = RandomSearch(popsize=10)
    bounds = (-2.0, 2.0)
    random = True


class TestContractRandomUnbounded(OptimizerContract):
    method = RandomSearch(sigma=1.5)
    random = True


class TestContractSobol(OptimizerContract):
    method = SobolSearch(popsize=8)
    bounds = (-2.0, 2.0)
    random = True


class TestContractSobolUnbounded(OptimizerContract):
    method = SobolSearch(popsize=1, sigma=1.5)
    random = True


@pytest.mark.parametrize("kind", [RandomSearch, SobolSearch])
def test_the_distributions(kind: type[RandomSearch]) -> None:
    """Uniform in a box, normal about the start without; beside them the start, once."""
    boxed = np.concatenate(first(8, kind(popsize=256), bowl, [5.0, 1.0, 0.0], BOX))
    assert boxed[0].tolist() == [5.0, 1.0, 0.0]
    assert len(boxed) == 1 + 8 * 256
    free = np.concatenate(first(8, kind(popsize=256, sigma=3.0), bowl, [5.0, 1.0, 0.0]))
    for j, middle in enumerate([5.0, 1.0, 0.0]):
        assert kstest(boxed[1:, j], "uniform", args=(-2, 8)).pvalue > 0.01
        assert kstest(free[1:, j], "norm", args=(middle, 3)).pvalue > 0.01


def test_sobol_points_are_scipys() -> None:
    expected = qmc.Sobol(3, scramble=True, bits=32, rng=np.random.Generator(np.random.PCG64(3))).random(64)
    found = np.concatenate(first(4, SobolSearch(popsize=16), bowl, [0.5] * 3, (0.0, 1.0)))[1:]
    np.testing.assert_array_equal(found, expected)


def test_sobol_points_are_more_even() -> None:
    def unevenness(kind: type[RandomSearch]) -> float:
        points = np.concatenate(first(4, kind(popsize=64), bowl, [0.5, 0.5], (0.0, 1.0)))[1:]
        return float(qmc.discrepancy(points))

    assert unevenness(SobolSearch) < 0.2 * unevenness(RandomSearch)


@pytest.mark.parametrize("kind", [RandomSearch, SobolSearch])
def test_the_spread_of_weights_without_bounds(kind: type[RandomSearch]) -> None:
    """The option, what was handed over, or 0.5; a single bound clips; a boxed weight stays uniform beside them."""
    for strategy, rng, expected in [
        (*begin(kind(popsize=4096), [0.0]), 0.5),
        (*begin(kind(popsize=4096), [0.0], sigma=2.0), 2.0),
        (*begin(kind(popsize=4096, sigma=4.0), [0.0], sigma=2.0), 4.0),
    ]:
        assert strategy.ask(rng).std() == pytest.approx(expected, rel=0.05)
    strategy, rng = begin(kind(popsize=4096), [0.0, 0.0], (0.0, np.inf))
    strategy.start.upper[1] = 7.0
    again = kind(popsize=4096).begin(strategy.start, rng)
    x = again.ask(rng)
    assert x.min() == 0
    assert 0.4 < (x[:, 0] == 0).mean() < 0.6
    assert x[:, 1].std() == pytest.approx(7 / np.sqrt(12), rel=0.05)


@pytest.mark.parametrize("kind", [RandomSearch, SobolSearch])
def test_never_outside_the_unit_interval(kind: type[RandomSearch]) -> None:
    """0 and 1 have infinite quantiles."""
    strategy, rng = begin(kind(), [0.0, 0.0])
    strategy.draw = lambda rng: np.array([[0.0, 1.0], [0.5, 1 - 2.0**-53]])
    x = strategy.ask(rng)
    assert np.isfinite(x).all()
    assert np.abs(x).max() < 5


def test_refuses() -> None:
    with pytest.raises(MethodError, match=r"sobol: expected a power of 2 as popsize, got 12"):
        SobolSearch(popsize=12)
    with pytest.raises(
        MethodError, match=r"sobol: expected at most 21201 weights, got 21202; use random_search"
    ):
        hybridopt.minimize(lambda x: float(x.sum()), np.zeros(21202), SobolSearch(), budget=5)
    with pytest.raises(MethodError, match=r"random_search: expected a positive finite sigma, got -1.0"):
        RandomSearch(sigma=-1.0)
    with pytest.raises(MethodError, match=r"random_search: expected popsize >= 1, got 0"):
        RandomSearch(popsize=0)
