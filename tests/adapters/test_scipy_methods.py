"""SciPy's solvers by one mechanism: each walks SciPy's own path, keeps its bounds, and ends by its status code."""

from __future__ import annotations

import dataclasses
import inspect
import math
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.optimize
import torch

import hybridopt
from hybridopt import Method, Reason, Run
from hybridopt.errors import MemoryLimit, MethodError, StateError
from hybridopt.optimizer import Answer, Kind, Need, Request
from hybridopt.solver import Ask, Start
from hybridopt.testing import OptimizerContract
from hybridopt_scipy import (
    BFGS,
    CG,
    COBYLA,
    COBYQA,
    DIRECT,
    LBFGSB,
    SHGO,
    SLSQP,
    TNC,
    BasinHopping,
    DifferentialEvolution,
    DualAnnealing,
    NelderMead,
    Powell,
    TrustConstr,
)
from tests.adapters.test_scipy import STARTS, Direct, pairs, wavy
from tests.driving import BOX, Recorded, rosenbrock
from tests.test_carrier import within

Points = list[list[float]]
VALUES = [NelderMead, Powell, COBYLA, COBYQA]
GRADIENTS = [CG, BFGS, LBFGSB, TNC, SLSQP, TrustConstr]
MINIMIZE: list[Any] = [*VALUES, *GRADIENTS]
GLOBAL: list[Any] = [DualAnnealing, BasinHopping, DifferentialEvolution, SHGO, DIRECT]
every_method = pytest.mark.parametrize("cls", [*MINIMIZE, *GLOBAL])
every_minimize = pytest.mark.parametrize("cls", MINIMIZE)


def run(
    method: Method, x0: list[float], bounds: Any, budget: int = 3000, dtype: torch.dtype = torch.float64
) -> tuple[Points, Any]:
    """All points that our run evaluates, and its result."""
    points: Points = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        points.append(x.tolist())
        return wavy(x)

    box = None if bounds is None else np.broadcast_to(np.array(bounds, dtype=float), (len(x0), 2))
    x = torch.tensor(x0, dtype=dtype)
    return points, hybridopt.minimize(loss, x, method, budget=budget, bounds=box, seed=5)


def without_gradients(cls: Any, **options: Any) -> Method:
    """The method, left to SciPy's own differences where it would follow gradients."""
    fields = {field.name for field in dataclasses.fields(cls)}
    made: Method = cls(**({"gradients": "none"} if "gradients" in fields else {}), **options)
    return made


def assert_same(points: Points, result: Any, direct: Direct, expected: Any) -> None:
    assert points == direct.points
    assert result.loss == expected.fun
    assert result.message == expected.message
    assert result.reason is (Reason.CONVERGED if expected.success else Reason.STALLED)


# -- the contract ------------------------------------------------------------------------------------------------


class TestNelderMead(OptimizerContract):
    method = NelderMead()
    random = False
    evaluations: ClassVar[int] = 40


class TestPowell(OptimizerContract):
    method = Powell()
    random = False
    evaluations: ClassVar[int] = 40


@pytest.mark.slow
class TestCOBYLA(OptimizerContract):
    method = COBYLA()
    random = False
    evaluations: ClassVar[int] = 40


class TestCOBYQA(OptimizerContract):
    method = COBYQA()
    bounds = BOX
    random = False
    evaluations: ClassVar[int] = 40


class TestCG(OptimizerContract):
    method = CG()
    random = False
    evaluations: ClassVar[int] = 40


class TestBFGS(OptimizerContract):
    method = BFGS()
    random = False
    evaluations: ClassVar[int] = 40


class TestLBFGSB(OptimizerContract):
    method = LBFGSB()
    bounds = BOX
    random = False
    evaluations: ClassVar[int] = 40


class TestTNC(OptimizerContract):
    method = TNC()
    random = False
    evaluations: ClassVar[int] = 40


@pytest.mark.slow
class TestTrustConstr(OptimizerContract):
    method = TrustConstr()
    bounds = BOX
    random = False
    evaluations: ClassVar[int] = 40


class TestBasinHopping(OptimizerContract):
    method = BasinHopping(stepsize=0.2, niter=20)
    random = True


class TestDifferentialEvolution(OptimizerContract):
    method = DifferentialEvolution(popsize=6, updating="deferred")
    random = True


class TestSHGO(OptimizerContract):
    method = SHGO()
    random = False


class TestDIRECT(OptimizerContract):
    method = DIRECT(maxfun=500)
    random = False


