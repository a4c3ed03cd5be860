"""Gradients for solvers: autograd refused where it is wrong, accepted where it is right; differences that fit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize._numdiff import approx_derivative
from torch import Tensor, nn

import hybridopt
from hybridopt import Objective, Result, method
from hybridopt.errors import MethodError, MissingGradient, NonFiniteLoss
from hybridopt.gradients import Derivative, Differences, GradientMode
from hybridopt.optimizer import Answer, Kind, Request
from hybridopt.solver import Ask, Start
from tests.driving import rosenbrock

AUTO = "slsqp"


def minimize(
    loss: Callable[..., Any], target: Any, text: str = AUTO, budget: Any = 300, **options: Any
) -> Result:
    return hybridopt.minimize(loss, target, text, budget=budget, seed=0, **options)


def refused(loss: Callable[..., Any], target: Any, match: str, **options: Any) -> Result:
    """The run's result, after the one warning that autograd was refused."""
    with pytest.warns(RuntimeWarning, match=match) as caught:
        result = minimize(loss, target, **options)
    assert len(caught) == 1
    assert [note for note in result.notes if "autograd refused" in note] == [str(caught[0].message)]
    return result


def identity_problem() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """The seed comparison's problem (issue 2)."""
    torch.manual_seed(42)
    np.random.seed(42)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).double()
    x = torch.randn(32, 2).double()
    x[:, 1] *= 1000
    hybridopt.ParameterVector(model).write(0.1 * np.random.randn(10))
    return model, lambda m: ((m(x) - x) ** 2).mean()


# -- auto: refused -----------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two named weights."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([0.3, -0.4], dtype=dtype))
        self.second = nn.Parameter(torch.tensor([0.7], dtype=dtype))


def square(x: Tensor) -> Tensor:
    return ((x - 2) ** 2).sum()


def test_rounded_weights_are_refused_by_name() -> None:
    """`torch.round` has gradient exactly 0: trusted, SLSQP reports success after one evaluation."""
    result = refused(
        lambda m: square(m.first) + square(torch.round(m.second * 8) / 8),
        Pair(),
        "gradient of exactly 0, or none, for 'second'; using differences",
    )
    assert result.best_loss < 2.0  # the other tensor's share was minimised


def test_weights_outside_the_graph_are_refused_by_name() -> None:
    result = refused(
        lambda m: square(m.first) + square(m.second.detach()), Pair(), "none, for 'second'; using"
    )
    assert result.best_loss < 1e-6


def test_weights_missing_within_a_tensor_are_refused_by_name() -> None:
    """Half of a tensor is detached: its gradient is not 0, only wrong."""
    result = refused(
        lambda x: square(x[:1].detach()) + square(x[1:]),
        torch.zeros(2, dtype=torch.float64),
        r"disagrees with the change of the loss along it \(it is 0 for some weights of 'x'\)",
    )
    assert result.best_loss < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_through_gradients_are_refused(dtype: torch.dtype) -> None:
    def loss(x: Tensor) -> Tensor:
        return square((torch.round(x * 2) / 2).detach() + x - x.detach())

    refused(loss, torch.full((3,), 0.6, dtype=dtype), "disagrees with the change")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipped_gradients_are_refused(dtype: torch.dtype) -> None:
    def loss(x: Tensor) -> Tensor:
        y = x.clone()
        if y.requires_grad:
            y.register_hook(lambda g: g.clamp(-0.5, 0.5))
        return square(y)

    result = refused(loss, torch.zeros(3, dtype=dtype), "disagrees with the change")
    assert result.best_loss < 1e-4


def test_clipped_gradients_of_a_closure_are_refused() -> None:
    """A closure that calls backward() and clips, as training loops do, misleads SLSQP."""
    model = Pair()

    def closure() -> Tensor:
        model.zero_grad()
        loss = square(model.first) + square(model.second)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss

    result = refused(closure, model, "disagrees with the change")
    assert result.best_loss < 1e-6


