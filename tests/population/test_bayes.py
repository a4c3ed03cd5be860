"""Bayesian optimisation: its process against the textbook, what it sees as the same point, and what that saves."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime
from scipy.stats import multivariate_normal, norm

import hybridopt
from hybridopt import ParameterVector, Run, tune
from hybridopt.errors import BoundsError, MemoryLimit, MethodError
from hybridopt.population import BayesianOptimization, bayes
from hybridopt.population import _gaussian_process as gp
from hybridopt.population._gaussian_process import GaussianProcess, log_expected_improvement, misfit
from hybridopt.population.bayes import flattened
from hybridopt.space import Categorical, Float, Int, Space
from hybridopt.start import Start
from hybridopt.testing import OptimizerContract
from tests.population.drive import begin, bowl, first

BOX = (-2.0, 2.0)


class TestContract(OptimizerContract):
    method = BayesianOptimization()
    random = True
    budget = 60.0
    evaluations = 20


@pytest.mark.slow
class TestContractGenerations(OptimizerContract):
    method = BayesianOptimization(popsize=3, initial=4)
    random = True
    budget = 90.0
    evaluations = 20


def branin(x: np.ndarray) -> float:
    """Minima of 0.397887 at (-pi, 12.275), (pi, 2.275) and (3 pi, 2.475), here in the unit square."""
    u, v = 15 * x[0] - 5, 15 * x[1]
    bend = v - 5.1 / (4 * math.pi**2) * u**2 + 5 / math.pi * u - 6
    return float(bend**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(u) + 10)


def data(k: int = 20, n: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(k)
    x, y = rng.random((k, n)), rng.standard_normal(k)
    return x, (y - y.mean()) / y.std()


def kernel(a: np.ndarray, b: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Matérn 5/2, entry by entry."""
    r = np.array([[math.sqrt(5) * np.linalg.norm((p - q) / lengths) for q in b] for p in a])
    return np.asarray((1 + r + r**2 / 3) * np.exp(-r))


# -- the process -------------------------------------------------------------------------------------------------


def test_prediction_is_the_conditional_normal_distribution() -> None:
    x, y = data()
    new = np.random.default_rng(1).random((5, 3))
    lengths, noise = np.array([0.3, 0.7, 1.5]), 0.05
    process = GaussianProcess(x, y, np.log([*lengths, noise]))
    K = kernel(x, x, lengths) + noise * np.eye(len(y))
    across = kernel(new, x, lengths)
    variance = (y @ np.linalg.solve(K, y) + 1) / (len(y) + 1)
    mean, std = process(new)
    np.testing.assert_allclose(mean, across @ np.linalg.solve(K, y), rtol=1e-9)
    left = kernel(new, new, lengths) - across @ np.linalg.solve(K, across.T)
    np.testing.assert_allclose(std, np.sqrt(variance * left.diagonal()), rtol=1e-9)


def test_the_fit_is_of_the_posterior_density() -> None:
    """The variance put in is the best one, so differences of the misfit are those of the density at its best."""
    x, y = data()

    def density(parameters: np.ndarray) -> float:
        lengths, noise = np.exp(parameters[:-1]), math.exp(parameters[-1])
        K = kernel(x, x, lengths) + noise * np.eye(len(y))
        tried = np.exp(np.linspace(-4, 4, 40_001))
        # one observation more, of variance 1, at nowhere near
        seen = multivariate_normal(np.zeros(len(y)), K).logpdf
        quadratic = y @ np.linalg.solve(K, y)
        base = seen(np.zeros(len(y)))
        best = (
            base - len(y) / 2 * np.log(tried) - quadratic / 2 / tried - np.log(tried) / 2 - 1 / 2 / tried
        ).max()
        prior = norm.logpdf(parameters[:-1], math.log(0.5 * math.sqrt(3)), 1).sum() + norm.logpdf(
            parameters[-1], -6, 2
        )
        return float(best + prior)

    a, b = np.log([0.3, 0.7, 1.5, 0.05]), np.log([0.9, 0.2, 0.4, 1e-4])
    assert density(a) - density(b) == pytest.approx(misfit(b, x, y)[0] - misfit(a, x, y)[0], abs=1e-5)