OTHERS: dict[str, tuple[Method, Any, bool]] = {
    "NelderMeadBounded": (NelderMead(adaptive=True), BOX, False),
    "PowellBounded": (Powell(), BOX, False),
    "COBYQAFree": (COBYQA(), None, False),
    **{
        f"{cls.__name__}_{mode}": (cls(gradients=mode), BOX if bounded and Need.BOUNDS in cls.uses else None, False)
        for cls in GRADIENTS
        for mode, bounded in (("autograd", False), ("differences", True), ("none", True))
    },
    "TrustConstrSR1": (TrustConstr(hess="sr1"), None, False),
    "BasinHoppingNone": (BasinHopping(gradients="none", niter=30), None, True),
    "BasinHoppingBounded": (BasinHopping(), BOX, True),
    "DifferentialEvolutionNone": (DifferentialEvolution(gradients="none"), None, True),
    "DifferentialEvolutionSobol": (DifferentialEvolution(init="sobol", strategy="rand1exp"), None, True),
    "SHGONone": (SHGO(gradients="none", iters=2), None, False),
    "SHGOSobol": (SHGO(sampling_method="sobol", n=16), None, False),
    "SHGOHalton": (SHGO(sampling_method="halton", n=20, gradients="differences"), None, False),
    "DIRECTOriginal": (DIRECT(locally_biased=False), None, False),
}  # fmt: skip

for _name, (_method, _bounds, _random) in OTHERS.items():
    _content = {
        "method": _method,
        "bounds": _bounds,
        "random": _random,
        "evaluations": 250 if _name == "BasinHoppingNone" else 60,
    }
    _made: Any = type(f"Test{_name}", (OptimizerContract,), _content)
    globals()[f"Test{_name}"] = pytest.mark.slow(_made)


# -- scipy.optimize.minimize: SciPy's own path -------------------------------------------------------------------


def scipy_options(cls: Any) -> dict[str, Any]:
    """Signature defaults of the private function behind the method: the only place where SciPy says them as data."""
    module, function = {
        NelderMead: ("_optimize", "_minimize_neldermead"),
        Powell: ("_optimize", "_minimize_powell"),
        COBYLA: ("_cobyla_py", "_minimize_cobyla"),
        COBYQA: ("_cobyqa_py", "_minimize_cobyqa"),
        CG: ("_optimize", "_minimize_cg"),
        BFGS: ("_optimize", "_minimize_bfgs"),
        LBFGSB: ("_lbfgsb_py", "_minimize_lbfgsb"),
        TNC: ("_tnc", "_minimize_tnc"),
        SLSQP: ("_slsqp_py", "_minimize_slsqp"),
        TrustConstr: ("_trustregion_constr", "_minimize_trustregion_constr"),
        DualAnnealing: ("_dual_annealing", "dual_annealing"),
        BasinHopping: ("_basinhopping", "basinhopping"),
        DifferentialEvolution: ("_differentialevolution", "differential_evolution"),
        SHGO: ("_shgo", "shgo"),
        DIRECT: ("_direct_py", "direct"),
    }[cls]
    parameters = inspect.signature(getattr(import_module(f"scipy.optimize.{module}"), function)).parameters
    return {name: p.default for name, p in parameters.items()}


@every_method
def test_options_and_defaults_are_scipys(cls: Any) -> None:
    theirs = scipy_options(cls)
    if cls is SHGO:  # these are read from a dictionary
        theirs |= {"f_tol": 1e-4, "symmetry": False, "minimize_every_iter": True, "local_iter": False}
    for field in dataclasses.fields(cls):
        if field.name not in ("gradients", "hess", "local_search") and field.default is not None:
            assert theirs[field.name] == field.default, field.name


def takes(cls: Any, *places: str) -> list[str]:
    """The starts that a method can begin at: some need a box, some take no bounds."""
    if Need.BOUNDS in cls.needs:
        return [place for place in places if place not in ("free", "half_bounded")]
    return [place for place in places if place == "free" or Need.BOUNDS in cls.uses]


@pytest.mark.parametrize("cls", [cls for cls in MINIMIZE if Need.BOUNDS not in cls.uses])
def test_bounds_that_cannot_be_kept_are_refused(cls: Any) -> None:
    with pytest.raises(StateError, match=rf"{cls.name}: it cannot keep within bounds"):
        run(cls(), *STARTS["boxed"])


@pytest.mark.parametrize(
    "cls, place",
    [
        (cls, place)
        for cls in MINIMIZE
        for place in takes(cls, "free", "boxed", "half_bounded", "tight")
        if (cls, place) != (TrustConstr, "tight")  # it starts at a bound, where SciPy would end at once
    ],
)
def test_walks_scipys_path(cls: Any, place: str) -> None:
    """Of a loss of float64 weights, without gradients of ours; limits as SciPy's, so it also ends alike."""
    x0, bounds = STARTS[place]
    options = {"maxiter": 25} if cls in (TrustConstr, COBYQA, Powell) else {}
    points, result = run(without_gradients(cls, **options), x0, bounds)
    direct, box = Direct(), None
    if bounds is not None:
        box = scipy.optimize.Bounds(*np.array(pairs(bounds)).T, keep_feasible=True)
    with np.errstate(all="ignore"):
        expected = scipy.optimize.minimize(
            direct.fun, np.array(x0), method=cls.solver, bounds=box, options=options
        )
    assert_same(points, result, direct, expected)


