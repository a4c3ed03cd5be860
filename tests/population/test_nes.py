"""SNES and xNES: one generation against their equations, laws, size, and how they begin and end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.linalg import expm

from hybridopt import Reason
from hybridopt.errors import MethodError
from hybridopt.population._common import mirror, share_by_rank
from hybridopt.population.nes import SNES, XNES, utilities
from hybridopt.start import Start
from hybridopt.testing import OptimizerContract
from tests.population.drive import begin, bowl, first, generations, solved, valley

BOX = (-2.0, 2.0)


class TestContractSNES(OptimizerContract):
    method = SNES()
    random = True


class TestContractSNESBounded(OptimizerContract):
    method = SNES(popsize=6)
    bounds = BOX
    random = True


class TestContractXNES(OptimizerContract):
    method = XNES()
    random = True


class TestContractXNESBounded(OptimizerContract):
    method = XNES(popsize=6)
    bounds = BOX
    random = True


def test_utilities() -> None:
    """Four points: ln 3 - ln k for the first two, 0 for the rest, as shares, less 1/4."""
    raw = [math.log(3), math.log(3) - math.log(2), 0, 0]
    assert utilities(4).tolist() == pytest.approx([r / sum(raw) - 0.25 for r in raw])
    assert all(abs(utilities(k).sum()) < 1e-15 for k in (2, 3, 10, 45))


def test_equal_losses_share() -> None:
    shared = share_by_rank(np.array([math.inf, 1.0, 1.0, math.inf, 0.0]), np.array([9.0, 4.0, 2.0, 1.0, 0.0]))
    assert shared.tolist() == [0.5, 3.0, 3.0, 0.5, 9.0]


def test_snes_generations_written_out() -> None:
    """Algorithm 6 of Wierstra et al. 2014, weight by weight."""
    n = 3
    strategy, rng = begin(SNES(sigma=0.5), [1.0, -1.0, 2.0], loss=7.0)
    other = np.random.Generator(np.random.PCG64(3))
    mu, sigma = np.array([1.0, -1.0, 2.0]), np.full(n, 0.5)
    popsize = 4 + int(3 * math.log(n))
    eta = (3 + math.log(n)) / (5 * math.sqrt(n))
    for _ in range(6):
        s = other.standard_normal((popsize, n))
        x = mu + sigma * s
        asked = strategy.ask(rng)
        np.testing.assert_allclose(asked, x, rtol=1e-12)
        order = np.argsort(valley(x))
        raw = [max(0.0, math.log(popsize / 2 + 1) - math.log(k)) for k in range(1, popsize + 1)]
        u = [r / sum(raw) - 1 / popsize for r in raw]
        new_mu, new_sigma = mu.copy(), sigma.copy()
        for j in range(n):
            new_mu[j] += sigma[j] * sum(u[k] * s[order[k], j] for k in range(popsize))
            new_sigma[j] *= math.exp(eta / 2 * sum(u[k] * (s[order[k], j] ** 2 - 1) for k in range(popsize)))
        mu, sigma = new_mu, new_sigma
        strategy.tell(asked, valley(asked), rng)
        np.testing.assert_allclose(strategy.mu, mu, rtol=1e-10)
        np.testing.assert_allclose(strategy.sigma, sigma, rtol=1e-10)


def test_xnes_generations_written_out() -> None:
    """Algorithm 5 of Wierstra et al. 2014, with scipy's matrix exponential."""
    n = 3
    strategy, rng = begin(XNES(sigma=0.5), [1.0, -1.0, 2.0], loss=7.0)
    other = np.random.Generator(np.random.PCG64(3))
    mu, sigma, B = np.array([1.0, -1.0, 2.0]), 0.5, np.eye(n)
    popsize = 4 + int(3 * math.log(n))
    eta = (9 + 3 * math.log(n)) / (5 * n * math.sqrt(n))
    for _ in range(6):
        s = other.standard_normal((popsize, n))
        x = np.array([mu + sigma * B @ row for row in s])
        asked = strategy.ask(rng)
        np.testing.assert_allclose(asked, x, rtol=1e-12)
        ranked = s[np.argsort(valley(x))]
        u = utilities(popsize)
        G_delta = sum(u[k] * ranked[k] for k in range(popsize))
        G_M = sum(u[k] * (np.outer(ranked[k], ranked[k]) - np.eye(n)) for k in range(popsize))
        G_sigma = np.trace(G_M) / n
        G_B = G_M - G_sigma * np.eye(n)
        mu = mu + sigma * B @ G_delta
        sigma = sigma * math.exp(eta / 2 * G_sigma)
        B = B @ expm(eta / 2 * G_B)
        strategy.tell(asked, valley(asked), rng)
        np.testing.assert_allclose(strategy.mu, mu, rtol=1e-10)
        np.testing.assert_allclose(strategy.sigma, sigma, rtol=1e-10)
        np.testing.assert_allclose(strategy.B, B, rtol=1e-9, atol=1e-12)
    assert np.linalg.det(strategy.B) == pytest.approx(1)


