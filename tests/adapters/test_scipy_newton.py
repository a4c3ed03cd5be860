"""SciPy's methods that use second derivatives."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import Reason
from hybridopt.errors import MemoryLimit, MethodError, MissingGradient
from hybridopt.testing import OptimizerContract
from hybridopt_scipy import Dogleg, NewtonCG, TrustExact, TrustKrylov, TrustNCG
from tests.driving import rosenbrock


class TestNewtonCG(OptimizerContract):
    method = NewtonCG()
    random = False
    evaluations: ClassVar[int] = 15


@pytest.mark.slow
class TestTrustNCG(OptimizerContract):
    method = TrustNCG()
    random = False
    evaluations: ClassVar[int] = 30


@pytest.mark.slow
class TestTrustKrylov(OptimizerContract):
    method = TrustKrylov()
    random = False
    evaluations: ClassVar[int] = 30


class TestTrustExact(OptimizerContract):
    method = TrustExact()
    random = False
    evaluations: ClassVar[int] = 15


@pytest.mark.slow
class TestDogleg(OptimizerContract):
    method = Dogleg()
    random = False
    evaluations: ClassVar[int] = 30

    def test_weight_without_gradient(self) -> None:
        """The Hessian is singular there, where SciPy's dogleg ends."""
        x = torch.ones(3, dtype=torch.float64)
        result = hybridopt.minimize(lambda x: x[0] ** 2, x, self.method, budget=50)
        assert result.reason is Reason.STALLED
        assert "non-psd Hessian" in result.message