@pytest.mark.parametrize("cls, place", [(c, place) for c in GRADIENTS for place in takes(c, "free", "boxed")])
def test_walks_scipys_path_with_autograd(cls: Any, place: str) -> None:
    x0, bounds = STARTS[place]
    options = {"maxiter": 20} if cls is TrustConstr else {}
    points, result = run(cls(gradients="autograd", **options), x0, bounds)
    direct, box = Direct(), None
    if bounds is not None:
        box = scipy.optimize.Bounds(*np.array(pairs(bounds)).T, keep_feasible=True)
    expected = scipy.optimize.minimize(
        direct.fun, np.array(x0), jac=direct.jac, method=cls.solver, bounds=box, options=options
    )
    assert_same(points, result, direct, expected)
    gradients = expected.get("njev", result.backward)
    assert result.backward == gradients


@pytest.mark.parametrize("cls", [CG, BFGS, SLSQP])
def test_our_differences_are_scipys_on_float64(cls: Any) -> None:
    x0, _ = STARTS["free"]
    points, _ = run(cls(gradients="differences"), x0, None)
    direct = Direct()
    scipy.optimize.minimize(direct.fun, np.array(x0), method=cls.solver)
    assert points == direct.points


# each option with a value that is not its default
CHANGED: dict[Any, dict[str, Any]] = {
    NelderMead: {"maxiter": 7, "maxfev": 9, "xatol": 0.3, "fatol": 0.2, "adaptive": True},
    Powell: {"maxiter": 7, "maxfev": 9, "xtol": 0.3, "ftol": 0.2},
    COBYLA: {"rhobeg": 0.3, "tol": 0.01, "maxiter": 9, "f_target": 2.0},
    COBYQA: {"maxfev": 9, "maxiter": 7, "initial_tr_radius": 0.3, "final_tr_radius": 0.01, "f_target": 2.0,
             "scale": True},
    CG: {"gtol": 0.1, "norm": 2.0, "maxiter": 7, "c1": 0.01, "c2": 0.3, "eps": 1e-3},
    BFGS: {"gtol": 0.1, "norm": 2.0, "maxiter": 7, "xrtol": 0.1, "c1": 0.01, "c2": 0.3, "eps": 1e-3},
    LBFGSB: {"maxcor": 3, "ftol": 0.1, "gtol": 0.2, "maxfun": 9, "maxiter": 7, "maxls": 5, "eps": 1e-3},
    TNC: {"maxfun": 9, "ftol": 0.1, "xtol": 0.2, "gtol": 0.3, "maxCGit": 2, "eta": 0.5, "stepmx": 3.0,
          "accuracy": 1e-3, "minfev": -1.0, "rescale": 2.0, "eps": 1e-3},
    SLSQP: {"ftol": 0.1, "maxiter": 7, "eps": 1e-3},
    TrustConstr: {"xtol": 0.1, "gtol": 0.2, "barrier_tol": 0.3, "maxiter": 7, "initial_tr_radius": 0.4,
                  "initial_constr_penalty": 0.5, "initial_barrier_parameter": 0.6,
                  "initial_barrier_tolerance": 0.7},
    DualAnnealing: {"maxiter": 7, "initial_temp": 9.0, "restart_temp_ratio": 0.1, "visit": 2.0, "accept": -7.0},
    BasinHopping: {"niter": 7, "T": 2.0, "stepsize": 0.3, "interval": 3, "stepwise_factor": 0.5,
                   "target_accept_rate": 0.3, "niter_success": 2},
    DifferentialEvolution: {"strategy": "rand1bin", "maxiter": 7, "popsize": 4, "tol": 0.1, "mutation": 0.7,
                            "recombination": 0.4, "init": "random", "atol": 0.2},
    SHGO: {"n": 9, "iters": 2, "sampling_method": "sobol", "maxfev": 50, "maxev": 60, "maxiter": 3, "f_min": 1.0,
           "f_tol": 0.1, "minhgrd": 1, "symmetry": True, "minimize_every_iter": False, "local_iter": 2},
    DIRECT: {"eps": 0.01, "maxfun": 99, "maxiter": 7, "locally_biased": False, "f_min": 1.0, "f_min_rtol": 0.1,
             "vol_tol": 0.01, "len_tol": 0.2},
}  # fmt: skip
FUNCTIONS = {
    DualAnnealing: "dual_annealing",
    BasinHopping: "basinhopping",
    DifferentialEvolution: "differential_evolution",
    SHGO: "shgo",
    DIRECT: "direct",
}


class Capture:
    """In place of a SciPy function: what it is called with; asks one question and returns a given result."""

    def __init__(self, **result: Any) -> None:
        self.arguments: dict[str, Any] = {}
        self.result = {"status": 0, "success": True, "message": "said", "fun": 1.5, "x": np.zeros(2)} | result

    def __call__(self, fun: Callable[[Any], Any], *args: Any, **kwargs: Any) -> Any:
        self.arguments = kwargs | kwargs.get("options", {})
        fun(np.zeros(2))
        return scipy.optimize.OptimizeResult(self.result)


