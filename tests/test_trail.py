"""What a method hands over, and who takes it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hybridopt
from hybridopt import method
from hybridopt.optimizer import HandOver
from hybridopt.trail import DENSE, POINTS, Trail, inverse_curvature, relative
from tests.driving import BOX, Recorded, rosenbrock, start

CURVATURES = np.array([1.0, 4.0, 25.0, 100.0])


def quadratic(x: Tensor) -> Tensor:
    """Minimum 0 at 0, with the curvatures above."""
    return (torch.from_numpy(CURVATURES) * x**2).sum() / 2


# -- what is seen on the way -------------------------------------------------------------------------------------


def test_the_lowest_points_in_order() -> None:
    trail = Trail(2)
    rng = np.random.default_rng(0)
    points, losses = rng.normal(size=(100, 2)), rng.normal(size=100)
    for x, loss in zip(points, losses, strict=True):
        trail.note(x, float(loss))
        trail.note(x, math.inf)
        trail.note(x, math.nan)
    handed = trail.hand_over()
    order = np.argsort(losses)[:POINTS]
    assert np.array_equal(handed.losses, losses[order])  # type: ignore[arg-type]
    assert np.array_equal(handed.points, points[order])  # type: ignore[arg-type]
    assert handed.sigma is None
    assert handed.covariance is None


def test_points_of_many_weights_take_little_room() -> None:
    trail = Trail(10**6)
    for i in range(5):
        trail.note(np.full(10**6, float(i)), float(i))
    assert trail.hand_over().points is None  # one point is the start itself


def test_the_curvature_of_a_quadratic() -> None:
    """After n independent changes BFGS knows the inverse Hessian of a quadratic along conjugate directions."""
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    hessian = q @ np.diag(CURVATURES) @ q.T
    moved = q.T  # eigenvectors are conjugate
    found = inverse_curvature(moved, moved @ hessian)
    assert found is not None
    expected = np.linalg.inv(hessian)
    expected /= math.exp(np.log(np.diagonal(expected)).mean())
    assert found == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_the_compact_form_is_the_recursion(pairs: int) -> None:
    """Nocedal & Wright (6.17), one pair after another."""
    rng = np.random.default_rng(pairs)
    n = 6
    root = rng.normal(size=(n, n))
    hessian = root @ root.T + np.eye(n)
    moved = rng.normal(size=(pairs, n))
    turned = moved @ hessian
    inverse = np.eye(n) * (moved[-1] @ turned[-1]) / (turned[-1] @ turned[-1])
    for s, y in zip(moved, turned, strict=True):
        left = np.eye(n) - np.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + np.outer(s, s) / (s @ y)
    found = inverse_curvature(moved, turned)
    assert found is not None
    assert found == pytest.approx(relative(inverse), rel=1e-6)


def test_many_weights_get_the_diagonal() -> None:
    rng = np.random.default_rng(0)
    n = DENSE + 1
    curvatures = np.exp(rng.normal(size=n))
    moved = rng.normal(size=(5, n))
    found = inverse_curvature(moved, moved * curvatures)
    assert found is not None
    assert found.shape == (n,)
    assert math.exp(np.log(found).mean()) == pytest.approx(1)


def test_pairs_that_tell_nothing() -> None:
    assert inverse_curvature(np.ones((2, 3)), -np.ones((2, 3))) is None
    assert inverse_curvature(np.zeros((2, 3)), np.ones((2, 3))) is None
    assert relative(np.array([1.0, -1.0])) is None
    assert relative(np.array([[1.0, np.nan], [np.nan, 1.0]])) is None
    drawn = relative(np.array([1e-12, 1.0, 1e12]))
    assert drawn is not None
    assert drawn.max() / drawn.min() == pytest.approx(1e8)


# -- from method to method ---------------------------------------------------------------------------------------


def handed(text: str, loss: Any = quadratic, budget: int = 60, **options: Any) -> HandOver:
    """What the method hands over when its budget is spent."""
    run, _ = start(method(text), budget, loss=Recorded(loss), x0=[1.0, -1.0, 0.5, 1.5], **options)
    while run.step() is not None:
        pass
    found = run.optimizer.hand_over()
    run.finish()
    return found


@pytest.mark.parametrize("text", ["slsqp(ftol=1e-14)", "lbfgsb", "torch.lbfgs"])
def test_gradients_tell_the_shape(text: str) -> None:
    found = handed(text, bounds=None)
    assert found.covariance is not None
    assert found.sigma is None
    variances = np.diagonal(found.covariance)
    assert math.exp(np.log(variances).mean()) == pytest.approx(1)
    assert (np.diff(variances) < 0).all()  # the steeper, the narrower


@pytest.mark.parametrize("text", ["adam(lr=0.001)", "rmsprop(lr=0.001)", "torch.adagrad(lr=0.001)"])
def test_second_moments_tell_the_shape(text: str) -> None:
    found = handed(text, loss=lambda x: quadratic(x), bounds=None)
    assert found.covariance is not None
    assert found.covariance.shape == (4,)
    steepness = CURVATURES * np.abs([1.0, -1.0, 0.5, 1.5])
    assert np.array_equal(np.argsort(found.covariance), np.argsort(-steepness))
    assert handed("torch.sgd(lr=0.001)", bounds=None) == HandOver()


def test_scaled_weights_hand_over_in_solver_coordinates() -> None:
    scale = 1 / np.sqrt(CURVATURES)
    x = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    with hybridopt.Run(quadratic, x, "slsqp(ftol=1e-14)", budget=60, seed=0, scale=scale) as run:
        for _ in run:
            pass
        found = run.optimizer.hand_over()
    assert found.covariance is None or np.diagonal(found.covariance) == pytest.approx(np.ones(4), rel=0.2)


def test_the_report_says_what_was_handed() -> None:
    def reports(text: str) -> list[str]:
        run, _ = start(method(text), 90)
        with run:
            for _ in run:
                pass
        return [s.received for s in run.result().stages]

    assert reports("slsqp(evaluations=20) > cmaes") == ["", "point, covariance"]
    assert reports("slsqp(evaluations=20) > cmaes(handover=point)") == ["", "point"]
    assert reports("torch.adam(steps=5) > cmaes(evaluations=20) > slsqp")[1:] == ["point, variances", "point"]
    assert reports("de(evaluations=40) > pso")[1].endswith("points")


def test_off_is_the_point_alone() -> None:
    """What follows goes another way with the covariance, and begins at the same point without."""
    paths = []
    for text in ("slsqp(evaluations=20) > cmaes", "slsqp(evaluations=20) > cmaes(handover=point)"):
        run, loss = start(method(text), 60)
        with run:
            for _ in run:
                pass
        paths.append(loss.path)
    assert paths[0][:20] == paths[1][:20]
    assert paths[0][20:] != paths[1][20:]


def test_a_distance_becomes_a_learning_rate() -> None:
    x = torch.zeros(2, dtype=torch.float64)
    vector = hybridopt.ParameterVector(x)
    warm = HandOver(np.zeros(2), 1.0, sigma=0.5)

    def rate(text: str, warm: HandOver | None) -> float:
        run: Any = method(text).start(vector, 0, warm)
        found = float(run.optimizer.param_groups[0]["lr"])
        run.close()
        return found

    assert rate("adam", warm) == rate("torch.adam", warm) == rate("lion", warm) == 0.15
    assert rate("adam(lr=0.03)", warm) == 0.03
    assert rate("adam", None) == rate("adam", HandOver(np.zeros(2), 1.0)) == 1e-3
    assert (
        rate("torch.lbfgs", warm) == 1
    )  # no length, as with sgd, whose steps are as long as the gradient is
    assert rate("torch.sgd", warm) == rate("torch.sgd", None)
    assert method("adam").takes == {"sigma"}
    assert not method("adam(lr=0.03)").takes
    assert not method("torch.sgd").takes


def test_second_moments_become_the_roots_of_adams_own_scales() -> None:
    """Of a linear loss the root mean square of a gradient is its size."""
    slopes = torch.tensor([1.0, 16.0, 81.0, 256.0], dtype=torch.float64)
    found = handed("torch.adam(lr=0.001)", loss=lambda x: (slopes * x).sum(), bounds=None).covariance
    expected = slopes.numpy() ** -0.5
    assert found == pytest.approx(expected / np.exp(np.log(expected).mean()), rel=1e-6)


def test_a_hand_over_as_text() -> None:
    assert str(HandOver()) == "start"
    full = HandOver(np.zeros(2), 0.5, 0.1, np.eye(2), np.zeros((3, 2)), np.zeros(3))
    assert str(full) == "point, sigma 0.1, covariance, 3 points"
    assert str(full.only({"sigma"})) == "point, sigma 0.1"
    assert full.only(()).losses is None


def test_resume_after_a_hand_over() -> None:
    """The receiving stage's own state holds what it was handed."""
    chain = method("slsqp(evaluations=20) > cmaes(evaluations=30) > pso(swarmsize=5)")

    def run(cut: int | None) -> list[Any]:
        one, loss = start(chain, 80, bounds=BOX, loss=Recorded(rosenbrock))
        path: list[Any] = []
        for _ in range(cut or 0):
            one.step()
        if cut is not None:
            state = one.state_dict()
            one.finish()
            path, (one, loss) = loss.path, start(chain, 80, bounds=BOX, loss=Recorded(rosenbrock))
            one.load_state_dict(state)
        with one:
            for _ in one:
                pass
        return path + loss.path

    whole = run(None)
    for cut in (5, 19, 20, 21, 24, 26):
        assert run(cut) == whole, cut
