"""CMA-ES: the contract, the tutorial's equations in plain loops, laws, ends, restarts, state, memory."""

from __future__ import annotations

import io
import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hybridopt
from hybridopt import machine
from hybridopt.errors import MemoryLimit, MethodError
from hybridopt.ledger import Reason
from hybridopt.optimizer import Answer, Step
from hybridopt.population._base import PopulationRun
from hybridopt.population._boundary import Space
from hybridopt.population._covariance import SMALL, Full, Limited, Separable
from hybridopt.population._large import fill_normal
from hybridopt.population.cmaes import CMAES, Search
from hybridopt.start import Start
from hybridopt.testing import OptimizerContract

Array = npt.NDArray[np.float64]
Loss = Callable[[Array], Array]
ENDLESS: dict[str, float] = {"tolfun": 0.0, "tolfunhist": 0.0, "tolx": 0.0, "tolcond": math.inf}
BOX = (-2.0, 2.0)


class TestFull(OptimizerContract):
    method = CMAES()
    random = True


class TestBounded(OptimizerContract):
    method = CMAES(popsize=6, active=False)
    bounds = BOX
    random = True


class TestSeparable(OptimizerContract):
    method = CMAES(covariance="separable")
    random = True


class TestLimited(OptimizerContract):
    method = CMAES(covariance="limited")
    bounds = BOX
    random = True


class TestBipop(OptimizerContract):
    """With a tolerance so wide that a search ends after 25 generations: the runs of 137 evaluations see restarts."""

    method = CMAES(popsize=4, restarts="bipop", tolfun=1e3)
    random = True


class TestLearningRates(OptimizerContract):
    method = CMAES(learning_rate_adaptation=True)
    random = True


# -- problems -------------------------------------------------------------------------------------------------------


def sphere(x: Array) -> Array:
    return (x**2).sum(1)


def ellipsoid(x: Array) -> Array:
    n = x.shape[1]
    return (10.0 ** (6 * np.arange(n) / (n - 1)) * x**2).sum(1)


def rosenbrock(x: Array) -> Array:
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def begin(
    method: CMAES, x0: Any, lower: Any = -np.inf, upper: Any = np.inf, seed: int = 1, **more: Any
) -> PopulationRun:
    x = np.array(x0, dtype=float)
    sides = np.broadcast_to(lower, x.shape).astype(float), np.broadcast_to(upper, x.shape).astype(float)
    more = {"loss": 1e300, **more}  # known, so that it is not evaluated
    return PopulationRun(method, Start(x, *sides, np.full(x.shape, np.finfo(float).eps), seed, **more))


@pytest.mark.parametrize("covariance", ["full", "separable", "limited"])
def test_the_start_is_evaluated_beside_the_first_generation(covariance: Any) -> None:
    """So nobody ends worse than he began, and what is drawn and learnt is as if it had not been."""
    points = []
    for loss in (math.inf, 0.0):
        run = begin(CMAES(popsize=8, covariance=covariance, **ENDLESS), np.ones(3), loss=loss)
        first, step = generation(run, lambda x: ((x - 1) ** 2).sum(1))
        assert step.loss > 0
        assert run.incumbent.loss == 0
        assert run.incumbent.x is not None
        assert run.incumbent.x.tolist() == [1, 1, 1]
        second, _ = generation(run, rosenbrock)
        points.append([first, second])
        assert len(second) == 8
    assert points[0][0][0].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(points[0][0][1:], points[1][0])
    np.testing.assert_array_equal(points[0][1], points[1][1])


def generation(run: PopulationRun, loss: Loss) -> tuple[Array, Step]:
    x = run.ask().x
    assert x is not None
    step = run.tell(Answer(losses=loss(x)))
    assert step is not None
    return x, step


def generations(run: PopulationRun, loss: Loss, most: int) -> Iterator[Array]:
    for _ in range(most):
        x, step = generation(run, loss)
        yield x
        if step.reason is not None:
            return


def search(run: PopulationRun) -> Search:
    assert isinstance(run.strategy, Search)
    return run.strategy


def evaluations(run: PopulationRun, loss: Loss, target: float, most: int) -> float:
    """Evaluations until the target was met; inf if that was not within `most`."""
    done = 0
    while done < most:
        x, step = generation(run, loss)
        done += len(x)
        if step.loss <= target:
            return done
        if step.reason is not None:
            break
    return math.inf