METHODS = [NewtonCG(), TrustNCG(), TrustKrylov(), TrustExact(), Dogleg()]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func.hessian
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_walks_scipys_path(method: hybridopt.Method) -> None:
    """With the gradients and second derivatives that torch gives SciPy directly."""
    import scipy.optimize

    ours: list[list[float]] = []
    theirs: list[list[float]] = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        return rosenbrock(x)

    def recorded(x: torch.Tensor) -> torch.Tensor:
        ours.append(x.tolist())
        return loss(x)

    def fun(x: object) -> float:
        tensor = torch.as_tensor(x)
        theirs.append(tensor.tolist())
        return loss(tensor).item()

    start = torch.tensor([-1.2, 1.0, 0.8], dtype=torch.float64)
    result = hybridopt.minimize(recorded, start.clone(), type(method)(gradients="autograd"), budget=500)
    second: dict[str, object] = {
        "hessp": lambda x, p: torch.func.hessian(loss)(torch.as_tensor(x)).numpy() @ p
    }
    if not method.products:  # type: ignore[attr-defined]
        second = {"hess": lambda x: torch.func.hessian(loss)(torch.as_tensor(x)).numpy()}
    expected = scipy.optimize.minimize(
        fun,
        start.numpy(),
        method=method.solver,  # type: ignore[attr-defined]
        jac=lambda x: torch.func.grad(loss)(torch.as_tensor(x)).numpy(),
        **second,
    )
    assert result.best_loss < 1e-6
    # second derivatives computed in another order differ in the last bits, which a curved valley spreads
    assert abs(result.evaluations - len(theirs)) <= 2
    torch.testing.assert_close(torch.tensor(result.x), torch.tensor(expected.x), rtol=1e-4, atol=1e-4)
    distinct = [x for i, x in enumerate(ours) if i == 0 or x != ours[i - 1]]
    for a, b in zip(distinct[:4], theirs[:4], strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("cls", [TrustNCG, TrustKrylov, TrustExact, Dogleg])
def test_a_gradient_of_0_is_the_end(cls: Any) -> None:
    with pytest.raises(MethodError, match="expected gtol > 0, got 0"):
        cls(gtol=0)


FLAT: dict[str, tuple[Any, list[float]]] = {
    "linear": (lambda x: 3 * x.sum(), [1.0, 1.0]),
    "one": (lambda x: 3 * x.sum(), [1.0]),
    "rounded": (lambda x: ((x - 5) ** 2).sum().floor(), [1.0, 1.0]),
    "saddle": (lambda x: x[0] ** 2 - x[1] ** 2, [1.0, 1.0]),
    "shallow": (lambda x: 1e-9 * (x**2).sum(), [1.0, 1.0]),
}


@pytest.mark.filterwarnings("ignore:autograd refused")
@pytest.mark.parametrize("inexact", [True, False])
@pytest.mark.parametrize("name", FLAT)
def test_krylov_steps_are_not_read_from_memory_that_nobody_wrote(
    name: str, inexact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trlib = pytest.importorskip("scipy.optimize._trlib._trlib")
    loss, x0 = FLAT[name]

    def walk(junk: float) -> list[list[float]]:
        class Numpy:  # whose new arrays hold junk
            def __getattr__(self, attribute: str) -> Any:
                return getattr(np, attribute)

            def empty(self, *args: Any, **options: Any) -> Any:
                return np.full_like(np.empty(*args, **options), junk)

        monkeypatch.setattr(trlib, "np", Numpy())
        points: list[list[float]] = []

        def recorded(x: torch.Tensor) -> torch.Tensor:
            points.append(x.tolist())
            return cast("torch.Tensor", loss(x))

        x = torch.tensor(x0, dtype=torch.float64)
        hybridopt.minimize(recorded, x, TrustKrylov(inexact=inexact, gtol=1e-12), budget=20)
        return points

    paths = [walk(junk) for junk in (0.0, 1e3, -1e-3, math.nan)]
    assert paths[1:] == paths[:-1]
    assert np.isfinite(paths[0]).all()


class Kept(torch.autograd.Function):
    """x² whose gradient silently has no derivative of its own."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return 2 * g * x


def test_second_derivatives_that_are_silently_missing_are_found_out() -> None:
    with pytest.warns(RuntimeWarning, match=r"second derivatives disagree.*scipy.bfgs"):
        hybridopt.minimize(lambda x: Kept.apply(x).sum(), torch.ones(2), "trust_exact", budget=50)


def test_a_loss_that_cannot_be_differentiated_twice() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x[None], torch.zeros(1, 2), p=3.0).sum()

    with pytest.raises(MissingGradient, match=r"cannot be differentiated twice.*scipy.bfgs"):
        hybridopt.minimize(loss, torch.ones(2), "trust_exact", budget=50)


def test_a_closure_that_calls_backward() -> None:
    x = torch.ones(2, requires_grad=True)

    def closure() -> torch.Tensor:
        loss = (x**2).sum()
        loss.backward()
        return loss

    with pytest.raises(MissingGradient, match=r"no graph to the weights.*scipy.bfgs"):
        hybridopt.minimize(closure, [x], "newton_cg", budget=50)


MEASURE = """
import sys
import torch, hybridopt
def fit(n):
    f = lambda x: (torch.linspace(1, 11, n, dtype=x.dtype) * x**2 + torch.cos(x)).sum()
    hybridopt.minimize(f, torch.linspace(-1, 1, n, dtype=torch.float64), sys.argv[1], budget=3, seed=0)
    # not `getrusage`, which begins with what the process was when it was forked
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
before = fit(8)
print((fit(1200) - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
@pytest.mark.parametrize("cls", [TrustExact, Dogleg])
def test_memory_is_what_it_takes(cls: Any) -> None:
    """Of a process, since the Hessian is made outside NumPy."""
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, cls.name], capture_output=True, text=True, check=True
    )
    assert 0.75 < int(told.stdout) / cls().memory(1200) < 1.25


@pytest.mark.parametrize("cls", [TrustExact, Dogleg])
def test_what_does_not_fit_is_refused(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridopt.machine.available_memory", lambda: 60 * 500**2)
    with pytest.raises(MemoryLimit, match=rf"{cls.name}: .* for 500 weights"):
        hybridopt.minimize(lambda x: (x**2).sum(), torch.zeros(500), cls(), budget=5)