@pytest.mark.parametrize("parameters", [[0.3, 0.7, 1.5, 0.05], [2.0, 0.1, 0.5, 1e-4]])
def test_gradient_of_the_misfit(parameters: list[float]) -> None:
    x, y = data()
    p = np.log(parameters)
    _, gradient = misfit(p, x, y)
    np.testing.assert_allclose(
        gradient, approx_fprime(p, lambda q: misfit(q, x, y)[0], 1e-7), rtol=1e-4, atol=1e-4
    )


def test_points_too_close_together_are_told_apart_by_noise() -> None:
    x, y = np.zeros((4, 2)), np.array([1.0, -1.0, 1.0, -1.0])
    mean, std = GaussianProcess(x, y, np.log([1.0, 1.0, 1e-30]))(x)
    assert np.isfinite(mean).all()
    assert np.isfinite(std).all()


def test_fit_finds_which_coordinates_count_and_how_noisy_it_is() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((80, 3))
    y = np.sin(6 * x[:, 1])
    for noise in (0.0, 0.3):
        seen = y + noise * rng.standard_normal(80)
        process = GaussianProcess.fitted(x, (seen - seen.mean()) / seen.std(), None)
        lengths, part = process.lengths, math.exp(process.parameters[-1])
        assert lengths[1] < min(lengths[0], lengths[2]) / 3
        assert (part > 0.05) == (noise > 0), part


@pytest.mark.parametrize("u", [-1e8, -1000.5, -999.5, -30.0, -5.0, -1.001, -0.999, 0.0, 3.0, 40.0])
def test_expected_improvement_by_its_integral(u: float) -> None:
    """phi(u) + u Phi(u), by 50 digits."""
    mpmath = pytest.importorskip("mpmath")  # comes with torch, by sympy
    with mpmath.workdps(50):
        v = mpmath.mpf(u)
        tail = mpmath.erfc(-v / mpmath.sqrt(2)) / 2
        improvement = mpmath.npdf(v) + v * tail
        expected = (
            float(mpmath.log(improvement))
            if u > -1e4
            else -u * u / 2 - math.log(2 * math.pi) / 2 - 2 * math.log(-u)
        )
    for std in (1.0, 1e-3):
        (found,) = log_expected_improvement(np.array([2 - u * std]), np.array([std]), 2.0)
        assert found - math.log(std) == pytest.approx(expected, rel=1e-5, abs=1e-9)


# -- what the model is told --------------------------------------------------------------------------------------


def test_losses_below_the_median_keep_their_distances() -> None:
    y = flattened(np.array([3.0, 1.0, 2.0, 1e9, math.inf, 2.5, 1e30]))
    assert y.mean() == pytest.approx(0)
    assert y.std() == pytest.approx(1)
    assert (y[0] - y[1]) > 0
    assert (y[2] - y[1]) / (y[5] - y[1]) == pytest.approx(1 / 1.5)
    assert y[3] == y[4] == y[6] == y.max(), "what is far above, or rejected, is equally bad"
    rise = (y[3] - y[1]) / (y[5] - y[1])
    median = 2.75
    assert rise == pytest.approx(3 * (median - 1) / 1.5)


@pytest.mark.parametrize(
    "losses", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, math.inf], [1.7e308, -1.7e308, 0.0]]
)
def test_plateaus_and_ranges_without_end(losses: list[float]) -> None:
    y = flattened(np.array(losses))
    assert np.isfinite(y).all()
    assert y.argmin() == np.argmin(losses)