# -- the published equations, in plain loops ------------------------------------------------------------------------


class Tutorial:
    """Hansen 2016, section A and B, one number at a time; `rates` 1 for the full matrix, (n + 2) / 3 for a diagonal.

    In place of C^-1/2 stands the inverse of the Cholesky factor, the one departure that CMAES's docstring declares.
    """

    def __init__(self, mean: Array, sigma: float, popsize: int, diagonal: bool) -> None:
        n, lam = len(mean), popsize
        self.n, self.lam, self.diagonal = n, lam, diagonal
        raw = [math.log((lam + 1) / 2) - math.log(i) for i in range(1, lam + 1)]
        mu = self.mu = lam // 2
        self.mu_eff = sum(raw[:mu]) ** 2 / sum(w * w for w in raw[:mu])
        mu_eff_minus = sum(raw[mu:]) ** 2 / sum(w * w for w in raw[mu:])
        rates = (n + 2) / 3 if diagonal else 1.0
        self.c_1 = rates * 2 / ((n + 1.3) ** 2 + self.mu_eff)
        top = 2 * (1 / 4 + self.mu_eff + 1 / self.mu_eff - 2)
        self.c_mu = min(1 - self.c_1, rates * top / ((n + 2) ** 2 + 2 * self.mu_eff / 2))
        self.c_c = (4 + self.mu_eff / n) / (n + 4 + 2 * self.mu_eff / n)
        self.c_sigma = (self.mu_eff + 2) / (n + self.mu_eff + 5)
        self.d_sigma = 1 + 2 * max(0, math.sqrt((self.mu_eff - 1) / (n + 1)) - 1) + self.c_sigma
        alphas = (
            1 + self.c_1 / self.c_mu,
            1 + 2 * mu_eff_minus / (self.mu_eff + 2),
            (1 - self.c_1 - self.c_mu) / (n * self.c_mu),
        )
        plus, minus = sum(w for w in raw if w > 0), -sum(w for w in raw if w < 0)
        self.w = [w / plus if w >= 0 else min(alphas) * w / minus for w in raw]
        self.chi = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
        self.mean, self.sigma, self.g = list(mean), sigma, 0
        self.p_sigma, self.p_c = [0.0] * n, [0.0] * n
        self.C = np.eye(n)
        self.A = np.eye(n)
        self.gap = max(1, int(1 / (2 * n * (self.c_1 + self.c_mu))))

    def sample(self, z: Array) -> list[list[float]]:
        n = range(self.n)
        self.y = [[sum(self.A[j, k] * row[k] for k in n) for j in n] for row in z]
        return [[self.mean[j] + self.sigma * y[j] for j in n] for y in self.y]

    def update(self, order: list[int]) -> None:
        n, lam = range(self.n), range(self.lam)
        y = [self.y[i] for i in order]
        inverse = np.linalg.inv(self.A)
        y_w = [sum(self.w[i] * y[i][j] for i in range(self.mu)) for j in n]
        white = [sum(inverse[j, k] * y_w[k] for k in n) for j in n]
        self.g += 1
        self.mean = [self.mean[j] + self.sigma * y_w[j] for j in n]
        c = self.c_sigma
        self.p_sigma = [
            (1 - c) * self.p_sigma[j] + math.sqrt(c * (2 - c) * self.mu_eff) * white[j] for j in n
        ]
        length = math.sqrt(sum(p * p for p in self.p_sigma))
        h = float(length / math.sqrt(1 - (1 - c) ** (2 * self.g)) < (1.4 + 2 / (self.n + 1)) * self.chi)
        self.sigma *= math.exp(c / self.d_sigma * (length / self.chi - 1))
        c = self.c_c
        self.p_c = [(1 - c) * self.p_c[j] + h * math.sqrt(c * (2 - c) * self.mu_eff) * y_w[j] for j in n]
        w = []
        for i in lam:
            norm = sum(sum(inverse[j, k] * y[i][k] for k in n) ** 2 for j in n)
            w.append(self.w[i] * (1 if self.w[i] >= 0 else self.n / norm))
        late = (1 - h) * c * (2 - c)
        C = np.empty((self.n, self.n))
        for j in n:
            for k in n:
                kept = 1 + self.c_1 * late - self.c_1 - self.c_mu * sum(self.w)
                C[j, k] = kept * self.C[j, k] + self.c_1 * self.p_c[j] * self.p_c[k]
                C[j, k] += self.c_mu * sum(w[i] * y[i][j] * y[i][k] for i in lam)
        self.C = np.diag(np.diag(C)) if self.diagonal else C
        if self.diagonal or self.g % self.gap == 0:
            self.A = np.linalg.cholesky(self.C)