def captured(monkeypatch: pytest.MonkeyPatch, cls: Any, method: Method, **result: Any) -> tuple[Capture, Any]:
    capture = Capture(**result)
    monkeypatch.setattr(scipy.optimize, FUNCTIONS.get(cls, "minimize"), capture)
    bounds = BOX if Need.BOUNDS in cls.needs else None
    x = torch.zeros(2, dtype=torch.float64)
    return capture, hybridopt.minimize(lambda x: (x**2).sum() + 1.5, x, method, budget=9, bounds=bounds)


@every_method
def test_every_option_reaches_scipy(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    elsewhere = {"gradients", "hess", "local_search", "polish", "updating"}
    assert known - elsewhere - set(CHANGED[cls]) in (set(), {"eps"}), "an option is not tried here"
    capture, _ = captured(monkeypatch, cls, without_gradients(cls, **CHANGED[cls], **(
        {"polish": False} if cls is DifferentialEvolution else {})))  # fmt: skip
    for name, value in CHANGED[cls].items():
        assert value != {f.name: f.default for f in dataclasses.fields(cls)}[name]
        assert capture.arguments[name] == value


def test_the_update_of_the_hessian() -> None:
    counts = [run(TrustConstr(hess=h), *STARTS["free"])[1].evaluations for h in ("bfgs", "sr1")]
    direct = Direct()
    for hess, count in zip((scipy.optimize.BFGS(), scipy.optimize.SR1()), counts, strict=True):
        direct.points.clear()
        scipy.optimize.minimize(
            direct.fun, np.array(STARTS["free"][0]), jac=direct.jac, method="trust-constr", hess=hess
        )
        assert len(direct.points) == count - 1  # the check of autograd asks one more


@pytest.mark.parametrize(
    "method, text",
    [
        (lambda: NelderMead(maxiter=0), "scipy.nelder_mead: expected maxiter >= 1, got 0"),
        (lambda: NelderMead(xatol=-1), "scipy.nelder_mead: expected xatol >= 0, got -1"),
        (lambda: NelderMead(adaptive=1), "scipy.nelder_mead: expected adaptive to be True or False, got 1"),
        (lambda: Powell(xtol=0), "scipy.powell: expected xtol > 0, got 0"),
        (lambda: Powell(ftol=math.nan), "scipy.powell: expected ftol >= 0, got nan"),
        (
            lambda: COBYQA(initial_tr_radius=1e-7),
            "scipy.cobyqa: expected initial_tr_radius >= final_tr_radius, got 1e-07 and 1e-06",
        ),
        (lambda: COBYLA(rhobeg=0.0), "scipy.cobyla: expected rhobeg > 0, got 0.0"),
        (lambda: BFGS(c1=1.0), "scipy.bfgs: expected c1 in (0, 1), got 1.0"),
        (lambda: BFGS(maxiter=2.5), "scipy.bfgs: expected maxiter to be a whole number or None, got 2.5"),
        (
            lambda: TrustConstr(hess="dfp"),
            "scipy.trust_constr: expected hess to be one of bfgs, sr1, autograd, got 'dfp'",
        ),
        (
            lambda: TrustConstr(eps=1e-3, gradients="none"),
            "scipy.trust_constr: expected no eps with gradients='none', got 0.001; SciPy's own step is relative to "
            "the weights, gradients='differences' takes an absolute one",
        ),
        (
            lambda: DifferentialEvolution(mutation=2.0),
            "scipy.differential_evolution: expected mutation in [0, 2), or a (low, high) pair of such, got 2.0",
        ),
        (
            lambda: DifferentialEvolution(mutation=(0.1, 0.2, 0.3)),  # type: ignore[arg-type]
            "scipy.differential_evolution: expected mutation in [0, 2), or a (low, high) pair of such, "
            "got (0.1, 0.2, 0.3)",
        ),
        (lambda: DIRECT(vol_tol=1.5), "scipy.direct: expected vol_tol in [0, 1], got 1.5"),
        (lambda: SHGO(n=0), "scipy.shgo: expected n >= 1, got 0"),
        (lambda: BasinHopping(niter_success=-1), "scipy.basinhopping: expected niter_success >= 0, got -1"),
    ],
)
def test_wrong_options(method: Callable[[], Method], text: str) -> None:
    with pytest.raises(MethodError) as caught:
        method()
    assert str(caught.value) == text


# -- endings -----------------------------------------------------------------------------------------------------

CONVERGED = {
    NelderMead: {0}, Powell: {0}, COBYLA: {0, 1}, COBYQA: {0, 1, 2}, CG: {0}, BFGS: {0}, LBFGSB: {0},
    TNC: {0, 1, 2}, SLSQP: {0}, TrustConstr: {1, 2}, DualAnnealing: {0}, DIRECT: {3, 4, 5},
}  # fmt: skip


@every_method
def test_endings_go_by_the_code(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the text says."""
    method = DifferentialEvolution(polish=False) if cls is DifferentialEvolution else cls()
    if cls in CONVERGED:
        for status in range(-3, 40):
            _, result = captured(monkeypatch, cls, method, status=status, success=True, message="success!")
            expected = Reason.CONVERGED if status in CONVERGED[cls] else Reason.STALLED
            assert result.reason is expected, status
    else:  # they have no code but this one
        for success, expected in ((True, Reason.CONVERGED), (False, Reason.STALLED)):
            _, result = captured(monkeypatch, cls, method, success=success, message=["success!", "twice"])
            assert result.reason is expected
    assert result.message.startswith("success!")
    assert result.loss == 1.5
    _, result = captured(monkeypatch, cls, method, status=min(CONVERGED.get(cls, {0})), fun=math.nan)
    assert result.reason is Reason.STALLED


@every_method
def test_scipys_warnings_stay_inside(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed line search is in the status; as an error, a warning would end the run, and a replay would repeat it."""

    class Warning_(Capture):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            place = ("_optimize.py", 1, "scipy.optimize._optimize")
            warnings.warn_explicit("line search failed", RuntimeWarning, *place)
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(scipy.optimize, FUNCTIONS.get(cls, "minimize"), Warning_())
    method = without_gradients(cls, **({"polish": False} if cls is DifferentialEvolution else {}))
    bounds = BOX if Need.BOUNDS in cls.needs else None
    x = torch.zeros(2, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hybridopt.minimize(lambda x: (x**2).sum() + 1.5, x, method, budget=9, bounds=bounds)
    assert caught == []


@every_minimize
def test_an_iteration_limit_is_no_convergence(cls: Any) -> None:
    _, result = run(
        cls(maxfun=3) if cls is TNC else cls(maxiter=2 if cls is not COBYLA else 9), *STARTS["free"]
    )
    assert result.reason is Reason.STALLED
    assert math.isfinite(result.loss)


def test_losses_that_are_never_finite_are_not_1e30() -> None:
    """PRIMA's COBYLA replaces them by 1e30 and returns that as the loss."""
    x = torch.zeros(2, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="loss nan"):
        result = hybridopt.minimize(lambda x: x.sum() * math.nan, x, COBYLA(), budget=100)
    assert result.loss == math.inf
    assert result.reason is Reason.NON_FINITE


# -- bounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls, place, dtype",
    [
        (cls, place, dtype)
        for cls in [*MINIMIZE, *GLOBAL]
        for place in takes(cls, "in_a_corner", "tight", "half_bounded")
        for dtype in (torch.float64, torch.float32)
        if (place, dtype) != ("tight", torch.float32)  # its start is no float32 number inside the bounds
    ],
)
def test_bounds_are_kept(cls: Any, place: str, dtype: torch.dtype) -> None:
    x0, bounds = STARTS[place]
    points, result = run(cls(), x0, bounds, 150, dtype)
    low, high = np.broadcast_to(np.array(bounds, dtype=float), (4, 2)).T
    assert (np.array(points) >= low).all()
    assert (np.array(points) <= high).all()
    assert (result.params["x"].numpy() >= low).all()
    assert (result.params["x"].numpy() <= high).all()


@pytest.mark.parametrize("cls", [cls for cls in [*MINIMIZE, *GLOBAL] if Need.BOUNDS in cls.needs | cls.uses])
def test_points_that_stray_by_rounding_are_brought_inside(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is the point that SciPy returns."""
    outside, seen = np.array([2.0 + 1e-12, -2.0 - 1e-12]), []

    def solver(fun: Callable[[Any], Any], *args: Any, **kwargs: Any) -> Any:
        return scipy.optimize.OptimizeResult(
            status=3, success=True, message="", fun=fun(outside.copy()), x=outside
        )

    def loss(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.tolist())
        return (x**2).sum()

    monkeypatch.setattr(scipy.optimize, FUNCTIONS.get(cls, "minimize"), solver)
    method = without_gradients(cls, **({"polish": False} if cls is DifferentialEvolution else {}))
    x = torch.zeros(2, dtype=torch.float64)
    result = hybridopt.minimize(loss, x, method, budget=9, bounds=BOX)
    assert seen[0] == [2.0, -2.0]
    assert result.loss == 8.0
    assert np.array(result.x).tolist() == [2.0, -2.0]


@pytest.mark.parametrize("cls", [cls for cls in MINIMIZE if Need.BOUNDS in cls.uses])
@pytest.mark.parametrize("corner", [(-1.0, 2.0), (-1.0, -1.0), (2.0, 2.0), (1e-9 - 1, 0.0)])
def test_a_start_in_a_corner_is_not_the_end(cls: Any, corner: tuple[float, float]) -> None:
    """SciPy's trust-constr takes any point at a bound for converged; its Nelder-Mead is flat at a low bound below 0."""
    x = torch.tensor(corner, dtype=torch.float64)
    result = hybridopt.minimize(
        lambda x: ((x - 0.5) ** 2 * torch.tensor([1.0, 3.0])).sum(), x, cls(), budget=500, bounds=(-1, 2)
    )
    assert result.best_loss < 1e-6


# -- weights of few digits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", ["auto", "none", "differences"])
@pytest.mark.parametrize("turned", [False, True])
def test_trust_constr_backs_away_from_constraints_that_are_nan(gradients: Any, turned: bool) -> None:
    def root(x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(0.5 - x.sum()) - 0.1

    x = torch.full((2,), -1.0, dtype=torch.float64)
    constraint = hybridopt.Constraint(lambda x: -root(x), upper=0.0) if turned else hybridopt.Constraint(root)
    with pytest.warns(RuntimeWarning, match="nan or inf counts as broken"):
        result = hybridopt.minimize(
            lambda x: ((x - 1) ** 2).sum(),
            x,
            TrustConstr(gradients=gradients),
            budget=300,
            constraints=constraint,
        )
    assert result.best_loss == pytest.approx(1.14005, abs=1e-3)
    assert x.sum() <= 0.49 + 1e-6


def test_trust_constr_does_not_converge_where_a_constraint_is_nan() -> None:
    x = torch.full((2,), 2.0, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="nan or inf counts as broken"):
        result = hybridopt.minimize(
            lambda x: ((x - 1) ** 2).sum(),
            x,
            TrustConstr(),
            budget=300,
            constraints=lambda x: torch.sqrt(0.5 - x.sum()),
        )
    assert result.reason is not Reason.CONVERGED


@pytest.mark.parametrize("cls", GRADIENTS)
@pytest.mark.parametrize("mode", ["none", "differences"])
def test_float32_without_gradients(cls: Any, mode: Any) -> None:
    """SciPy's own step is lost in the rounding: it reports success at the start, where the loss is 1016."""
    x = torch.tensor([-1.2, 1.0, -1.2, 1.0, -1.2], dtype=torch.float32)
    options = {"maxiter": 500} if cls in (SLSQP, TrustConstr) else {"maxfun": 1000} if cls is TNC else {}
    result = hybridopt.minimize(rosenbrock, x, cls(gradients=mode, **options), budget=10_000)
    assert result.best_loss < (3e-2 if cls in (CG, TNC) else 5e-3)


@pytest.mark.parametrize(
    "cls, options",
    [(DualAnnealing, {}), (BasinHopping, {}), (DifferentialEvolution, {"popsize": 4}), (SHGO, {})],
)
def test_float32_in_the_local_search_of_a_global_one(cls: Any, options: Any) -> None:
    """Its end is a minimum of the loss in float64, as near as float32 weights come."""
    x = torch.tensor([0.3, -0.4], dtype=torch.float32)
    box = (-0.6, 1.1)

    def bowl(x: torch.Tensor) -> torch.Tensor:
        return ((x - 0.3217) ** 2).sum() + 3

    options = {"maxiter": 1, **options} if cls is DifferentialEvolution else options
    result = hybridopt.minimize(bowl, x, cls(gradients="none", **options), budget=400, bounds=box, seed=1)
    assert abs(result.best_loss - 3) < 1e-6


def test_truncated_newton_differs_gradients_by_the_weights_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, accuracy in ((torch.float32, 2**-11.5), (torch.float64, 0.0)):
        capture = Capture()
        monkeypatch.setattr(scipy.optimize, "minimize", capture)
        hybridopt.minimize(lambda x: (x**2).sum() + 1.5, torch.ones(2, dtype=dtype), TNC(), budget=9)
        assert capture.arguments["accuracy"] == pytest.approx(accuracy)


# -- global methods: SciPy's own path ----------------------------------------------------------------------------


def test_basinhopping_walks_scipys_path() -> None:
    x0, box = STARTS["boxed"]
    for bounds in (None, box):
        points, result = run(BasinHopping(gradients="none", niter=5), x0, bounds)
        direct = Direct()
        arguments = {} if bounds is None else {"bounds": pairs(bounds)}
        expected = scipy.optimize.basinhopping(
            direct.fun, np.array(x0), niter=5, minimizer_kwargs=arguments, rng=np.random.default_rng(5)
        )
        assert points == direct.points
        assert result.loss == expected.fun
        assert result.message == expected.message[0]


def test_basinhopping_with_gradients_is_scipys_with_jac() -> None:
    x0, _ = STARTS["free"]
    points, result = run(BasinHopping(gradients="autograd", niter=5), x0, None)
    direct = Direct()
    scipy.optimize.basinhopping(
        direct.fun,
        np.array(x0),
        niter=5,
        minimizer_kwargs={"jac": direct.jac},
        rng=np.random.default_rng(5),
    )
    assert points == direct.points
    assert result.backward > 0


@pytest.mark.parametrize("updating", ["immediate", "deferred"])
@pytest.mark.parametrize("polish", [True, False])
def test_differential_evolution_walks_scipys_path(updating: Any, polish: bool) -> None:
    x0, bounds = STARTS["boxed"]
    options: dict[str, Any] = {"updating": updating, "polish": polish, "maxiter": 6, "popsize": 5}
    points, result = run(DifferentialEvolution(gradients="none", **options), x0, bounds)
    direct = Direct()
    expected = scipy.optimize.differential_evolution(
        direct.fun, pairs(bounds), x0=np.array(x0), rng=np.random.default_rng(5), **options
    )
    assert points == direct.points
    assert result.loss == expected.fun
    assert result.message == expected.message
    assert result.reason is Reason.STALLED


def test_differential_evolution_begins_at_a_bound() -> None:
    """SciPy scales the box to [0, 1], and a bound by rounding out of it."""
    rng = np.random.default_rng(0)
    for width in (1e-9, 1.0, 1e9):
        for lower in rng.normal(size=(20, 3)):
            upper = lower + width * rng.random(3)
            for x0 in (lower, upper):
                points, _ = run(
                    DifferentialEvolution(popsize=2),
                    x0.tolist(),
                    np.stack([lower, upper], 1).tolist(),
                    budget=1,
                )
                np.testing.assert_allclose(points[0], x0, rtol=1e-15, atol=1e-15 * width)


def test_a_deferred_generation_is_one_question() -> None:
    asked: list[tuple[Kind, int]] = []

    def question(request: Request) -> Answer:
        assert request.x is not None
        asked.append((request.kind, len(request.x)))
        return Answer(0.0, (request.x**2).sum(1))

    start = Start(np.full(3, 0.5), np.full(3, -2.0), np.full(3, 2.0), np.full(3, 2.2e-16), 1)
    method = DifferentialEvolution(updating="deferred", popsize=4, maxiter=5, tol=0.0, polish=False)
    method.solve(Ask(question, []), start)
    assert asked == [(Kind.POPULATION, 12)] * 6  # the first population and five generations


def test_polishing_uses_gradients() -> None:
    x0, bounds = STARTS["boxed"]
    _, result = run(DifferentialEvolution(maxiter=1), x0, bounds)
    assert result.backward > 3
    _, rough = run(DifferentialEvolution(maxiter=1, polish=False), x0, bounds)
    assert rough.backward == 0
    assert result.loss < rough.loss


@pytest.mark.parametrize(
    "options",
    [{}, {"iters": 2}, {"sampling_method": "sobol", "n": 20}, {"sampling_method": "halton", "n": 20}],
)
@pytest.mark.parametrize("mode", ["none", "autograd"])
def test_shgo_walks_scipys_path(options: dict[str, Any], mode: Any) -> None:
    x0, bounds = STARTS["boxed"]
    points, result = run(SHGO(gradients=mode, **options), x0[:3], bounds)
    direct = Direct()
    arguments = {"minimizer_kwargs": {"method": "SLSQP", "jac": direct.jac, "options": {"ftol": 1e-12}}}
    expected = scipy.optimize.shgo(
        direct.fun, pairs(bounds, 3), **options, **(arguments if mode == "autograd" else {})
    )
    assert points == direct.points
    assert result.loss == expected.fun
    assert result.message == expected.message


@pytest.mark.parametrize("mode", ["auto", "autograd", "differences"])
@pytest.mark.parametrize("name, box", [("shgo", (-3, 3)), ("basinhopping", None), ("basinhopping", (-3, 3))])
def test_a_global_search_may_see_no_finite_loss_at_first(name: str, box: Any, mode: str) -> None:
    """SHGO never looks at the start, and basin hopping leaps away from it: nan there is a rejected point."""
    asked = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        asked.append(x.tolist())
        bad = x[0].item() < -2.9
        return ((x - 0.3) ** 2).sum() * (math.nan if bad else 1.0)

    first = 0.5 if name == "shgo" else -2.95
    x = torch.full((3,), first, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="loss nan at evaluation 1: rejected"):
        result = hybridopt.minimize(loss, x, f"{name}(gradients={mode})", budget=150, bounds=box, seed=0)
    assert asked[0][0] < -2.9
    assert result.best_loss < 1e-10


@pytest.mark.parametrize("locally_biased", [True, False])
def test_direct_walks_scipys_path(locally_biased: bool) -> None:
    x0, bounds = STARTS["boxed"]
    points, result = run(DIRECT(maxfun=700, locally_biased=locally_biased), x0, bounds)
    direct = Direct()
    expected = scipy.optimize.direct(direct.fun, pairs(bounds), maxfun=700, locally_biased=locally_biased)
    assert_same(points, result, direct, expected)


# -- one at a time, several at once ------------------------------------------------------------------------------

SMALL: list[Method] = [
    *[cls() for cls in MINIMIZE], BasinHopping(), DifferentialEvolution(popsize=4),
    DifferentialEvolution(popsize=4, updating="deferred"), DualAnnealing(), SHGO(), DIRECT(),
]  # fmt: skip


def begin(method: Method, i: int, budget: int) -> tuple[Run, Recorded]:
    """A run of its own: the start differs with i, and so does the seed."""
    loss = Recorded()
    bounds = BOX if Need.BOUNDS in method.needs else None
    x = torch.tensor([-1.2, 1.0 + i / 8, 0.3], dtype=torch.float64)
    return Run(loss, x, method, budget=budget, bounds=bounds, seed=i), loss


def alone(method: Method, i: int, budget: int) -> list[Any]:
    run, loss = begin(method, i, budget)
    with run:
        for _ in run:
            pass
    return loss.path


@pytest.mark.parametrize("method", SMALL, ids=str)
def test_interleaved_runs_are_as_alone(method: Method) -> None:
    """COBYQA among them: a suspended one holds a lock of SciPy's, without which no other begins."""
    copies, budget = 3, 30

    def work() -> list[Any]:
        runs = [begin(method, i, budget) for i in range(copies)]
        order = np.random.default_rng(2)
        live = list(range(copies))
        while live:
            i = live[order.integers(len(live))]
            if runs[i][0].step() is None:
                live.remove(i)
        for run, _ in runs:
            run.finish()
        return [loss.path for _, loss in runs]

    assert within(60, work) == [alone(method, i, budget) for i in range(copies)]


def test_two_cobyqa_in_two_threads() -> None:
    expected = [alone(COBYQA(), i, 25) for i in range(2)]

    def work() -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda i: alone(COBYQA(), i, 25), range(2)))

    assert within(120, work) == expected


def test_cobyqa_inside_cobyqas_loss() -> None:
    def nested(x: torch.Tensor) -> torch.Tensor:
        y = torch.full((2,), 0.5, dtype=torch.float64)
        inner = hybridopt.minimize(
            lambda y: ((y - x.detach().sum()) ** 2).sum(), y, COBYQA(), budget=8, bounds=(-9, 9)
        )
        assert inner.evaluations == 8
        return rosenbrock(x) + 1e-3 * inner.best_loss

    def work() -> list[Any]:
        loss = Recorded(nested)
        x = torch.tensor([-1.2, 1.0], dtype=torch.float64)
        hybridopt.minimize(loss, x, COBYQA(), budget=12, bounds=BOX)
        return loss.path

    path = within(60, work)
    assert len(path) == 12
    assert within(60, work) == path


@pytest.mark.parametrize("method", SMALL, ids=str)
def test_closed_by_a_budget_of_any_size(method: Method, capfd: pytest.CaptureFixture[str]) -> None:
    """In the middle of anything: exactly that many evaluations, and nothing is printed."""
    for budget in (1, 2, 3, 5, 8, 13, 21):
        path = alone(method, 1, budget)
        assert len(path) == budget
    assert capfd.readouterr() == ("", "")


# -- memory ------------------------------------------------------------------------------------------------------


def peak(method: Any, n: int, questions: int) -> int:
    """Bytes that NumPy and Python hold at most while the solver answers so many questions, on top of what was."""

    class Enough(Exception):
        pass

    left = [questions]

    def question(request: Request) -> Answer:
        x = request.x
        assert x is not None
        left[0] -= 1
        if not left[0]:
            raise Enough
        if request.kind is Kind.GRADIENT:
            return Answer(gradient=2 * weights * x - np.sin(x))
        return Answer(float((weights * x**2 + np.cos(x)).sum()))

    weights = 1 + np.random.default_rng(0).random(n) * 10
    box = 2.0 if Need.BOUNDS in method.needs or isinstance(method, TrustConstr) else math.inf
    start = Start(np.linspace(-1, 1, n), np.full(n, -box), np.full(n, box), np.full(n, 2.2e-16), 0)
    tracemalloc.start()
    try:
        method.solve(Ask(question, []), start)
    except Enough:
        pass
    finally:
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found


@pytest.mark.parametrize(
    "method, n, questions",
    [
        (NelderMead(), 300, 400),
        (Powell(), 300, 40),
        (COBYLA(maxiter=400), 300, 305),
        pytest.param(COBYQA(), 200, 405, marks=pytest.mark.slow),
        (BFGS(gradients="autograd"), 500, 30),
        (SLSQP(gradients="autograd"), 300, 6),
        (TrustConstr(gradients="autograd"), 500, 20),
        (DifferentialEvolution(), 100, 1600),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "",
)
def test_memory_is_what_it_takes(method: Any, n: int, questions: int) -> None:
    peak(method, 3, 10)  # what is imported on first use does not count
    formula = method.memory(n)
    assert 0.9 * formula < peak(method, n, questions) < 1.5 * formula + 1e5


@pytest.mark.parametrize(
    "cls", [NelderMead, Powell, COBYLA, COBYQA, BFGS, SLSQP, TrustConstr, DIRECT, SHGO, BasinHopping]
)
def test_what_does_not_fit_is_refused(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridopt.machine.available_memory", lambda: 2**20)
    bounds = BOX if Need.BOUNDS in cls.needs else None
    with pytest.raises(MemoryLimit, match=rf"{cls.name}: .* for 500 weights"):
        hybridopt.minimize(lambda x: (x**2).sum(), torch.zeros(500), cls(), budget=5, bounds=bounds)


def test_basinhopping_within_bounds_needs_no_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridopt.machine.available_memory", lambda: 2**20)
    result = hybridopt.minimize(
        lambda x: (x**2).sum(), torch.ones(500), BasinHopping(), budget=20, bounds=(-2, 2)
    )
    assert result.best_loss < 1e-6
