"""The swarm: pyswarm's path bit for bit with its settings, a literal sweep, and how it begins and ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyswarm
import pytest
import torch

import hybridopt
from hybridopt import Reason
from hybridopt.errors import BoundsError, MethodError
from hybridopt.population.pso import PSO
from hybridopt.testing import OptimizerContract
from tests.population.drive import begin, bowl, first, generations, rastrigin, solved, valley

BOX = (-2.0, 2.0)


class TestContract(OptimizerContract):
    method = PSO()
    random = True
    budget = 1000.0


class TestContractRing(OptimizerContract):
    method = PSO(swarmsize=10, topology="ring", walls="keep")
    random = True
    budget = 1000.0


class Given:
    """A generator that hands out numbers that were drawn before."""

    def __init__(self, *arrays: Any) -> None:
        self.arrays = list(arrays)

    def random(self, shape: tuple[int, ...]) -> Any:
        assert self.arrays[0].shape == shape
        return self.arrays.pop(0)


@pytest.mark.parametrize("coefficients", [(0.5, 0.5, 0.5), (0.7298, 1.49618, 1.49618), (0.6, 1.2, 1.9)])
def test_walks_pyswarms_path(coefficients: tuple[float, float, float]) -> None:
    """pyswarm draws all its numbers up front: velocities (given its first swarm), then both pulls of every sweep."""
    size, n, sweeps, seed = 12, 3, 20, 5
    omega, phip, phig = coefficients
    swarm, rng = begin(PSO(size, omega, phip, phig, walls="keep"), [0.5, -1.0, 1.5], BOX)
    x = swarm.ask(rng)
    theirs: list[Any] = []

    def loss(point: Any) -> float:
        theirs.append(point.copy())
        return float(valley(point[None])[0])

    options = {"omega": omega, "phip": phip, "phig": phig, "minstep": 0, "minfunc": 0, "maxiter": sweeps}
    pyswarm.pso(loss, [-2] * n, [2] * n, swarmsize=size, init=x, seed=seed, **options)
    drawn = np.random.default_rng(seed)
    swarm.v = drawn.uniform([-4] * n, [4] * n, size=(size, n))
    pulls = [drawn.random((sweeps, size, n)) for _ in range(2)]
    ours = [x]
    for sweep in range(sweeps):
        swarm.tell(x, np.array([valley(row[None])[0] for row in x]), rng)
        x = swarm.ask(Given(pulls[0][sweep], pulls[1][sweep]))
        ours.append(x)
    assert (np.abs(np.concatenate(ours)) == 2).any(), "no particle met a wall: nothing was tested there"
    np.testing.assert_array_equal(np.concatenate(ours), theirs)


@pytest.mark.parametrize("topology", ["global", "ring"])
def test_two_sweeps_written_out(topology: Any) -> None:
    """Each particle and each weight by itself, as in the paper; at a wall it stays and stops."""
    size, n = 6, 2
    swarm, rng = begin(PSO(size, topology=topology), [1.9, -1.9], BOX)
    other = np.random.Generator(np.random.PCG64(3))
    draw = lambda: other.random((size, n))  # noqa: E731
    x = -2 + draw() * 4
    x[0] = [1.9, -1.9]
    v = (-2 + draw() * 4 - x) / 2
    np.testing.assert_array_equal(swarm.ask(rng), x)
    best_x, best = x.copy(), valley(x)
    swarm.tell(x, valley(x), rng)
    walls = 0
    for _ in range(5):
        rp, rg = draw(), draw()
        x, v = x.copy(), v.copy()
        for i in range(size):
            near = range(size) if topology == "global" else [(i - 1) % size, i, (i + 1) % size]
            g = best_x[min(near, key=lambda k: best[k])]
            for j in range(n):
                pulls = 1.49618 * rp[i, j] * (best_x[i, j] - x[i, j]) + 1.49618 * rg[i, j] * (g[j] - x[i, j])
                v[i, j] = 0.7298 * v[i, j] + pulls
                x[i, j] += v[i, j]
                if not -2 <= x[i, j] <= 2:
                    x[i, j], v[i, j] = math.copysign(2, x[i, j]), 0.0
                    walls += 1
        asked = swarm.ask(rng)
        np.testing.assert_allclose(asked, x, rtol=0, atol=1e-14)
        np.testing.assert_allclose(swarm.v, v, rtol=0, atol=1e-14)
        x, v = asked, swarm.v
        swarm.tell(x, valley(x), rng)
        better = valley(x) < best
        best_x[better], best[better] = x[better], valley(x)[better]
    assert walls


def test_only_the_order_of_losses_counts() -> None:
    plain = first(30, PSO(12), valley, [-1.2, 1.0], BOX)
    bent = first(30, PSO(12), lambda x: np.log1p(valley(x)) ** 3 - 7, [-1.2, 1.0], BOX)
    np.testing.assert_array_equal(plain, bent)


def test_the_first_swarm() -> None:
    """The start and points all over the box, wherever a predecessor says that the optimum may be."""
    swarm, rng = begin(PSO(200), [1.5, -1.5], BOX)
    x = swarm.ask(rng)
    assert x[0].tolist() == [1.5, -1.5]
    assert x.min() < -1.9
    assert x.max() > 1.9
    swarm, rng = begin(PSO(200), [1.5, -1.5], BOX, sigma=0.15)
    np.testing.assert_array_equal(swarm.ask(rng), x)


def test_rejected_points_pull_nobody() -> None:
    swarm, rng = begin(PSO(4, omega=0.0), [1.0], BOX)
    x = swarm.ask(rng)
    losses = np.array([math.inf, 1.0, math.inf, math.inf])
    swarm.tell(x, losses, rng)
    leader = x[1, 0]
    after = swarm.ask(Given(np.full((4, 1), 0.25), np.full((4, 1), 0.25)))
    pull = 0.25 * (1.49618 + 1.49618)
    np.testing.assert_allclose(after[:, 0], x[:, 0] + pull * (leader - x[:, 0]))


def test_a_first_swarm_of_rejected_points_is_placed_anew() -> None:
    reject = iter([True, True, False, False])
    seen = first(4, PSO(5), lambda x: bowl(x) + (math.inf if next(reject) else 0), [0.25], BOX)
    assert all(x[0, 0] == 0.25 for x in seen[:3])
    assert not np.array_equal(seen[0], seen[1])
    assert seen[3][0, 0] != 0.25


def test_ends() -> None:
    *_, last = generations(PSO(), bowl, [1.0, 1.0], BOX)
    assert last[2].reason is Reason.CONVERGED
    assert "tolfun" in last[2].message
    flat = list(generations(PSO(patience=7), lambda x: np.full(len(x), 3.0), [1.0, 1.0], BOX))
    assert len(flat) == 1 + 7
    assert flat[-1][2].reason is Reason.STALLED
    assert "7 sweeps" in flat[-1][2].message


def test_the_end_names_the_best_point() -> None:
    x = torch.tensor([1.0, 1.0], dtype=torch.float64)
    result = hybridopt.minimize(lambda x: ((x - 0.5) ** 2).sum(), x, PSO(), budget=10000, seed=1, bounds=BOX)
    assert result.reason is Reason.CONVERGED
    assert result.loss == result.best_loss


def test_solves() -> None:
    assert solved(PSO(), bowl, 5, 4000, 1e-6, (-5, 5)) == 10
    assert solved(PSO(), valley, 2, 10000, 1e-6, (-5, 5)) == 10
    assert solved(PSO(), rastrigin, 2, 4000, 1e-2, (-5, 5)) == 10
    assert solved(PSO(topology="ring"), rastrigin, 2, 4000, 1e-2, (-5, 5)) == 10


def test_refuses() -> None:
    with pytest.raises(BoundsError, match=r"pso: expected finite bounds .* pass for example bounds="):
        hybridopt.minimize(lambda x: x.sum(), torch.ones(2), PSO(), budget=9)
    with pytest.raises(MethodError, match=r"pso: expected swarmsize >= 2, got 1"):
        PSO(swarmsize=1)
    for option in ("omega", "phip", "phig"):
        for value in (math.inf, math.nan, -1.0):
            with pytest.raises(MethodError, match=rf"pso: expected a finite {option} >= 0, got"):
                PSO(**{option: value})
    with pytest.raises(MethodError, match=r"pso: expected topology to be one of global, ring, got 'star'"):
        PSO(topology="star")  # type: ignore[arg-type]