@pytest.mark.parametrize("covariance, n, popsize", [
    ("full", 4, 9), ("full", 12, 4), ("full", SMALL, 13), ("separable", 4, 9), ("separable", 12, 6), ("full", 1, 4),
])  # fmt: skip
def test_the_tutorials_equations(covariance: Any, n: int, popsize: int) -> None:
    run = begin(CMAES(sigma=0.3, popsize=popsize, covariance=covariance, **ENDLESS), np.linspace(-1, 1, n))
    ours = search(run)
    theirs = Tutorial(np.linspace(-1, 1, n), 0.3, popsize, covariance == "separable")
    slow = []
    for _ in range(40):
        x = run.ask().x
        assert ours.z is not None
        np.testing.assert_allclose(x, theirs.sample(ours.z), rtol=1e-9, atol=1e-12)
        losses = rosenbrock(x) if n > 1 else x[:, 0] + 5 * np.abs(x[:, 0])
        run.tell(Answer(losses=losses))
        theirs.update(sorted(range(popsize), key=lambda i: losses[i]))
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(ours.p_sigma, theirs.p_sigma, rtol=1e-8, atol=1e-10)
        assert ours.sigma == pytest.approx(theirs.sigma, rel=1e-9)
        if isinstance(ours.shape, Full):
            slow.append(ours.shape.age)
            C = np.triu(ours.shape.C) + np.triu(ours.shape.C, 1).T
        else:
            assert isinstance(ours.shape, Separable)
            C = np.diag(ours.shape.variances)
        np.testing.assert_allclose(C, theirs.C, rtol=1e-8, atol=1e-10)
    if (covariance, n) == ("full", 12):
        assert max(slow) == 1, "the factor should be a generation old at every other step"


def test_limited_memory_line_by_line() -> None:
    """Loshchilov, Glasmachers & Beyer 2019, Algorithm 1, with the tutorial's form of the step-size rule."""
    n, popsize = 60, 6
    run = begin(CMAES(sigma=0.3, popsize=popsize, covariance="limited", **ENDLESS), np.ones(n))
    ours = search(run)
    m = 4 + int(3 * math.log(n))
    raw = np.maximum(math.log((popsize + 1) / 2) - np.log(np.arange(1, popsize + 1)), 0)
    w = raw / raw.sum()
    mu_eff = 1 / (w**2).sum()
    c_sigma = 2 * popsize / n
    mean, sigma, p, M = np.ones(n), 0.3, np.zeros(n), np.zeros((m, n))
    chi = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
    for t in range(30):
        x = run.ask().x
        assert x is not None
        assert ours.z is not None
        z = ours.z.copy()
        d = z.copy()
        for i in range(popsize):
            for j in range(min(t, m)):
                c = 1 / (1.5**j * n)
                d[i] = (1 - c) * d[i] + c * M[j] * (M[j] @ d[i])
        np.testing.assert_allclose(x, mean + sigma * d, rtol=1e-10, atol=1e-12)
        losses = ellipsoid(x)
        run.tell(Answer(losses=losses))
        order = np.argsort(losses, kind="stable")
        z_w = sum(w[k] * z[i] for k, i in enumerate(order))
        mean = mean + sigma * sum(w[k] * d[i] for k, i in enumerate(order))
        p = (1 - c_sigma) * p + math.sqrt(mu_eff * c_sigma * (2 - c_sigma)) * z_w
        for j in range(m):
            c = popsize / (4.0**j * n)
            M[j] = (1 - c) * M[j] + math.sqrt(mu_eff * c * (2 - c)) * z_w
        sigma *= math.exp(c_sigma * (math.sqrt(p @ p) / chi - 1))
    assert ours.sigma == pytest.approx(sigma, rel=1e-9)
    # the deviations that end a search are those of the matrix that all the factors make
    A = np.eye(n)
    for j in range(m):
        c = 1 / (1.5**j * n)
        A = (1 - c) * A + c * np.outer(M[j], M[j] @ A)
    np.testing.assert_allclose(ours.shape.deviations(), np.sqrt(np.diag(A @ A.T)), rtol=1e-9)


