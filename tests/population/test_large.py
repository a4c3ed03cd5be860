"""Distributions over many weights: compiled loops draw normal numbers, and sum up the same bits as NumPy."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import hybridopt
from hybridopt.engines._translate import Untranslatable
from hybridopt.optimizer import Answer
from hybridopt.population import CMAES, PGPE, SNES, _large
from hybridopt.population._large import MANY, fill_normal, weighted_moments
from hybridopt.start import Start


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """As in a process that has loaded none."""
    _large._kernels.cache_clear()
    yield
    _large._kernels.cache_clear()


def drawn(rows: int, n: int, seed: int = 0) -> np.ndarray:
    out = np.full((rows, n), np.nan)
    fill_normal(np.random.default_rng(seed), out)
    return out


def test_they_are_standard_normal() -> None:
    z = drawn(8, 250_000)
    size = z.size
    assert np.isfinite(z).all()
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    for moment, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((z**moment).mean() - expected) < 4 * math.sqrt(spread / size), moment
    beyond = (abs(z) > 4).sum()
    expected = 2 * stats.norm.sf(4) * size
    assert abs(beyond - expected) < 4 * math.sqrt(expected)
    assert abs(z).max() < 6.77, "two words of 32 bits reach sqrt(2 log 2^33)"


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("distance", [1, 2, 1023, 1024, 2048])
def test_neighbours_halves_and_rows_are_independent(distance: int, power: int) -> None:
    z = drawn(4, 200_000) ** power
    a, b = z[:, :-distance].ravel(), z[:, distance:].ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(a.size)
    for k in range(3):
        assert abs(np.corrcoef(z[k], z[k + 1])[0, 1]) < 4 / math.sqrt(z.shape[1])


def test_columns_are_independent_from_row_to_row() -> None:
    """The same place under many keys."""
    z = drawn(3000, MANY)[:, :40]
    off = np.abs(np.corrcoef(z.T) - np.eye(40)).max()
    assert off < 5 / math.sqrt(3000)
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3


def test_the_seed_decides_and_every_place_is_written() -> None:
    for n in (MANY, MANY + 1, 5000, 6143, 6144, 6145):
        z = drawn(2, n)
        assert np.isfinite(z).all(), n
        np.testing.assert_array_equal(z, drawn(2, n))
        np.testing.assert_array_equal(z[:, :MANY], drawn(2, MANY), "a place's number does not depend on n")
        assert (z != drawn(2, n, seed=1)).mean() > 0.999
        assert len(np.unique(z)) > 0.999 * z.size


@pytest.mark.parametrize("n", [MANY, 6144, 9217])
def test_the_same_bits_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    rng = np.random.default_rng(0)
    x, mu, sigma = rng.normal(size=(7, n)), rng.normal(size=n), rng.uniform(0.1, 2, n)
    results, seen = [], set[int]()
    monkeypatch.setattr(_large, "PARALLEL_FROM", 1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 64):
            torch.set_num_threads(threads)
            z = np.full((7, n), np.nan)
            fill_normal(np.random.default_rng(1), z, mu, sigma)
            results.append((z, *weighted_moments(x, mu, sigma, mu[:7])))
            _large._in_parts(z, lambda first, last: seen.add(threading.get_ident()))
    finally:
        torch.set_num_threads(before)
    assert len(seen) > 1
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            np.testing.assert_array_equal(one, other)


def test_one_call_or_one_for_each_row() -> None:
    rng, z = np.random.default_rng(0), np.empty((3, 5000))
    for k in range(3):
        fill_normal(rng, z[k : k + 1])
    np.testing.assert_array_equal(z, drawn(3, 5000))


def test_few_weights_are_drawn_by_numpy() -> None:
    expected = np.random.default_rng(0).standard_normal((3, MANY - 1))
    np.testing.assert_array_equal(drawn(3, MANY - 1), expected)


def test_moments_are_the_same_bits_as_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for n in (MANY, 5000, 9217):
        x, mu, sigma = rng.normal(size=(7, n)), rng.normal(size=n), rng.uniform(0.1, 2, n)
        weights = rng.normal(size=7)
        found = weighted_moments(x, mu, sigma, weights)
        monkeypatch.setattr(_large, "MANY", n + 1)
        expected = weighted_moments(x, mu, sigma, weights)
        monkeypatch.setattr(_large, "MANY", MANY)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        z = (x - mu) / sigma
        np.testing.assert_allclose(found[1], weights @ z**2, rtol=1e-9, atol=1e-9)


def test_without_a_compiler_numpy_does_it_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise Untranslatable("no compiler")

    monkeypatch.setattr(_large, "load", fails)
    with pytest.warns(UserWarning, match="drawn by NumPy: no compiler"):
        z = drawn(2, MANY)
    np.testing.assert_array_equal(z, np.random.default_rng(0).standard_normal((2, MANY)))
    drawn(2, MANY)  # one warning


@pytest.mark.parametrize("method", [SNES(), PGPE(), CMAES(covariance="separable")], ids=str)
def test_a_run_of_many_weights_resumes_bit_for_bit(method: Any) -> None:
    target = torch.linspace(-1, 1, 5000, dtype=torch.float64)

    def run() -> Any:
        weights = torch.zeros(5000, dtype=torch.float64)
        return hybridopt.Run(lambda w: ((w - target) ** 2).mean(), weights, method, budget=600, seed=3)

    with run() as whole:
        for _ in range(7):
            whole.step()
        state = whole.state_dict()
        expected = [whole.step().loss for _ in range(3)]
    with run() as resumed:
        resumed.load_state_dict(state)
        assert [resumed.step().loss for _ in range(3)] == expected


def test_memory_is_taken_again_only_when_nobody_holds_it() -> None:
    room = _large.Room(Start(*np.zeros((4, 3)), 0))
    at = room.take(2, 3).ctypes.data
    assert room.take(2, 3).ctypes.data == at
    held = room.take(2, 3)
    other = room.take(2, 3)
    assert other is not held
    del held, other
    view = room.take(2, 3)[1:]
    assert not np.shares_memory(room.take(2, 3), view)
    tensor = torch.from_numpy(room.take(2, 3))
    assert not np.shares_memory(room.take(2, 3), tensor.numpy())
    assert room.take(3, 3).shape == (3, 3)


@pytest.mark.parametrize("method", [SNES(popsize=6), PGPE(popsize=6)], ids=str)
def test_generations_that_a_caller_keeps_stay_as_they_were(method: Any) -> None:
    run = method.start(hybridopt.ParameterVector(torch.zeros(3)), 0)
    kept, copies = [], []
    for _ in range(4):
        x = run.ask().x
        kept.append(x)
        copies.append(x.copy())
        run.tell(Answer(losses=(x**2).sum(1)))
    for one, other in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(one, other)