@pytest.mark.parametrize(
    "loss", [lambda x: square(x).detach(), lambda x: square(x).item(), lambda x: square(x).detach().numpy()]
)
def test_a_loss_without_a_graph_is_differenced_without_a_warning(loss: Any) -> None:
    x = torch.zeros(3, dtype=torch.float64)
    result = minimize(loss, x)
    assert result.best_loss < 1e-6
    assert result.backward == 0
    assert result.notes == (
        "autograd refused: the loss has no graph to the weights; using differences (gradients='differences')",
    )


def test_a_refusal_costs_one_evaluation_and_two_gradients_of_it() -> None:
    calls = []

    def loss(x: Tensor) -> Tensor:
        calls.append(x.tolist())
        return square(torch.round(x * 8) / 8)

    with pytest.warns(RuntimeWarning, match="autograd refused"):
        result = minimize(loss, torch.zeros(2, dtype=torch.float64), budget=2)
    assert (result.evaluations, result.forward, result.backward, len(calls)) == (2, 2, 2, 2)


# -- auto: accepted ----------------------------------------------------------------------------------------------


def accepted(loss: Callable[..., Any], target: Any, **options: Any) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = minimize(loss, target, **options)
    assert result.notes == ()
    assert result.backward >= 2
    return result


def test_accepting_costs_one_evaluation_and_one_gradient() -> None:
    """Against gradients='autograd': the same path with one probe and its gradient put in after the first point."""
    paths = {}
    for mode in ("auto", "autograd"):
        model, loss = identity_problem()
        seen: list[tuple[float, ...]] = []

        def recorded(m: nn.Module, loss: Any = loss, seen: Any = seen) -> Tensor:
            seen.append(tuple(v for p in m.parameters() for v in p.flatten().tolist()))
            return loss(m)  # type: ignore[no-any-return]

        paths[mode] = seen, minimize(recorded, model, method(AUTO, gradients=mode), budget=500)  # type: ignore[arg-type]
    (auto, a), (autograd, b) = paths["auto"], paths["autograd"]
    assert auto[:1] + auto[2:] == autograd
    assert (a.evaluations, a.forward, a.backward) == (b.evaluations + 1, b.forward + 1, b.backward + 1)
    assert a.best_loss == b.best_loss <= 0.7830542


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-6, 1e-3, 1e-1, 1.0])
def test_rosenbrock_is_accepted_at_every_distance_from_its_optimum(
    dtype: torch.dtype, distance: float
) -> None:
    for seed in range(5):
        direction = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        accepted(rosenbrock, (1 + distance * direction).to(dtype), budget=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_identity_problem_is_accepted_at_its_start_and_at_its_optimum(dtype: torch.dtype) -> None:
    model, loss = identity_problem()
    accepted(loss, model, text="slsqp(ftol=1e-12)", budget=500)
    accepted(loss, model, budget=4)
    narrow, loss = identity_problem()
    narrow.to(dtype)
    x = torch.randn(32, 2, dtype=dtype)
    accepted(lambda m: ((m(x) - x) ** 2).mean(), narrow, budget=4)


def first_look(loss: Callable[..., Any], target: Any) -> list[str]:
    """What `auto` notes at the start point (SLSQP itself would be slow at this size)."""
    notes: list[str] = []
    with Objective(loss, target) as objective:
        start = Start.at(objective.vector, 0, None)
        Derivative(Ask(objective.answer, notes), start, "auto").fun(start.x0)
        assert objective.ledger.backward == 2
    return notes


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trained_networks_are_accepted(depth: int, dtype: torch.dtype) -> None:
    """Thousands of float32 weights, each moved by a full step, made a right gradient look wrong by up to 77 %."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(64 if layers else 16, 64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64 if layers else 16, 4)).to(dtype)
    x = 3 * torch.randn(300, 16, dtype=dtype)
    y = (x[:, :4] * x[:, 4:8]).argmax(1)

    def loss(m: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(m(x), y)

    assert first_look(loss, model) == []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert first_look(loss, model) == []


def test_rounding_of_a_large_loss_is_no_disagreement() -> None:
    """Near its optimum the loss changes by less than its own last digit."""
    for offset in (0.0, 1e3, -1e5):
        accepted(lambda x, offset=offset: square(x) + offset, torch.full((3,), 2.001), budget=4)


def test_at_bounds_the_check_steps_inwards() -> None:
    for corner in (-1.0, 1.0):
        accepted(square, torch.full((3,), corner, dtype=torch.float64), bounds=(-1, 1), budget=5)


def test_a_surrogate_need_not_agree() -> None:
    """The user chose it: it is used as it is, and nothing is spent on a check."""
    result = minimize(
        lambda x: torch.round(square(x)), torch.zeros(2, dtype=torch.float64), surrogate=square, budget=1
    )
    assert (result.evaluations, result.forward, result.backward, result.notes) == (1, 2, 1, ())


# -- other modes -------------------------------------------------------------------------------------------------


def test_autograd_is_trusted_without_a_look() -> None:
    x = torch.zeros(2, dtype=torch.float64)
    result = minimize(lambda x: square(torch.round(x)), x, "slsqp(gradients=autograd)")
    assert result.evaluations == 1


def test_autograd_without_a_graph_is_an_error() -> None:
    with pytest.raises(MissingGradient, match="gradients='differences'"):
        minimize(lambda x: square(x).item(), torch.zeros(2), "slsqp(gradients=autograd)")


def test_differences_take_no_gradients() -> None:
    result = minimize(square, torch.zeros(2, dtype=torch.float64), "slsqp(gradients=differences)")
    assert result.backward == 0
    assert result.best_loss < 1e-6


@pytest.mark.parametrize("name", ["slsqp", "dual_annealing"])
def test_unknown_mode(name: str) -> None:
    with pytest.raises(
        MethodError, match="expected gradients to be one of auto, autograd, differences, none, got"
    ):
        method(f"{name}(gradients=yes)")


@pytest.mark.parametrize("mode", get_args(GradientMode))
def test_a_start_that_is_not_finite(mode: str) -> None:
    """An error for a method that follows gradients; a rejected point for one that does not."""

    def loss(x: Tensor) -> Tensor:
        return square(x) * (math.nan if not x.any() else 1.0)

    x = torch.zeros(2, dtype=torch.float64)
    if mode == "none":
        with pytest.warns(RuntimeWarning, match="rejected"):
            minimize(loss, x, "slsqp(gradients=none)", budget=20)
    else:
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(NonFiniteLoss, match="finite loss"):
            minimize(loss, x, f"slsqp(gradients={mode})", budget=20)
        assert x.tolist() == [0.0, 0.0]


def test_a_later_stage_may_begin_at_a_lucky_point() -> None:
    """The loss was finite there when the stage before found it; nan now is a rejected point, not an error."""
    calls = []

    def loss(x: Tensor) -> Tensor:
        calls.append(0)
        return square(x) * (math.nan if len(calls) == 6 else 1.0)

    with pytest.warns(RuntimeWarning, match="rejected"):
        result = minimize(
            loss, torch.zeros(2, dtype=torch.float64), "cma.cmaes(evaluations=5) > slsqp", budget=50
        )
    assert len(calls) >= 6
    assert math.isfinite(result.best_loss)


@pytest.mark.parametrize("mode", ["auto", "autograd", "differences"])
def test_a_local_search_may_begin_at_a_point_that_is_nan_by_now(mode: str) -> None:
    """Dual annealing only now and then follows gradients: a nan there is no error (a noisy loss)."""
    for seed in range(8):
        draws = np.random.default_rng(seed)

        def loss(x: Tensor, draws: Any = draws) -> Tensor:
            return square(x) * (math.nan if draws.random() < 0.5 else 1.0)

        x = torch.zeros(2, dtype=torch.float64)
        with pytest.warns(RuntimeWarning, match="rejected"):
            result = minimize(loss, x, f"dual_annealing(gradients={mode})", bounds=(-3, 3), budget=150)
        assert result.evaluations == 150
        assert result.best_loss < 8.0


# -- differences -------------------------------------------------------------------------------------------------


def started(x: Any, lower: Any = -np.inf, upper: Any = np.inf, eps: float = 2.0**-52) -> Start:
    x = np.array(x, dtype=float)
    full = [np.broadcast_to(np.array(v, dtype=float), x.shape).copy() for v in (lower, upper, eps)]
    return Start(x, *full, seed=0, names=(("x", 0, len(x)),))


def asking(f: Callable[[np.ndarray[Any, Any]], float], seen: list[Any] | None = None) -> Ask:
    """A solver's window on a plain function; a value that is not finite is told as +inf."""

    def one(x: Any) -> float:
        if seen is not None:
            seen.append(x.copy())
        value = float(f(x))
        return value if math.isfinite(value) else math.inf

    def question(request: Request) -> Answer:
        assert request.x is not None
        if request.kind is Kind.POPULATION:
            losses = np.array([one(row) for row in request.x])
            return Answer(float(losses.min()), losses)
        return Answer(one(request.x))

    return Ask(question, [])


def cubic(x: Any) -> float:
    return float((x**3).sum() + x[0] * x[-1])


corners = st.floats(-3, 3, allow_nan=False)


@given(
    st.lists(st.tuples(corners, st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=4),
    st.sampled_from([None, 1e-3, 0.7]),
)
def test_one_sided_differences_are_scipys(rows: list[tuple[float, float, float]], step: float | None) -> None:
    """Same points, same quotients, at bounds too."""
    x, below, above = (np.array(column) for column in zip(*rows, strict=True))
    lower, upper = x - below, x + above
    assume((lower < upper).all())
    ours: list[Any] = []
    theirs: list[Any] = []
    start = started(x, lower, upper)
    loss = cubic(x)
    got = Differences(start, step).gradient(asking(cubic, ours), x, loss)

    def recorded(y: Any) -> float:
        theirs.append(y.copy())
        return cubic(y)

    h = 2.0**-26 if step is None else step
    expected = approx_derivative(recorded, x, "2-point", abs_step=h, f0=loss, bounds=(lower, upper))
    assert got.tolist() == expected.tolist()
    assert np.array(ours).tolist() == np.array(theirs).clip(lower, upper).tolist()


@pytest.mark.parametrize("x", [[1e9, -1e9], [-1e12, 3.0], [1e300, -1e300]])
def test_a_step_too_small_for_a_huge_weight_is_scipys(x: list[float]) -> None:
    ours: list[Any] = []
    theirs: list[Any] = []

    def f(y: Any) -> float:
        return float(y[0] / x[0] + y[1] / x[1])

    def recorded(y: Any) -> float:
        theirs.append(y.copy())
        return f(y)

    loss = f(np.array(x))
    got = Differences(started(x), None).gradient(asking(f, ours), np.array(x), loss)
    expected = approx_derivative(recorded, np.array(x), "2-point", abs_step=2.0**-26, f0=loss)
    assert got.tolist() == expected.tolist()
    assert np.array(ours).tolist() == np.array(theirs).tolist()


@pytest.mark.parametrize("name, eps", [("float32", 2.0**-23), ("bfloat16", 2.0**-7)])
def test_narrow_weights_get_central_differences_of_their_own_size(name: str, eps: float) -> None:
    x = np.array([0.5, -8.0])
    seen: list[Any] = []
    gradient = Differences(started(x, eps=eps)).gradient(asking(cubic, seen), x, cubic(x))
    h = eps ** (1 / 3) * np.array([1.0, 8.0])
    expected = [x + [h[0], 0], x + [0, h[1]], x - [h[0], 0], x - [0, h[1]]]
    assert np.allclose(seen, expected, rtol=1e-15)
    # central: the error of a cubic is h², to the last bit
    assert np.allclose(gradient, [3 * 0.25 - 8 + h[0] ** 2, 3 * 64 + 0.5 + h[1] ** 2], rtol=1e-12)


def test_central_differences_become_one_sided_at_bounds() -> None:
    x = np.array([-1.0, 0.0, 1.0])
    seen: list[Any] = []
    start = started(x, -1, 1, eps=2.0**-23)
    gradient = Differences(start).gradient(asking(lambda y: float((y**2).sum()), seen), x, 2.0)
    h = 2.0 ** (-23 / 3)
    assert len(seen) == 4  # one side for each corner, two inside
    assert np.array(seen).min() >= -1
    assert np.array(seen).max() <= 1
    assert np.allclose(gradient, [-2 + h, 0, 2 - h], atol=1e-12)


def test_a_sliver_of_room_tells_nothing() -> None:
    x = np.array([1 - 1e-9])
    seen: list[Any] = []
    Differences(started(x, -1, 1, eps=2.0**-23)).gradient(asking(lambda y: float(y[0]), seen), x, x[0])
    assert len(seen) == 1
    assert seen[0][0] < x[0] - 1e-3


@pytest.mark.parametrize("eps", [2.0**-52, 2.0**-23])
@pytest.mark.parametrize("bad", ["above", "below", "both"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_side_that_is_not_finite_is_replaced_by_the_other(eps: float, bad: str, value: float) -> None:
    x = np.array([0.5, 0.25])

    def f(y: Any) -> float:
        above, below = y[0] > 0.5, y[0] < 0.5
        if {"above": above, "below": below, "both": above or below}[bad]:
            return value
        return float(y[0] ** 2 + 2 * y[1])

    gradient = Differences(started(x, eps=eps)).gradient(asking(f), x, f(x))
    slope = 0.0 if bad == "both" else 1.0
    assert gradient == pytest.approx([slope, 2.0], abs=0.02)


def test_float32_rosenbrock_by_differences_arrives() -> None:
    """SciPy's own step vanishes in float32 (it stops where it began); forward differences stop at 2e-2."""
    torch.manual_seed(0)
    x = torch.full((5,), -1.0)
    start = rosenbrock(x).item()
    result = minimize(rosenbrock, x, "slsqp(gradients=differences)", budget=5000)
    assert result.best_loss < 1e-4  # 7.1e-5 with torch 2.13, SciPy 1.17
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Differences, "_steps", lambda self, x: np.full(len(x), 2.0**-26))
        patch.setattr(Differences, "_one_sided", lambda self, x, h: h)
        y = torch.full((5,), -1.0)
        assert minimize(rosenbrock, y, "slsqp(gradients=differences)", budget=5000).best_loss == start


# -- fun and jac -------------------------------------------------------------------------------------------------


def test_a_gradient_is_asked_once_for_each_point() -> None:
    kinds: list[str] = []

    def question(request: Request) -> Answer:
        kinds.append(request.kind.value)
        assert request.x is not None
        gradient = 2 * request.x if request.kind is Kind.GRADIENT else None
        return Answer(float((request.x**2).sum()), None, gradient)

    d = Derivative(Ask(question, []), started([1.0, 2.0]), "autograd")
    x = np.array([1.0, 2.0])
    first = d.jac(x)
    first[:] = -1  # SciPy may write into what it gets
    again = d.jac(x)
    assert again.tolist() == [2.0, 4.0]
    again[:] = -1
    assert d.jac(x).tolist() == [2.0, 4.0]
    x[0] = 3.0  # and reuse its x
    assert d.jac(x).tolist() == [6.0, 4.0]
    assert kinds == ["value", "gradient", "value", "gradient"]


def test_a_rejected_point_has_no_slope() -> None:
    d = Derivative(asking(lambda x: math.nan if x[0] > 1 else 0.0), started([0.0]), "differences")
    d.fun(np.array([0.0]))
    assert d.fun(np.array([2.0])) == math.inf
    assert d.jac(np.array([2.0])).tolist() == [0.0]


class Bowl:
    """Answers what is asked about |x|², as an objective does; a gradient only of the point whose value came last."""

    def __init__(self) -> None:
        self.asked: list[tuple[Kind, list[float]]] = []

    def __call__(self, request: Request) -> Answer:
        x = request.x
        assert x is not None
        if request.kind is Kind.GRADIENT:
            assert self.asked[-1] == (Kind.VALUE, x.tolist())
        self.asked.append((request.kind, x.tolist()))
        gradient = None if request.kind is Kind.VALUE else 2 * x
        return (
            Answer(gradient=gradient)
            if request.kind is Kind.GRADIENT
            else Answer(float((x**2).sum()), None, gradient)
        )


@pytest.mark.parametrize("mode", ["autograd", "auto"])
def test_a_gradient_asked_before_its_value_costs_no_second_value(mode: Any) -> None:
    """SciPy's trust-constr does so: it updates its Hessian before it looks at the loss."""
    question = Bowl()
    d = Derivative(Ask(question, []), started([1.0, 2.0]), mode)
    d.fun(np.array([1.0, 2.0]))
    d.jac(np.array([1.0, 2.0]))
    del question.asked[:]
    y, z = np.array([0.5, 0.0]), np.array([0.0, 0.25])
    assert d.jac(y).tolist() == [1.0, 0.0]
    assert d.fun(y) == 0.25
    assert d.jac(z).tolist() == [0.0, 0.5]
    assert d.fun(z) == 0.0625
    pairs = [(kind, p) for p in ([0.5, 0.0], [0.0, 0.25]) for kind in (Kind.VALUE, Kind.GRADIENT)]
    assert question.asked == pairs
    assert (
        d.fun(z) == 0.0625
    )  # asked anew: a solver that wants the value twice gets what the loss says by now
    assert question.asked == [*pairs, (Kind.VALUE, [0.0, 0.25])]
    assert d.jac(z).tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [
        ("autograd", [Kind.VALUE_AND_GRADIENT] * 3),
        # the look at the first point, and at one step from it
        ("auto", [Kind.VALUE, Kind.GRADIENT] * 2 + [Kind.VALUE_AND_GRADIENT] * 2),
        ("none", [Kind.VALUE] * 3),
    ],
)
def test_both_in_one_question(mode: Any, kinds: list[Kind]) -> None:
    question = Bowl()
    d = Derivative(Ask(question, []), started([1.0, 2.0]), mode, together=True)
    for x in ([1.0, 2.0], [0.5, 0.0], [0.0, 0.25]):
        assert d.fun(np.array(x)) == x[0] ** 2 + x[1] ** 2
        if mode != "none":
            for _ in range(2):
                assert d.jac(np.array(x)).tolist() == [2 * x[0], 2 * x[1]]
    assert [kind for kind, _ in question.asked] == kinds


@pytest.mark.parametrize(("text", "together"), [("lbfgsb", True), ("tnc", True), ("bfgs", False)])
def test_who_asks_for_both(monkeypatch: pytest.MonkeyPatch, text: str, together: bool) -> None:
    """And pays for a point 3 forward-equivalents either way."""
    kinds: list[Kind] = []
    answer = Objective.answer

    def listen(objective: Objective, request: Request) -> Answer:
        kinds.append(request.kind)
        return answer(objective, request)

    monkeypatch.setattr(Objective, "answer", listen)
    result = minimize(rosenbrock, torch.zeros(3).double(), f"scipy.{text}(gradients=autograd)", budget=10)
    assert result.evaluations == 10
    assert result.forward_equivalents == 30
    assert (set(kinds) == {Kind.VALUE_AND_GRADIENT}) == together


def test_a_value_asked_elsewhere_forgets_the_one_ahead() -> None:
    question = Bowl()
    d = Derivative(Ask(question, []), started([1.0]), "autograd")
    d.jac(np.array([1.0]))
    assert d.fun(np.array([3.0])) == 9.0
    assert d.fun(np.array([1.0])) == 1.0
    assert d.fun(np.array([1.0])) == 1.0
    assert [x for _, [x] in question.asked] == [1.0, 1.0, 3.0, 1.0, 1.0]


def test_points_that_stray_are_brought_inside() -> None:
    question = Bowl()
    d = Derivative(Ask(question, []), started([1.0, 2.0], -2.0, 2.0), "autograd")
    assert d.fun(np.array([1.0, 2.0 + 1e-15])) == 5.0
    assert d.jac(np.array([1.0, 2.0 + 1e-15])).tolist() == [2.0, 4.0]
    assert question.asked == [(Kind.VALUE, [1.0, 2.0]), (Kind.GRADIENT, [1.0, 2.0])]