def test_learning_rates_line_by_line() -> None:
    """Nomura, Akimoto & Ono 2023, Algorithm 2: the tutorial's step, of which parts are taken."""
    n, popsize = 3, 7
    run = begin(CMAES(sigma=0.3, popsize=popsize, learning_rate_adaptation=True, **ENDLESS), np.ones(n))
    ours = search(run)
    theirs = Tutorial(np.ones(n), 0.3, popsize, diagonal=False)
    memory = {"mean": [0.1, np.zeros(n), 0.0, 1.0], "shape": [0.03, np.zeros((n, n)), 0.0, 1.0]}
    noise = np.random.default_rng(3)
    for _ in range(30):
        x = run.ask().x
        assert x is not None
        assert ours.z is not None
        np.testing.assert_allclose(x, theirs.sample(ours.z), rtol=1e-8, atol=1e-10)
        losses = sphere(x) + noise.normal(size=popsize)
        run.tell(Answer(losses=losses))
        mean, sigma, C, A = np.array(theirs.mean), theirs.sigma, theirs.C.copy(), theirs.A.copy()
        theirs.update(sorted(range(popsize), key=lambda i: losses[i]))
        root = np.linalg.inv(sigma * A)
        moved = np.array(theirs.mean) - mean
        changed = theirs.sigma**2 * theirs.C - sigma**2 * C
        before = memory["mean"][3]
        local = {"mean": root @ moved, "shape": root @ changed @ root.T / math.sqrt(2)}
        for key, delta in local.items():
            beta, E, V, eta = memory[key]
            E = (1 - beta) * E + beta * delta
            V = (1 - beta) * V + beta * (delta**2).sum()
            square = (E**2).sum()
            snr = (square - beta / (2 - beta) * V) / (V - square)
            eta *= math.exp(min(0.1 * eta, beta) * np.clip(snr / (1.4 * eta) - 1, -1, 1))
            memory[key] = [beta, E, V, min(eta, 1.0)]
        eta_mean, eta_shape = memory["mean"][3], memory["shape"][3]
        theirs.mean = list(mean + eta_mean * moved)
        S = sigma**2 * C + eta_shape * changed
        theirs.sigma = np.linalg.det(S) ** (1 / (2 * n))
        theirs.C = S / theirs.sigma**2
        theirs.A = np.linalg.cholesky(theirs.C)
        theirs.sigma *= before / eta_mean
        assert ours.sigma == pytest.approx(theirs.sigma, rel=1e-8)
    assert ours.rate_mean is not None
    assert ours.rate_mean.eta < 0.7


# -- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [
    CMAES(**ENDLESS), CMAES(covariance="separable", **ENDLESS), CMAES(covariance="limited", **ENDLESS),
    CMAES(learning_rate_adaptation=True, **ENDLESS),
])  # fmt: skip
def test_only_the_order_of_the_losses_counts(method: CMAES) -> None:
    plain, bent = begin(method, [-1.2, 1.0, 0.5]), begin(method, [-1.2, 1.0, 0.5])
    for _ in range(60):
        x, _ = generation(plain, rosenbrock)
        again, _ = generation(bent, lambda x: np.cbrt(rosenbrock(x)) - 7)
        assert x.tobytes() == again.tobytes()


class Turned:
    """Normal numbers with some signs flipped, or in another order."""

    def __init__(self, seed: int, signs: Any = 1.0, places: Any = slice(None)) -> None:
        self.rng, self.signs, self.places = np.random.default_rng(seed), signs, places

    def standard_normal(self, out: Array) -> None:
        out[:] = self.rng.standard_normal(out.shape)[:, self.places] * self.signs


@pytest.mark.parametrize("covariance", ["full", "separable", "limited"])
def test_mirrored_coordinates_mirror_the_path(covariance: Any) -> None:
    signs = np.array([1.0, -1.0, -1.0, 1.0])
    _same_path(covariance, Turned(4), Turned(4, signs=signs), lambda x: x * signs, exact=True)


@pytest.mark.parametrize("covariance", ["separable", "limited"])
def test_coordinates_in_another_order(covariance: Any) -> None:
    places = np.array([2, 0, 3, 1])
    _same_path(covariance, Turned(4), Turned(4, places=places), lambda x: x[..., places], exact=False)