def test_whole_numbers_and_choices_are_seen_as_what_they_stand_for() -> None:
    space = Space(
        {"a": Int(2, 9), "b": Int(1, 64, log=True), "c": Categorical(["x", "y", "z"]), "d": Float(0, 1)}
    )
    vector = space.vector()
    start = Start.at(vector, 0, None)
    lower, upper = start.lower, start.upper
    rng = np.random.default_rng(0)
    x = np.vstack([lower + rng.random((200, start.n)) * (upper - lower), lower, upper])
    meant = start.meant(x)
    for point, same in zip(x, meant, strict=True):
        values = space.values(vector.decode(point))
        assert space.values(vector.decode(same)) == values
        np.testing.assert_allclose(vector.decode(same)[:2], [values["a"], values["b"]], rtol=1e-12)
        assert same[2:5].tolist() == np.eye(3)[["x", "y", "z"].index(values["c"])].tolist()
        assert same[5] == point[5]
    np.testing.assert_array_equal(start.meant(meant), meant)
    assert Start.from_state(start.state_dict()).choices == ((2, 5),)
    part = Start.at(vector.part(["d", "c"]), 0, None)
    assert part.choices in (((0, 3),), ((1, 4),))


# -- the search --------------------------------------------------------------------------------------------------


def test_solves_branin_in_forty() -> None:
    """Uniform sampling reaches 0.41 in 2 % of so many draws."""
    for popsize in (1, 4):
        found = [
            hybridopt.minimize(
                branin, np.full(2, 0.5), BayesianOptimization(popsize), budget=40, bounds=(0, 1), seed=seed
            ).best_loss
            for seed in range(5)
        ]
        assert np.median(found) < 0.4, found
        assert max(found) < 0.45, found


def test_design_is_the_start_and_a_latin_hypercube() -> None:
    x = np.concatenate(first(4, BayesianOptimization(popsize=2, initial=8), bowl, [0.3, -1.0, 1.0], BOX))
    assert x[0] == pytest.approx([0.3, -1.0, 1.0])
    strata = np.floor((x[1:] + 2) / 4 * 8).astype(int)
    for column in strata.T:
        assert len(set(column)) == 7, "two points in one of eight layers"
    (start,) = first(1, BayesianOptimization(), bowl, [0.3], BOX)
    assert start.tolist() == [[0.3]]


def test_points_handed_over_are_known() -> None:
    known = np.array([[0.1], [0.2], [0.3], [1.9]])
    strategy, rng = begin(
        BayesianOptimization(initial=4),
        [0.1],
        BOX,
        points=known,
        losses=bowl(known),
        loss=float(bowl(known[:1])[0]),
    )
    assert sorted(strategy.x[:, 0]) == [0.1, 0.2, 0.3, 1.9]
    x = strategy.ask(rng)
    assert 0.3 < x[0, 0] < 1.0, "the minimum is at 0.5, and the design is done"
    assert strategy.hand_over().points is not None


def test_points_of_a_generation_differ() -> None:
    strategy, rng = begin(BayesianOptimization(popsize=5, initial=5), [0.1, 0.3], BOX)
    x = strategy.ask(rng)
    strategy.tell(x, bowl(x), rng)
    x = strategy.ask(rng)
    apart = np.linalg.norm(x[:, None] - x, axis=2) + np.eye(5)
    assert apart.min() > 1e-3, "each point is to know of those before it"


def test_no_point_twice_while_there_are_others() -> None:
    space = Space({"a": Int(0, 3), "c": Categorical(["x", "y", "z"])})
    tuning = tune(
        lambda config: float(config["a"] ** 2), space, BayesianOptimization(initial=2), budget=15, seed=0
    )
    tried = [tuple(trial.config.values()) for trial in tuning.trials]
    assert len(set(tried[2:12] + tried[:2])) >= 11, "of twelve combinations"
    assert len(tried) == 15


def test_a_region_without_losses_is_left() -> None:
    """Rejected points teach too, also where a whole generation is rejected and nothing is told."""

    def loss(x: np.ndarray) -> float:
        return math.nan if x[0] > 0.2 else float((x[0] - 0.3) ** 2 + x[1] ** 2)

    with pytest.warns(RuntimeWarning, match="rejected"):
        result = hybridopt.minimize(loss, np.array([-1.5, 1.0]), "bayes", budget=45, bounds=BOX, seed=0)
    assert result.best_loss < 0.1, "0.01 at the border, 4.24 at the start"


