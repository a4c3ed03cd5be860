"""Differential evolution: a generation written out as in the paper, its memory, reduction, and ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import hybridopt
from hybridopt import Reason
from hybridopt.errors import BoundsError, MethodError
from hybridopt.population.de import DifferentialEvolution
from hybridopt.testing import OptimizerContract
from tests.population.drive import Floats, begin, bowl, first, generations, rastrigin, solved, valley

BOX = (-2.0, 2.0)


class TestContract(OptimizerContract):
    method = DifferentialEvolution()
    random = True
    budget = 1000.0


class TestContractReduced(OptimizerContract):
    method = DifferentialEvolution(reduce_over=60)
    random = True
    budget = 1000.0


def lehmer(values: list[float], gains: list[float]) -> float:
    w = [g / sum(gains) for g in gains]
    return sum(a * s * s for a, s in zip(w, values, strict=True)) / sum(
        a * s for a, s in zip(w, values, strict=True)
    )


class Paper:
    """L-SHADE for one generation at a time, point by point, from the same random numbers."""

    def __init__(self, x: Floats, losses: Floats, memory: int) -> None:
        self.x, self.losses = x.copy(), losses.copy()
        self.memory_F, self.memory_CR, self.k = [0.5] * memory, [0.5] * memory, 0
        self.archive: list[Floats] = []
        self.walls: set[float] = set()

    def trials(self, rng: np.random.Generator) -> Floats:
        N, n = self.x.shape
        H = len(self.memory_F)
        r = rng.integers(H, size=N)
        normal = rng.standard_normal(N)
        self.CR = [
            0.0 if self.memory_CR[r[i]] is None else self.memory_CR[r[i]] + 0.1 * normal[i] for i in range(N)
        ]
        self.CR = [min(1.0, max(0.0, c)) for c in self.CR]
        self.F = [0.0] * N
        while any(f <= 0 for f in self.F):
            again = [i for i in range(N) if self.F[i] <= 0]
            for i, cauchy in zip(again, rng.standard_cauchy(len(again)), strict=True):
                self.F[i] = self.memory_F[r[i]] + 0.1 * cauchy
        self.F = [min(1.0, f) for f in self.F]
        by_loss = sorted(range(N), key=lambda i: self.losses[i])
        pbest = rng.choice(by_loss[: max(2, round(0.11 * N))], N)
        one, two = rng.integers(N - 1, size=N), rng.integers(N + len(self.archive) - 2, size=N)
        uniform, sure = rng.random((N, n)), rng.integers(n, size=N)
        everybody = [*self.x, *self.archive]
        u = np.empty((N, n))
        for i in range(N):
            r1 = [k for k in range(N) if k != i][one[i]]
            r2 = [k for k in range(len(everybody)) if k not in (i, r1)][two[i]]
            for j in range(n):
                pull = self.x[pbest[i], j] - self.x[i, j] + self.x[r1, j] - everybody[r2][j]
                v = self.x[i, j] + self.F[i] * pull
                if abs(v) > 2:
                    wall = math.copysign(2, v)
                    self.walls.add(wall)
                    v = (wall + self.x[i, j]) / 2
                u[i, j] = v if uniform[i, j] < self.CR[i] or j == sure[i] else self.x[i, j]
        return u

    def select(self, u: Floats, losses: Floats) -> None:
        S_F, S_CR, gain = [], [], []
        for i in range(len(u)):
            if losses[i] < self.losses[i]:
                self.archive.append(self.x[i].copy())
                S_F.append(self.F[i])
                S_CR.append(self.CR[i])
                gain.append(self.losses[i] - losses[i])
            if losses[i] <= self.losses[i]:
                self.x[i], self.losses[i] = u[i], losses[i]
        if S_F:
            terminal = self.memory_CR[self.k] is None or max(S_CR) == 0
            self.memory_F[self.k] = lehmer(S_F, gain)
            self.memory_CR[self.k] = None if terminal else lehmer(S_CR, gain)
            self.k = (self.k + 1) % len(self.memory_F)


@pytest.mark.parametrize("wall", [-2, 2])
def test_generations_written_out(wall: float) -> None:
    """Ten, in which the archive fills; the optimum lies beyond a wall, where trials have to be brought back."""

    def losses(x: Floats) -> Floats:
        return bowl(x - 1.5 * wall)

    strategy, rng = begin(DifferentialEvolution(popsize=12), [1.9, -1.9, 0.0], BOX)
    x = strategy.ask(rng)
    strategy.tell(x, losses(x), rng)
    paper = Paper(x, losses(x), 6)
    other = np.random.Generator(np.random.PCG64())
    for _ in range(10):
        other.bit_generator.state = rng.bit_generator.state
        expected = paper.trials(other)
        u = strategy.ask(rng)
        np.testing.assert_allclose(u, expected, rtol=0, atol=1e-13)
        paper.select(u, losses(u))
        strategy.tell(u, losses(u), rng)
        np.testing.assert_allclose(strategy.memory_factor, paper.memory_F, rtol=1e-12)
        np.testing.assert_allclose(strategy.memory_rate, paper.memory_CR, rtol=1e-12)
        if len(paper.archive) > 31:  # 2.6 populations
            known = {row.tobytes() for row in paper.archive}
            paper.archive = list(strategy.archive)
            assert {row.tobytes() for row in paper.archive} <= known
        assert len(paper.archive) == len(strategy.archive)
    assert len(paper.archive) == 31
    assert wall in paper.walls
    assert paper.k > 2


def settled(rates: list[float], losses: list[float]) -> Any:
    """A population of four equal points that was just asked, its settings then replaced."""
    strategy, rng = begin(DifferentialEvolution(popsize=4), [0.0], BOX)
    x = strategy.ask(rng)
    strategy.tell(x, np.full(4, 10.0), rng)
    u = strategy.ask(rng)
    strategy.factors, strategy.rates = np.array([0.2, 0.4, 0.6, 0.8]), np.array(rates)
    strategy.tell(u, np.array(losses), rng)
    return strategy


def test_memory_keeps_weighted_lehmer_means() -> None:
    """By hand: gains 1 and 3 of the first two, so weights 1/4 and 3/4."""
    strategy = settled([0.5, 1.0, 0.3, 0.3], [9.0, 7.0, 10.0, math.inf])
    F = (0.25 * 0.2**2 + 0.75 * 0.4**2) / (0.25 * 0.2 + 0.75 * 0.4)
    CR = (0.25 * 0.5**2 + 0.75 * 1.0**2) / (0.25 * 0.5 + 0.75 * 1.0)
    assert strategy.memory_factor.tolist() == pytest.approx([F, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert strategy.memory_rate.tolist() == pytest.approx([CR, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert strategy.slot == 1


def test_equal_trials_are_taken_but_no_success() -> None:
    strategy, rng = begin(DifferentialEvolution(popsize=4), [0.0], BOX)
    strategy.tell(strategy.ask(rng), np.full(4, 1.0), rng)
    u = strategy.ask(rng)
    strategy.tell(u, np.full(4, 1.0), rng)
    np.testing.assert_array_equal(strategy.x, u)
    assert (strategy.idle, strategy.slot, len(strategy.archive)) == (1, 0, 0)


def test_settings_stay_in_their_ranges() -> None:
    """eq. 1 cuts CR to [0, 1]; eq. 2 cuts F above 1 and draws what is not positive again."""
    strategy, rng = begin(DifferentialEvolution(popsize=200), [0.0], BOX)
    x = strategy.ask(rng)
    strategy.tell(x, bowl(x), rng)
    for middle in (0.0, 1.0):
        strategy.memory_rate[:] = strategy.memory_factor[:] = middle
        strategy.ask(rng)
        assert (strategy.rates.min() == 0) == (middle == 0)
        assert (strategy.rates.max() == 1) == (middle == 1)
        assert strategy.factors.min() > 0
        assert strategy.factors.max() == 1
        assert len(np.unique(strategy.factors)) > 50


def test_crossover_rate_zero_is_terminal() -> None:
    strategy = settled([0.0, 0.0, 0.0, 0.0], [9.0, 7.0, 10.0, 10.0])
    assert math.isnan(strategy.memory_rate[0])
    strategy.memory_rate[:] = math.nan
    strategy.ask(np.random.default_rng(0))
    assert strategy.rates.tolist() == [0.0] * 4
    strategy.slot, strategy.rates = 0, np.ones(4)
    strategy.tell(np.zeros((4, 1)), np.zeros(4), np.random.default_rng(0))
    assert math.isnan(strategy.memory_rate[0]), "terminal once, terminal for ever"


def test_gains_over_rejected_points_teach_nothing() -> None:
    strategy, rng = begin(DifferentialEvolution(popsize=4), [0.0], BOX)
    x = strategy.ask(rng)
    strategy.tell(x, np.array([math.inf, math.inf, math.inf, 1.0]), rng)
    u = strategy.ask(rng)
    strategy.factors = np.full(4, 0.9)
    with np.errstate(invalid="ignore"):  # as the run does
        strategy.tell(u, np.array([5.0, 6.0, math.inf, 7.0]), rng)
    assert strategy.losses.tolist() == [5.0, 6.0, math.inf, 1.0]
    assert strategy.memory_factor.tolist() == [0.5] * 6


def test_the_population_shrinks_linearly() -> None:
    """eq. 10: from 18 n = 36 to 4, by the share of `reduce_over` that is spent; the worst go."""
    sizes, spent = [], 0
    for x, _, _ in generations(DifferentialEvolution(reduce_over=400), valley, [1.0, 1.0], BOX):
        expected = 36 if not sizes else max(4, round(36 - 32 * spent / 400))
        assert abs(len(x) - expected) <= (len(sizes) == 1) * (
            36 - expected
        )  # not after the first points alone
        sizes.append(len(x))
        spent += len(x)
        if spent > 500:
            break
    assert sizes[0] == 36
    assert sizes[-1] == 4
    assert sizes == sorted(sizes, reverse=True)


def test_the_worst_points_and_a_full_archive_are_dropped() -> None:
    strategy, rng = begin(DifferentialEvolution(popsize=20, reduce_over=80), [0.0, 0.0], BOX)
    for _ in range(8):
        x = strategy.ask(rng)
        losses = valley(x)
        before = strategy.losses.copy()
        strategy.tell(x, losses, rng)
        if len(before):
            kept = np.sort(np.minimum(before, losses))[: len(strategy.x)]
            np.testing.assert_array_equal(np.sort(strategy.losses), kept)
            np.testing.assert_array_equal(valley(strategy.x), strategy.losses)
        assert len(strategy.archive) <= round(2.6 * len(strategy.x))
    assert len(strategy.x) == 4


def test_a_constant_population_has_no_horizon() -> None:
    """Without `reduce_over` nothing about the path depends on how long it will be."""
    short = first(3, DifferentialEvolution(), bowl, [1.0, 1.0], BOX)
    assert [len(x) for x in first(40, DifferentialEvolution(), bowl, [1.0, 1.0], BOX)] == [10] * 40
    np.testing.assert_array_equal(short, first(40, DifferentialEvolution(), bowl, [1.0, 1.0], BOX)[:3])


def test_scaling_the_loss_changes_nothing() -> None:
    """Gains weigh the memory, so the path is the same under a × loss, here with an exact a."""
    plain = first(30, DifferentialEvolution(), valley, [-1.2, 1.0], BOX)
    np.testing.assert_array_equal(
        plain, first(30, DifferentialEvolution(), lambda x: 8 * valley(x), [-1.2, 1.0], BOX)
    )


def test_stays_in_the_box_and_begins_at_the_start() -> None:
    wall = [x for x, _, _ in generations(DifferentialEvolution(), lambda x: bowl(x + 2), [1.0, 0.5], BOX)]
    assert wall[0][0].tolist() == [1.0, 0.5]
    assert np.abs(np.concatenate(wall)).max() <= 2
    assert np.concatenate(wall).min() < -1.49


def test_ends() -> None:
    *_, last = generations(DifferentialEvolution(), bowl, [1.0, 1.0], BOX)
    assert last[2].reason is Reason.CONVERGED
    assert "tolfun" in last[2].message
    flat = list(
        generations(DifferentialEvolution(patience=7), lambda x: np.full(len(x), 3.0), [1.0, 1.0], BOX)
    )
    assert len(flat) == 1 + 7
    assert flat[-1][2].reason is Reason.STALLED
    assert "7 generations" in flat[-1][2].message


def test_solves() -> None:
    assert solved(DifferentialEvolution(), bowl, 5, 2000, 1e-6, (-5, 5)) == 10
    assert solved(DifferentialEvolution(), valley, 2, 2500, 1e-6, (-5, 5)) >= 9
    assert solved(DifferentialEvolution(popsize=30), rastrigin, 4, 12000, 1e-2, (-5, 5), seeds=3) == 3
    assert solved(DifferentialEvolution(reduce_over=4000), rastrigin, 4, 4000, 1e-2, (-5, 5)) >= 9


def test_refuses() -> None:
    with pytest.raises(BoundsError, match=r"de: expected finite bounds"):
        hybridopt.minimize(lambda x: x.sum(), np.ones(2), DifferentialEvolution(), budget=9)
    with pytest.raises(MethodError, match=r"de: expected popsize >= 4, got 3"):
        DifferentialEvolution(popsize=3)
    with pytest.raises(MethodError, match=r"de: expected reduce_over >= 1, got 0"):
        DifferentialEvolution(reduce_over=0)