def _same_path(covariance: Any, one: Any, other: Any, turn: Callable[[Array], Array], exact: bool) -> None:
    method, x0 = CMAES(covariance=covariance, sigma=0.4, **ENDLESS), np.array([-1.0, 0.5, 2.0, 1.0])
    first, second = search(begin(method, x0)), search(begin(method, turn(x0)))
    for _ in range(40):
        x, turned = first.ask(one), second.ask(other)
        np.testing.assert_allclose(turned, turn(x), rtol=0 if exact else 1e-6, atol=0 if exact else 1e-9)
        losses = rosenbrock(x)
        first.tell(x, losses, one)
        second.tell(turned, losses, other)


def test_a_rotated_ellipsoid_costs_as_much() -> None:
    n = 5
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    counts = [
        [evaluations(begin(CMAES(), np.ones(n) @ R, seed=s), lambda x: ellipsoid(x @ R.T), 1e-8, 9000)  # noqa: B023
         for s in range(9)]
        for R in (np.eye(n), Q)
    ]  # fmt: skip
    straight, rotated = np.median(counts, axis=1)
    assert rotated == pytest.approx(straight, rel=0.12)


@pytest.mark.parametrize("loss, x0, pycma", [
    # median evaluations to 1e-8 of cma 4.5.0, fmin with sigma 0.5 and seeds 1 to 7, n = 10
    (sphere, 1.0, 1310), (ellipsoid, 1.0, 3950), (rosenbrock, 0.0, 4770),
])  # fmt: skip
def test_evaluations_to_the_target(loss: Loss, x0: float, pycma: int) -> None:
    counts = [
        evaluations(begin(CMAES(sigma=0.5), np.full(10, x0), seed=s), loss, 1e-8, 9000) for s in range(5)
    ]
    assert np.median(counts) == pytest.approx(pycma, rel=0.12)


def test_equal_losses_rank_as_they_were_drawn() -> None:
    paths = []
    for nudge in (0.0, 1e-9):
        run = begin(CMAES(popsize=60, **ENDLESS), np.ones(3))
        losses = np.arange(60) % 3 + nudge * np.arange(60)
        paths.append([generation(run, lambda x: losses)[0].tobytes() for _ in range(5)])  # noqa: B023
    assert paths[0] == paths[1]


def test_a_rejected_loss_ranks_last() -> None:
    paths = []
    for worst in (math.inf, 1e300):
        run = begin(CMAES(**ENDLESS), np.ones(3))
        paths.append([
            generation(run, lambda x: np.where(x[:, 0] > 1, worst, sphere(x)))[0].tobytes()  # noqa: B023
            for _ in range(20)
        ])  # fmt: skip
    assert paths[0] == paths[1]


# -- bounds ---------------------------------------------------------------------------------------------------------


@given(
    low=st.one_of(st.just(-math.inf), st.floats(-1e3, 1e3)),
    width=st.one_of(st.just(math.inf), st.floats(1e-6, 1e3)),
    share=st.floats(0, 1),
    far=st.floats(-1e4, 1e4),
    scale=st.floats(0.01, 1.0),
)
def test_the_space_lies_inside_the_bounds(
    low: float, width: float, share: float, far: float, scale: float
) -> None:
    high = low + width if math.isfinite(low) else width
    left, right = max(low, -1e3), min(high, 1e3)
    x = np.array([left + share * max(right - left, 0.0), 0.25])
    bounds = np.array([low, -math.inf]), np.array([high, math.inf])
    start = Start(np.clip(x, *bounds), *bounds, np.full(2, 1e-16), 1)
    space = Space(start, np.array([scale, 1.0]))
    back = space.inside(space.outside(start.x0)[None])[0]
    np.testing.assert_allclose(back, start.x0, rtol=1e-9, atol=1e-9)
    margin = Space.MARGIN * (width if math.isfinite(low + width) and math.isfinite(low) else 1 + abs(low))
    if math.isfinite(low):
        assert abs(space.outside(start.x0)[0] * scale - start.x0[0]) <= 1.001 * margin + 1e-9, (
            "a mirror image"
        )
    u = np.array([[far, far]])
    inside = space.inside(u)
    assert (inside >= bounds[0]).all()
    assert (inside <= bounds[1]).all()
    assert inside[0, 1] == far
    assert u[0, 0] == far, "the caller's points were changed"
    near = space.inside(u + 1e-7)
    assert abs(near[0, 0] - inside[0, 0]) <= 1.001e-7 + 1e-10, "the map jumps or stretches"


