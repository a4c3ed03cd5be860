"""SLSQP and dual annealing: SciPy's own paths, bit for bit, and honest endings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch

import hybridopt
from hybridopt import Reason, method
from hybridopt.errors import BoundsError, MethodError
from tests.driving import rosenbrock

Points = list[list[float]]


def wavy(x: torch.Tensor) -> torch.Tensor:
    """Several minima, a valley, and different curvatures."""
    return rosenbrock(x) * 0.1 + torch.cos(3 * x).sum() + 5


STARTS: dict[str, tuple[list[float], Any]] = {
    "free": ([-1.2, 1.0, 0.3, -0.7], None),
    "boxed": ([-1.2, 1.0, 0.3, -0.7], (-1.5, 1.5)),
    "in_a_corner": ([-1.5, 1.5, 1.5, -1.5], (-1.5, 1.5)),
    "tight": ([0.1, 0.1, 0.1, 0.1], [(0.0, 0.2), (0.1, 0.5), (-0.3, 0.1), (0.0999, 0.1001)]),
    "half_bounded": ([-1.2, 1.0, 0.3, -0.7], [(-2, np.inf), (-np.inf, 1.2), (-np.inf, np.inf), (-1, 1)]),
}


def ours(text: str, x0: list[float], bounds: Any, budget: int = 3000, **options: Any) -> tuple[Points, Any]:
    """All points that our run evaluates, and its result."""
    points: Points = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        points.append(x.tolist())
        return wavy(x)

    x = torch.tensor(x0, dtype=torch.float64)
    box = None if bounds is None else np.broadcast_to(np.array(bounds, dtype=float), (len(x0), 2))
    return points, hybridopt.minimize(loss, x, text, budget=budget, bounds=box, **options)


class Direct:
    """The same loss and gradient as SciPy calls them."""

    def __init__(self) -> None:
        self.points: Points = []

    def fun(self, x: Any) -> float:
        self.points.append(x.tolist())
        return wavy(torch.tensor(x)).item()

    def jac(self, x: Any) -> Any:
        y = torch.tensor(x, requires_grad=True)
        return torch.autograd.grad(wavy(y), y)[0].numpy()


def pairs(bounds: Any, n: int = 4) -> Any:
    if bounds is None:
        return None
    return [tuple(row) for row in np.broadcast_to(np.array(bounds, dtype=float), (n, 2)).tolist()]


# -- SLSQP -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", STARTS)
@pytest.mark.parametrize("mode", ["none", "differences", "autograd"])
def test_slsqp_walks_scipys_path(place: str, mode: str) -> None:
    x0, bounds = STARTS[place]
    points, result = ours(f"slsqp(gradients={mode}, ftol=1e-9)", x0, bounds)
    direct = Direct()
    with np.errstate(all="ignore"):
        expected = scipy.optimize.minimize(
            direct.fun,
            np.array(x0),
            jac=direct.jac if mode == "autograd" else None,
            method="SLSQP",
            bounds=pairs(bounds),
            options={"ftol": 1e-9},
        )
    assert points == direct.points
    assert result.loss == expected.fun
    assert result.message == expected.message
    assert result.reason is (Reason.CONVERGED if expected.success else Reason.STALLED)
    if mode == "autograd":
        assert result.backward == expected.njev


@pytest.mark.parametrize("mode", ["none", "differences"])
def test_slsqp_walks_scipys_path_with_a_step_of_the_users(mode: str) -> None:
    x0, bounds = STARTS["boxed"]
    points, _ = ours(f"slsqp(gradients={mode}, eps=1e-3, maxiter=7)", x0, bounds)
    direct = Direct()
    scipy.optimize.minimize(
        direct.fun, np.array(x0), method="SLSQP", bounds=pairs(bounds), options={"eps": 1e-3, "maxiter": 7}
    )
    assert points == direct.points


def test_slsqp_stops_at_its_iteration_limit() -> None:
    _, result = ours("slsqp(maxiter=2)", *STARTS["free"])
    assert result.reason is Reason.STALLED
    assert result.message == "Iteration limit reached"
    assert not result.params["x"].isnan().any()


def test_slsqp_returns_its_own_point_not_a_probe() -> None:
    """SciPy does not return its best: probes of the differences may have seen lower losses, and are never its own."""
    points, result = ours("slsqp(gradients=differences, eps=0.3)", *STARTS["free"])
    own = [wavy(torch.tensor(p, dtype=torch.float64)).item() for p in points]
    assert result.best_loss == min(own) < result.loss
    for budget in range(1, 40):
        run_points, stopped = ours("slsqp(gradients=differences, eps=0.3)", *STARTS["free"], budget=budget)
        assert len(run_points) == budget
        assert stopped.loss in own
        # of each stencil of 4 only the centre is the method's own
        assert stopped.loss == own[0] if budget <= 5 else True


@pytest.mark.parametrize(
    "options, text",
    [
        ({"ftol": 0}, "scipy.slsqp: expected ftol > 0, got 0"),
        ({"maxiter": 0}, "scipy.slsqp: expected maxiter >= 1, got 0"),
        ({"maxiter": True}, "scipy.slsqp: expected maxiter to be a whole number, got True"),
        ({"eps": -1e-3}, "scipy.slsqp: expected eps > 0, got -0.001"),
    ],
)
def test_slsqp_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(MethodError) as caught:
        method("slsqp", **options)
    assert str(caught.value) == text


# -- dual annealing ----------------------------------------------------------------------------------------------


def annealed(direct: Direct, x0: list[float], bounds: Any, seed: int, **options: Any) -> Any:
    return scipy.optimize.dual_annealing(
        direct.fun, pairs(bounds), rng=np.random.default_rng(seed), x0=np.array(x0), **options
    )


@pytest.mark.parametrize("place", ["boxed", "in_a_corner", "tight"])
def test_annealing_without_gradients_walks_scipys_path(place: str) -> None:
    x0, bounds = STARTS[place]
    points, result = ours("dual_annealing(gradients=none, maxiter=40)", x0, bounds, 20_000, seed=5)
    direct = Direct()
    expected = annealed(direct, x0, bounds, 5, maxiter=40)
    # (SciPy adds 1e-10 to points at a lower bound: in a box narrower than that, ours is clipped)
    assert points == direct.points
    assert result.loss == expected.fun
    assert result.message == expected.message[0]
    assert result.reason is Reason.CONVERGED


def test_annealing_options_are_scipys() -> None:
    x0, bounds = STARTS["boxed"]
    options = {"maxiter": 60, "initial_temp": 50.0, "restart_temp_ratio": 0.1, "visit": 1.8, "accept": -9.0}
    points, _ = ours(str(method("dual_annealing", gradients="none", **options)), x0, bounds, 20_000, seed=6)
    direct = Direct()
    annealed(direct, x0, bounds, 6, **options)
    assert points == direct.points


@pytest.mark.parametrize("gradients", ["auto", "none"])
def test_annealing_without_local_search(gradients: str) -> None:
    x0, bounds = STARTS["boxed"]
    points, result = ours(
        f"dual_annealing(local_search=false, gradients={gradients}, maxiter=30)", x0, bounds, seed=7
    )
    direct = Direct()
    annealed(direct, x0, bounds, 7, maxiter=30, no_local_search=True)
    assert points == direct.points
    assert result.backward == 0


def test_annealing_with_gradients_is_scipy_with_our_local_search() -> None:
    """Autograd: as L-BFGS-B given `jac` through `minimizer_kwargs`, whose options are then SciPy's own defaults."""
    x0, bounds = STARTS["boxed"]
    points, result = ours("dual_annealing(gradients=autograd, maxiter=40)", x0, bounds, 20_000, seed=5)
    direct = Direct()
    expected = annealed(
        direct,
        x0,
        bounds,
        5,
        maxiter=40,
        minimizer_kwargs={
            "method": "L-BFGS-B",
            "jac": direct.jac,
            "bounds": pairs(bounds),
            "options": {"maxiter": 100},
        },
    )
    assert points == direct.points
    assert result.loss == expected.fun
    assert result.backward > 0