@pytest.mark.parametrize("kind", [SNES, XNES])
@pytest.mark.parametrize("box", [None, BOX])
def test_only_the_order_of_losses_counts(kind: Any, box: Any) -> None:
    plain = first(30, kind(), valley, [-1.2, 1.0], box)
    bent = first(30, kind(), lambda x: np.log1p(valley(x)) ** 3 - 7, [-1.2, 1.0], box)
    for a, b in zip(plain, bent, strict=True):
        np.testing.assert_array_equal(a, b)


def test_xnes_sees_no_axes() -> None:
    """A rotated bowl is solved as fast as one along the axes; SNES, which sees axes, is not as good on it."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    long = lambda x: (10.0 ** np.arange(6) * (x @ turn) ** 2).sum(axis=1)  # noqa: E731
    assert solved(XNES(sigma=1.0), long, 6, 6000, 1e-6, seeds=5) == 5
    assert solved(SNES(sigma=1.0), long, 6, 6000, 1e-6, seeds=5) == 0


@pytest.mark.parametrize("kind", [SNES, XNES])
def test_the_start_is_evaluated_beside_the_first_generation(kind: Any) -> None:
    """It changes nothing that is learnt, and is left out where its loss is known."""
    unknown, rng = begin(kind(), [1.0, 2.0])
    known, other = begin(kind(), [1.0, 2.0], loss=3.0)
    x, y = unknown.ask(rng), known.ask(other)
    assert x[0].tolist() == [1.0, 2.0]
    np.testing.assert_array_equal(x[1:], y)
    unknown.tell(x, valley(x), rng)
    known.tell(y, valley(y), other)
    np.testing.assert_array_equal(unknown.mu, known.mu)
    np.testing.assert_array_equal(unknown.ask(rng), known.ask(other))


def test_the_first_spread() -> None:
    """As handed over; else 0.3 × the range, 0.5 without bounds; ranges that differ make a B of determinant 1."""
    for kind in (SNES, XNES):
        assert begin(kind(), [0.0], sigma=0.07)[0].width() == pytest.approx(0.07)
        assert begin(kind(sigma=0.2), [0.0], sigma=0.07)[0].width() == pytest.approx(0.2)
        assert begin(kind(), [0.0])[0].width() == 0.5
        assert begin(kind(), [0.0], BOX)[0].width() == pytest.approx(1.2)
    strategy, _ = begin(XNES(), [0.0, 0.0], BOX)
    strategy.start.upper[1] = 98.0
    again = XNES().begin(strategy.start, np.random.default_rng(0))
    assert np.linalg.det(again.B) == pytest.approx(1)  # type: ignore[attr-defined]
    np.testing.assert_allclose(again.sigma * np.diag(again.B), [1.2, 30.0])  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [SNES, XNES])
def test_an_optimum_on_the_wall(kind: Any) -> None:
    seen = list(generations(kind(), lambda x: bowl(x + 3.5), [1.0, 0.5], BOX))
    points = np.concatenate([x for x, _, _ in seen])
    assert np.abs(points).max() <= 2
    assert min(told.min() for _, told, _ in seen) <= 3 * (1 + 1e-6), "(1 + 2) * 1 in the corner"


def test_mirror() -> None:
    """At both walls as often as it takes; at a single one; not without."""
    start = Start(
        np.zeros(4), np.array([-2, -2, -np.inf, -np.inf]), np.array([2, np.inf, 2, np.inf]), np.zeros(4), 0
    )
    points = np.array(
        [[3.0, 3.0, 3.0, 3.0], [-7.0, -7.0, -7.0, -7.0], [0.5, 0.5, 0.5, 0.5], [21.0, -2.0, 2.0, 9.0]]
    )
    expected = [[1.0, 3.0, 1.0, 3.0], [1.0, 3.0, -7.0, -7.0], [0.5, 0.5, 0.5, 0.5], [-1.0, -2.0, 2.0, 9.0]]
    assert mirror(start, points).tolist() == expected


def test_xnes_mirrors_at_the_walls() -> None:
    strategy, rng = begin(XNES(popsize=50), [1.9], BOX, loss=1.0)
    x = strategy.ask(rng)[:, 0]
    free = 1.9 + strategy.z[:, 0] * 1.2
    outside = (free > 2) & (free < 6)
    assert outside.sum() > 10
    np.testing.assert_allclose(x[outside], 4 - free[outside])


def test_clipped_noise_is_the_noise_learnt() -> None:
    """Of a weight whose samples are all clipped to the wall nothing is learnt."""
    strategy, rng = begin(SNES(popsize=4), [2.0, 0.0], BOX, loss=1.0)
    x = strategy.ask(rng)
    x[:, 0] = 2.0
    strategy.tell(x, bowl(x), rng)
    assert strategy.sigma[0] == 1.2
    assert strategy.mu[0] == 2.0
    assert strategy.sigma[1] != 1.2


def test_the_mean_of_snes_stays_inside() -> None:
    strategy, rng = begin(SNES(popsize=4), [1.5], BOX, loss=1.0)
    for _ in range(20):
        x = strategy.ask(rng)
        strategy.tell(x, -x[:, 0], rng)
        assert strategy.mu[0] <= 2
    assert strategy.mu[0] > 1.99


def test_state_of_snes_is_two_numbers_a_weight() -> None:
    strategy, rng = begin(SNES(), np.zeros(1000))
    x = strategy.ask(rng)
    strategy.tell(x, bowl(x), rng)
    assert sum(v.numel() for v in strategy.state_dict().values() if hasattr(v, "numel")) == 2000


@pytest.mark.parametrize("kind", [SNES, XNES])
def test_ends(kind: Any) -> None:
    *_, last = generations(kind(), bowl, [1.0, 1.0])
    assert last[2].reason is Reason.CONVERGED
    assert "tolfun" in last[2].message
    *_, last = generations(kind(tolfun=0, tolx=1e-3), bowl, [1.0, 1.0])
    assert last[2].reason is Reason.CONVERGED
    assert "tolx" in last[2].message
    flat = list(generations(kind(patience=7), lambda x: np.full(len(x), 3.0), [1.0, 1.0]))
    assert len(flat) == 7
    assert flat[-1][2].reason is Reason.STALLED
    np.testing.assert_allclose(np.concatenate([x for x, _, _ in flat]).mean(axis=0), 1.0, atol=0.4)


def test_solves() -> None:
    assert solved(SNES(), bowl, 5, 1200, 1e-6) == 10
    assert solved(SNES(), bowl, 50, 12000, 1e-3, seeds=3) == 3
    assert solved(XNES(), bowl, 5, 2000, 1e-6) == 10
    assert solved(XNES(), valley, 2, 3000, 1e-6) == 10
    assert solved(XNES(), valley, 5, 8000, 1e-6, seeds=5) >= 4


def test_refuses() -> None:
    with pytest.raises(MethodError, match=r"snes: expected a positive finite sigma, got 0.0"):
        SNES(sigma=0.0)
    with pytest.raises(MethodError, match=r"xnes: expected a positive finite eta_b, got -1.0"):
        XNES(eta_b=-1.0)
    with pytest.raises(MethodError, match=r"xnes: expected popsize >= 2, got 1"):
        XNES(popsize=1)


@pytest.mark.parametrize("method", [SNES(), XNES()], ids=str)
def test_a_loss_without_a_minimum_ends_the_search(method: SNES | XNES) -> None:
    *_, (_, _, step) = generations(method, lambda x: x.sum(axis=1), np.zeros(3))
    assert step.reason is Reason.STALLED
    assert "the step size grew 10000-fold" in step.message