def test_the_space_is_the_identity_away_from_the_bounds() -> None:
    start = Start(np.zeros(1), np.array([-1.0]), np.array([3.0]), np.full(1, 1e-16), 1)
    u = np.linspace(-0.79, 2.79, 50)[:, None]
    np.testing.assert_array_equal(Space(start, np.ones(1)).inside(u), u)
    x = np.linspace(-1, 3, 81)
    back = np.array([Space(start, np.ones(1)).outside(one[None])[0] for one in x])
    assert (np.diff(back) > 0).all()
    np.testing.assert_allclose(back[[0, 80]], [-1.2, 3.2])
    np.testing.assert_allclose(Space(start, np.ones(1)).inside(back[:, None])[:, 0], x, atol=1e-12)
    far = Space(start, np.ones(1)).inside(u + 2 * 1.1 * 4.0 * 7)
    np.testing.assert_allclose(far, u, atol=1e-12)
    ends = Space(start, np.ones(1)).inside(np.array([[-1.2], [3.2], [-1.3], [3.3]]))
    np.testing.assert_allclose(ends[:2, 0], [-1.0, 3.0], rtol=1e-14)
    assert (ends[2:, 0] > -1).all()
    assert (ends[2:, 0] < 3).all()


@pytest.mark.parametrize("covariance", ["full", "separable"])
def test_an_optimum_on_the_bounds(covariance: Any) -> None:
    """Minimum of the rotated bowl over x <= (1, 1, inf, ...): x_0 and x_1 at their bounds, by construction."""
    n = 5
    centre = np.array([1.5, 1.2, 0.0, -0.5, 0.3])

    def loss(x: Array) -> Array:
        return 10 * (x[:, 0] - 1.5) ** 2 + (x[:, 1] - 1.2) ** 2 + 100 * ((x[:, 2:] - centre[2:]) ** 2).sum(1)

    lowest = 10 * 0.25 + 0.04
    run = begin(
        CMAES(covariance=covariance, **ENDLESS), np.zeros(n), [-1, -np.inf, -1, -1, -1], [1, 1, 1, 1, np.inf]
    )
    for x in generations(run, loss, 250):
        assert (x >= run.start.lower).all()
        assert (x <= run.start.upper).all()
    best = run.incumbent
    assert best.loss - lowest < 1e-9
    np.testing.assert_allclose(best.x, [1, 1, *centre[2:]], atol=1e-4)


# -- the end --------------------------------------------------------------------------------------------------------


def steep(x: Array) -> Array:
    """Needle-shaped beyond what float64 can factor."""
    return x[:, 0] ** 2 + 1e20 * x[:, 1] ** 2


@pytest.mark.parametrize("options, x0, loss, reason, words", [
    ({}, [1.0, 1.0], sphere, Reason.CONVERGED, "tolfun:"),
    ({"tolfun": 0.0}, [1.0, 1.0], sphere, Reason.CONVERGED, "tolfunhist:"),
    ({"tolfun": 0.0, "tolfunhist": 0.0, "tolx": 1e-4}, [1.0, 1.0], sphere, Reason.CONVERGED, "tolx"),
    ({"tolfun": 0.0, "tolfunhist": 0.0, "tolx": 0.0}, [1.0, 1.0], lambda x: sphere(x - 1), Reason.STALLED, "rounding"),
    ({"tolfun": 0.0, "tolfunhist": 0.0, "tolx": 0.0}, [1.0, 1.0], steep, Reason.STALLED, "condition number"),
    ({}, [1.0, 1.0], lambda x: x.sum(1), Reason.STALLED, "step size grew"),
    ({}, [1.0], lambda x: x[:, 0] * 0 + 3, Reason.STALLED, "flat"),
    ({"covariance": "limited"}, [1.0, 1.0], lambda x: x[:, 0] * 0 + 3, Reason.STALLED, "flat"),
    ({"covariance": "separable", "tolfun": 0.0, "tolfunhist": 0.0, "tolx": 0.0}, [1.0, 1.0], steep,
     Reason.STALLED, "condition number"),
    ({}, [1.0, 1.0], lambda x: np.random.default_rng(int(1e6 * abs(x[0, 0]))).random(len(x)),
     Reason.STALLED, "stagnation"),
])  # fmt: skip
def test_it_ends_with_a_reason(
    options: dict[str, Any], x0: list[float], loss: Loss, reason: Reason, words: str
) -> None:
    bounds = BOX if words == "stagnation" else (-np.inf, np.inf)
    run = begin(CMAES(sigma=0.5, **options), x0, *bounds)
    lowest = math.inf
    for _ in range(3000):
        _, step = generation(run, loss)
        lowest = min(lowest, step.loss)
        if step.reason is not None:
            break
    assert (step.reason, words in step.message) == (reason, True), step
    assert search(run).sigma < 1e6, "it could have ended earlier"
    assert run.incumbent.loss == lowest
    assert run.incumbent.x is not None
    if words != "stagnation":
        assert loss(run.incumbent.x[None])[0] == lowest