def test_annealing_stays_in_a_box_narrower_than_its_own_rounding() -> None:
    x = torch.full((3,), 3e-12, dtype=torch.float64)
    result = hybridopt.minimize(
        lambda x: ((x * 1e11 - 0.5) ** 2).sum(), x, "dual_annealing", budget=500, bounds=(0, 1e-11), seed=0
    )
    assert result.evaluations == 500
    assert 0 <= x.min() <= x.max() <= 1e-11


def test_annealing_needs_a_box() -> None:
    with pytest.raises(BoundsError, match=r"scipy.dual_annealing: expected finite bounds.*bounds=\(-1, 1\)"):
        ours("dual_annealing", *STARTS["half_bounded"])


@pytest.mark.parametrize(
    "options, text",
    [
        ({"maxiter": 0}, "maxiter >= 1, got 0"),
        ({"initial_temp": 0.0}, "initial_temp in (0.01, 5e4], got 0.0"),
        ({"restart_temp_ratio": 1.0}, "restart_temp_ratio in (0, 1), got 1.0"),
        ({"visit": 1.0001}, "visit in [1.01, 2.99], got 1.0001"),
        ({"visit": 3.0}, "visit in [1.01, 2.99], got 3.0"),
        ({"accept": -4.0}, "accept in (-1e4, -5], got -4.0"),
    ],
)
def test_annealing_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(MethodError) as caught:
        method("dual_annealing", **options)
    assert str(caught.value) == f"scipy.dual_annealing: expected {text}"


@pytest.mark.parametrize("visit", [1.01, 2.99])
def test_annealing_jumps_to_points_at_the_ends_of_visit(visit: float) -> None:
    points, _ = ours(f"dual_annealing(local_search=False, visit={visit})", *STARTS["boxed"], budget=200)
    assert len({tuple(x) for x in points}) > 100
    assert np.isfinite(points).all()


# -- both --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["slsqp(gradients=none)", "slsqp(gradients=autograd)"])
def test_scaled_coordinates_are_the_solvers_own(text: str) -> None:
    """With a scale the solver walks the path it would walk on the loss of the scaled weights."""
    scale = np.array([0.5, 4.0, 1.0, 0.25])  # powers of two: exact
    x0 = np.array(STARTS["free"][0])
    points: Points = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        points.append((x.numpy(force=True) / scale).tolist())
        return wavy(x)

    hybridopt.minimize(loss, torch.tensor(x0), text, budget=500, scale=scale)
    theirs: Points = []

    def fun(z: Any) -> float:
        theirs.append(z.tolist())
        return wavy(torch.tensor(z * scale)).item()

    def jac(z: Any) -> Any:
        y = torch.tensor(z * scale, requires_grad=True)
        return torch.autograd.grad(wavy(y), y)[0].numpy() * scale

    scipy.optimize.minimize(fun, x0 / scale, jac=jac if "autograd" in text else None, method="SLSQP")
    assert points == theirs