def test_noise_is_averaged() -> None:
    """The point named is that of the lowest mean, judged anew; not the luckiest draw."""
    rng = torch.Generator().manual_seed(0)

    def loss(p: Any) -> Any:
        return ((p["x"] - 0.5) ** 2).sum() + 0.1 * torch.randn((), generator=rng)

    named = []
    for seed in range(3):
        x = {"x": torch.tensor([-1.5, 1.5], dtype=torch.float64)}
        result = hybridopt.minimize(loss, x, "bayes", budget=80, bounds=BOX, seed=seed, keep="last")
        named.append(float(((result.params["x"] - 0.5) ** 2).sum()))
    assert np.median(named) < 0.05, named


def test_forgets_points_that_are_neither_low_nor_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bayes, "MOST", 10)
    strategy, rng = begin(BayesianOptimization(popsize=30, initial=30), [0.1], BOX)
    x = strategy.ask(rng)
    losses = bowl(x)
    strategy.tell(x, losses, rng)
    low = set(np.argsort(losses)[:5])
    late = [i for i in range(30) if i not in low][-5:]
    assert sorted(strategy.x[:, 0]) == sorted(x[[*low, *late], 0])


def test_large_models_are_fitted_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when no more points are kept."""
    monkeypatch.setattr(bayes, "ALWAYS", 30)
    monkeypatch.setattr(bayes, "MOST", 40)
    fits: list[tuple[int, bool]] = []
    plain = gp.GaussianProcess.fitted.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, x: np.ndarray, y: np.ndarray, guess: Any, anew: bool) -> GaussianProcess:
        fits.append((len(evaluated), anew))
        return plain(cls, x, y, guess, anew)

    evaluated = []

    def loss(x: np.ndarray) -> float:
        evaluated.append(x)
        return branin(x)

    monkeypatch.setattr(GaussianProcess, "fitted", classmethod(counted))
    hybridopt.minimize(loss, np.full(2, 0.5), "bayes", budget=60, bounds=(0, 1), seed=0)
    assert [count for count, _ in fits[:25]] == list(range(6, 31))
    anew = np.array([count for count, anew in fits if anew])
    assert anew[0] == 6
    assert (anew[1:] >= 1.05 * anew[:-1]).all()
    assert (anew[1:] - 1 < 1.05 * anew[:-1]).all(), "each time there are 5 % more"
    assert anew[-1] > 50
    assert all(anew for count, anew in fits if count > 30)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: BayesianOptimization(popsize=0), MethodError, "popsize"),
        (lambda: BayesianOptimization(initial=1), MethodError, "initial"),
        (lambda: Run(branin, np.zeros(2), "bayes", budget=9), BoundsError, "bayes"),
    ],
)
def test_what_it_refuses(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_checkpoints_say_what_choices_there_are() -> None:
    """A resumed search sees the same points as equal (the state holds the start)."""
    space = Space({"c": Categorical(["x", "y"]), "d": Float(0, 1)})
    vector: ParameterVector = space.vector()
    run = BayesianOptimization().start(vector, 0)
    other = BayesianOptimization().start(
        Space({"e": Float(0, 1), "f": Float(0, 1), "g": Float(0, 1)}).vector(), 1
    )
    other.load_state_dict(run.state_dict())
    assert other.start.choices == ((0, 2),)


def test_memory_is_that_of_the_first_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many weights the design, 2 n + 2 points, needs most."""
    n, method = 1500, BayesianOptimization()
    vector = ParameterVector(torch.zeros(n, dtype=torch.float64), bounds=BOX)
    tracemalloc.start()
    method.start(vector, 0).ask()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.9 * method.memory(n) < peak < 1.1 * method.memory(n)
    monkeypatch.setattr("hybridopt.machine.available_memory", lambda: 9 * 10**7)  # of 1.44e8
    with pytest.raises(MemoryLimit, match=r"bayes: .* for 1500 weights, .*; select fewer.*small initial="):
        method.start(vector, 0)
    BayesianOptimization(initial=20).start(vector, 0)