def test_the_ending_may_be_the_start() -> None:
    run = begin(CMAES(tolfun=10.0), np.zeros(2), loss=0.0)
    assert list(generations(run, sphere, 100))
    assert run.incumbent.loss == 0.0
    assert (run.incumbent.x == 0).all()


# -- restarts -------------------------------------------------------------------------------------------------------


def searches(run: PopulationRun, loss: Loss) -> tuple[list[tuple[int, int, bool, float]], Step]:
    """(popsize, evaluations, small?, first sigma) of each search, and the last step."""
    found: list[tuple[int, int, bool, float]] = []
    ours, restarted = search(run), -1
    while True:
        if ours.restarted != restarted:
            restarted = ours.restarted
            found.append((ours.popsize, 0, ours.small, ours.sigma))
        _, step = generation(run, loss)
        popsize, done, *rest = found[-1]
        found[-1] = (popsize, done + popsize, *rest)  # type: ignore[assignment]
        if step.reason is not None:
            return found, step


def test_ipop_doubles_the_population() -> None:
    run = begin(CMAES(restarts="ipop", max_restarts=3, sigma=0.5), np.ones(2), *BOX)
    found, step = searches(run, sphere)
    assert [popsize for popsize, *_ in found] == [6, 12, 24, 48]
    assert [sigma for *_, sigma in found] == [0.5] * 4
    assert step.reason is Reason.CONVERGED


def test_bipop_spends_alike_on_small_and_large() -> None:
    run = begin(CMAES(restarts="bipop", max_restarts=14, sigma=0.5), np.ones(2), *BOX)
    found, _ = searches(run, sphere)
    large = [row for row in found if not row[2]]
    assert [popsize for popsize, *_ in large] == [6 * 2**i for i in range(len(large))]
    assert len(large) > 2
    spent = {True: 0, False: 0}
    last = found[0][1]
    for popsize, done, small, sigma in found[1:]:
        assert small == (spent[True] < spent[False]), "not the turn of the side that had spent less"
        spent[small] += done
        if small:
            assert done <= max(last / 2, popsize), "a small search spends at most half of the last large one"
            assert 0.005 <= sigma < 0.5
            assert 3 <= popsize <= max(row[0] for row in large) / 2
        else:
            assert sigma == 0.5
            last = done


def test_restarts_find_what_one_search_misses() -> None:
    """Two basins; the first search begins in the worse one and cannot leave it."""

    def two(x: Array) -> Array:
        return np.minimum(sphere(x - 1.5), 0.5 + sphere(x + 1.5))

    x0 = np.full(2, -1.5)
    once = begin(CMAES(sigma=0.05), x0, *BOX)
    list(generations(once, two, 10**4))
    assert once.incumbent.loss == pytest.approx(0.5)
    often = begin(CMAES(sigma=0.05, restarts="ipop"), x0, *BOX)
    list(generations(often, two, 10**4))
    assert often.incumbent.loss < 1e-9
    assert search(often).restarted == 9


# -- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, bounds", [
    (CMAES(restarts="bipop", tolfun=1e4), BOX),
    (CMAES(restarts="ipop", max_restarts=2, tolfun=1e4, covariance="separable"), (-np.inf, np.inf)),
    (CMAES(restarts="ipop", max_restarts=1, tolfun=1e4, covariance="limited"), (-np.inf, 2.0)),
    (CMAES(learning_rate_adaptation=True), (-np.inf, np.inf)),
    (CMAES(popsize=4, sigma=0.1), (-np.inf, np.inf)),
])  # fmt: skip
def test_saved_at_every_step_and_between(method: CMAES, bounds: tuple[float, float]) -> None:
    x0 = np.linspace(
        -1, 1, 11 if method.popsize == 4 else 3
    )  # n = 11: the factor is old at some of the steps
    run = begin(method, x0, *bounds)
    for _ in range(90):
        for asked in (False, True):
            if asked:
                run.ask()
            file = io.BytesIO()
            torch.save(run.state_dict(), file)
            file.seek(0)
            again = begin(method, x0 * 0 + 0.5, seed=99)
            again.load_state_dict(torch.load(file, weights_only=True))
            for _ in range(2):
                x, step = generation(again, rosenbrock)
                if step.reason is not None:
                    break
            final = again.state_dict()
        _, step = generation(run, rosenbrock)
        if step.reason is not None:
            break
        twin = copy_of(run, method, x0)
        generation(twin, rosenbrock)
        assert _flat(twin.state_dict()) == _flat(final), "the loaded search went another way"
    if method.restarts != "none":
        assert search(run).restarted >= 1


def copy_of(run: PopulationRun, method: CMAES, x0: Array) -> PopulationRun:
    twin = begin(method, x0)
    twin.load_state_dict(run.state_dict())
    return twin


def _flat(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.dtype, tuple(state.shape), state.numpy().tobytes()
    if isinstance(state, dict):
        return {key: _flat(part) for key, part in state.items()}
    if isinstance(state, list):
        return [_flat(part) for part in state]
    return state


# -- options and memory ---------------------------------------------------------------------------------------------


def test_sigma_and_popsize() -> None:
    bounds = np.array([-1.0, -np.inf, 0.0]), np.array([1.0, np.inf, 10.0])
    many = CMAES(popsize=4000)
    x = begin(many, [0.0, 0.0, 5.0], *bounds).ask().x
    assert x is not None
    u = np.std(x[:, 1])
    assert u == pytest.approx(0.5, rel=0.05)
    assert np.median(np.abs(x[:, 2] - 5)) == pytest.approx(0.6745 * 3.0, rel=0.05)
    assert np.median(np.abs(x[:, 0])) == pytest.approx(0.6745 * 0.6, rel=0.05)
    handed = begin(many, np.zeros(2), sigma=0.07).ask().x
    assert np.std(handed) == pytest.approx(0.07, rel=0.05)
    chosen = begin(CMAES(popsize=4000, sigma=2.0), np.zeros(2), sigma=0.07).ask().x
    assert np.std(chosen) == pytest.approx(2.0, rel=0.05)
    assert begin(CMAES(), np.zeros(10)).ask().x.shape == (10, 10)  # type: ignore[union-attr]


@pytest.mark.parametrize("options, text", [
    ({"sigma": 0.0}, "positive finite sigma"), ({"popsize": 1}, "popsize >= 2"), ({"tolx": -1.0}, "tolx >= 0"),
    ({"covariance": "diagonal"}, "covariance to be one of full, separable, limited"),
    ({"covariance": "limited", "learning_rate_adaptation": True}, "with covariance='full' only"),
    ({"max_restarts": -1}, "max_restarts >= 0"),
])  # fmt: skip
def test_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(MethodError, match=text):
        CMAES(**options)


@pytest.mark.parametrize("options, n", [
    ({}, 600), ({"learning_rate_adaptation": True}, 400), ({"covariance": "separable"}, 100_000),
    ({"covariance": "limited"}, 100_000),
])  # fmt: skip
def test_memory_is_what_is_needed(options: dict[str, Any], n: int) -> None:
    method = CMAES(**options)
    # loads a compiler, whose memory is not the method's
    fill_normal(np.random.default_rng(0), np.empty((1, n)))
    tracemalloc.start()
    run = begin(method, np.ones(n))
    for _ in range(12):
        generation(run, lambda x: x[:, 0])
    search(run).shape.condition()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.4 * method.memory(n) < peak < method.memory(n)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 10**9)
    with pytest.raises(MemoryLimit, match=r"32\d{8} bytes.*covariance=separable"):
        hybridopt.minimize(lambda x: x.sum(), torch.zeros(10_000), CMAES(), budget=10)
    limited = Limited.round(10**6)
    assert limited.M.shape == (45, 10**6)
