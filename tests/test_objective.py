"""`hybridopt.objective`: what each question costs, answers, and leaves as it was."""

from __future__ import annotations

import io
import math
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import hybridopt
from hybridopt.errors import (
    BoundsError,
    ClosedError,
    HybridoptError,
    MissingGradient,
    NonFiniteLoss,
    ObjectiveError,
    StateError,
    Stop,
)
from hybridopt.ledger import Budget, Ledger, Reason
from hybridopt.objective import NONFINITE_PATIENCE, Objective
from hybridopt.optimizer import Answer, Kind, Request
from hybridopt.vector import FloatArray, ParameterVector

CENTRE = np.array([1.0, -2.0, 0.5])


def bowl(x: FloatArray) -> float:
    return float(((x - CENTRE) ** 2).sum())


def slope(x: FloatArray) -> FloatArray:
    return np.asarray(2 * (x - CENTRE))


def at(kind: Kind, x: Any = None, **rest: Any) -> Request:
    return Request(kind, None if x is None else np.asarray(x, dtype=np.float64), **rest)


def saved(objective: Objective) -> Any:
    """Its state after a way through a file that runs no code."""
    buffer = io.BytesIO()
    torch.save(objective.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# -- every form of loss, with a meter of its own --------------------------------------------------------------------


class Meter:
    """Counts the forward and backward passes that really happen."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def __call__(self, value: Any) -> Any:
        self.forward += 1
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(self._passed)
        return value

    def _passed(self, gradient: Tensor) -> None:
        self.backward += 1


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))


def bowl_of(*parts: Tensor) -> Tensor:
    x = torch.cat([p.reshape(-1) for p in parts])
    if x[0] > 100:  # a region without a loss
        return x.sum() * math.nan
    return ((x - torch.from_numpy(CENTRE)) ** 2).sum()


def module_form(meter: Meter) -> tuple[Any, Any]:
    return lambda m: meter(bowl_of(m.weight, m.bias)), Three()


def tensor_form(meter: Meter) -> tuple[Any, Any]:
    return lambda x: meter(bowl_of(x)), torch.zeros(3, dtype=torch.float64)


def mapping_form(meter: Meter) -> tuple[Any, Any]:
    return lambda d: meter(bowl_of(d["a"], d["b"])), {
        "a": torch.zeros(1, dtype=torch.float64),
        "b": torch.zeros(2, dtype=torch.float64),
    }


def array_form(meter: Meter) -> tuple[Any, Any]:
    return lambda x: meter(math.nan if x[0] > 100 else bowl(x)), np.zeros(3)


def aux_form(meter: Meter) -> tuple[Any, Any]:
    loss, target = tensor_form(meter)
    return lambda x: (loss(x), {"seen": x.detach().tolist()}), target


def closure_form(meter: Meter) -> tuple[Any, Any]:
    model = Three()
    return lambda: meter(bowl_of(model.weight, model.bias)), model


def backward_form(meter: Meter) -> tuple[Any, Any]:
    params = [torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]

    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss = meter(bowl_of(*params))
        loss.backward()
        return loss

    return closure, params


FORMS = {
    "module": module_form,
    "tensor": tensor_form,
    "mapping": mapping_form,
    "array": array_form,
    "aux": aux_form,
    "closure": closure_form,
    "closure with backward": backward_form,
}
SMOOTH = [name for name in FORMS if name != "array"]


def made(form: str, budget: Any = None, **rest: Any) -> tuple[Objective, Meter]:
    """The meter counts calls, so populations are looped over."""
    meter = Meter()
    loss, target = FORMS[form](meter)
    return Objective(loss, target, budget, batch="loop", **rest), meter


X = [3.0, 4.0, 5.0]
#        what is asked                                             evaluations, forward, backward
COSTS: dict[str, tuple[list[Request], tuple[int, int, int], tuple[int, int, int]]] = {
    "value": ([at(Kind.VALUE, X)], (1, 1, 0), (1, 1, 1)),
    "probe": ([at(Kind.VALUE, X, probe=True)], (1, 1, 0), (1, 1, 1)),
    "value, then gradient": (
        [at(Kind.VALUE, X, keep_graph=True), at(Kind.GRADIENT, X)],
        (1, 1, 1),
        (1, 1, 1),
    ),
    "both at a point": ([at(Kind.VALUE_AND_GRADIENT, X)], (1, 1, 1), (1, 1, 1)),
    "both in place": ([at(Kind.VALUE_AND_GRADIENT)], (1, 1, 1), (1, 1, 1)),
    "value in place": ([at(Kind.VALUE)], (1, 1, 0), (1, 1, 1)),
    "population": ([at(Kind.POPULATION, [X, X, CENTRE])], (3, 3, 0), (3, 3, 3)),
    "empty population": ([at(Kind.POPULATION, np.empty((0, 3)))], (0, 0, 0), (0, 0, 0)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("question", COSTS)
def test_what_each_question_costs_in_each_form(form: str, question: str) -> None:
    requests, cost, cost_with_backward = COSTS[question]
    objective, meter = made(form)
    with objective:
        if form == "array" and question == "both in place":
            with pytest.raises(MissingGradient, match=r"no graph to the weights.*surrogate="):
                objective.answer(requests[0])
            return
        for request in requests:
            answer = objective.answer(request)
        ledger = objective.ledger
        expected = cost_with_backward if form == "closure with backward" else cost
        if form == "array":
            expected = (expected[0], expected[1], 0)
        assert (ledger.evaluations, ledger.forward, ledger.backward) == expected
        assert (meter.forward, meter.backward) == expected[1:]
        assert ledger.forward_equivalents == expected[1] + 2 * expected[2]
        assert ledger.recomputed == 0
        x = objective.vector.read()
        if "population" not in question:
            assert answer.loss == bowl(x)
        if question in ("both at a point", "value, then gradient"):
            assert (
                answer.gradient is None if form == "array" else answer.gradient.tolist() == slope(x).tolist()
            )
        if question == "both in place":
            assert answer.gradient is None
            assert (
                objective.vector.gather([t.grad for t in objective.vector.tensors]).tolist()
                == slope(x).tolist()
            )
        if question == "population":
            assert answer.losses is not None
            assert answer.losses.tolist() == [bowl(np.array(X))] * 2 + [0.0]
            assert answer.loss == 0
        if form == "aux" and question == "value":
            assert objective.aux == {"seen": X}


@pytest.mark.parametrize("form", SMOOTH)
def test_what_a_surrogate_costs_and_where_its_gradient_goes(form: str) -> None:
    meter = Meter()
    loss, target = FORMS[form](Meter())
    sharp, _ = made(form)

    def surrogate(*args: Any) -> Any:
        objective_loss = FORMS[form](meter)[0] if form not in ("closure", "closure with backward") else None
        if objective_loss is not None:
            return objective_loss(*args)
        return meter((torch.cat([t.reshape(-1) for t in objective.vector.tensors]) ** 2).sum())

    takes_none = form in ("closure", "closure with backward")
    steps = Meter()  # the loss itself: rounded, so without a useful gradient

    def rough(*args: Any) -> Any:
        result = loss(*args)
        steps.forward += 1
        return result

    objective = Objective(
        (lambda: rough()) if takes_none else rough,
        target,
        surrogate=(lambda: surrogate()) if takes_none else surrogate,
    )
    own_backward = form == "closure with backward"
    with objective:
        x = np.array(X)
        expected = 2 * x if takes_none else slope(x)
        both = objective.answer(at(Kind.VALUE_AND_GRADIENT, x))
        assert (both.loss, both.surrogate) == (bowl(x), True)
        assert both.gradient is not None
        assert both.gradient.tolist() == expected.tolist()
        ledger = objective.ledger
        assert (ledger.evaluations, ledger.forward, ledger.backward) == (1, 2, 1 + own_backward)
        assert (steps.forward, meter.forward, meter.backward) == (1, 1, 1)

        objective.answer(at(Kind.VALUE, x, keep_graph=True))
        assert (ledger.evaluations, ledger.forward, ledger.backward) == (2, 3, 1 + 2 * own_backward)
        later = objective.answer(at(Kind.GRADIENT, x))
        assert later.gradient is not None
        assert later.surrogate
        assert later.gradient.tolist() == expected.tolist()
        assert (ledger.evaluations, ledger.forward, ledger.backward) == (2, 4, 2 + 2 * own_backward)
        assert (steps.forward, meter.forward, meter.backward) == (2, 2, 2), (
            "no forward of the loss for a gradient"
        )
        assert ledger.recomputed == 0
        assert ledger.best_loss == bowl(x), "best goes by the loss"


# -- any sequence of questions --------------------------------------------------------------------------------------

POINTS = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0, 101.0]), min_size=3, max_size=3)
QUESTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("value"), POINTS, st.booleans(), st.booleans()),
        st.tuples(st.just("gradient")),
        st.tuples(st.just("gradient elsewhere"), POINTS.filter(lambda x: x[0] < 100)),
        st.tuples(st.just("both"), POINTS),
        st.tuples(st.just("in place")),
        st.tuples(st.just("population"), st.lists(POINTS, min_size=1, max_size=4)),
        st.tuples(st.just("somebody writes"), POINTS),
    ),
    max_size=12,
)


@pytest.mark.parametrize("form", FORMS)
@given(
    questions=QUESTIONS,
    evaluations=st.none() | st.integers(1, 12),
    equivalents=st.none() | st.floats(1, 40),
    backward_cost=st.sampled_from([0.5, 2.0, 3.0]),
)
def test_any_sequence_is_counted_answered_and_limited_exactly(
    form: str, questions: list[Any], evaluations: int | None, equivalents: float | None, backward_cost: float
) -> None:
    objective, meter = made(form, backward_cost=backward_cost)
    ledger = objective.ledger
    with objective, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        objective.answer(at(Kind.VALUE, [0.0, 0.0, 0.0]))  # a closure shows whether it calls backward
        seen = [bowl(np.zeros(3))]
        most = math.inf if equivalents is None else equivalents + ledger.forward_equivalents
        ledger.limit(Budget(evaluations, None if equivalents is None else most))
        asked: FloatArray | None = None
        for question, *given_ in questions:
            if question == "somebody writes":
                objective.vector.write(given_[0])
                continue
            if question == "gradient" and asked is None:
                continue
            request = asking(question, asked, *given_)
            before, passes = ledger.evaluations, meter.forward
            stopped: Stop | None = None
            try:
                answer = objective.answer(request)
            except Stop as stop:
                stopped = stop
            except MissingGradient:
                assert (form, question) == ("array", "in place")
                assert (meter.forward, ledger.evaluations) == (passes + 1, before), (
                    "no answer, nothing booked"
                )
                meter.forward -= 1
                continue
            if stopped is not None:
                assert stopped.ledger is ledger
                assert stopped.reason in (Reason.EVALUATIONS, Reason.FORWARD_EQUIVALENTS)
                assert (ledger.evaluations == evaluations) >= (stopped.reason is Reason.EVALUATIONS)
                if question == "population":
                    assert request.x is not None
                    seen += [_loss(x) for x in request.x[: ledger.evaluations - before]]
                break
            where = objective.vector.read() if request.x is None else request.x
            if question == "population":
                losses = [_loss(x) for x in where]
                assert answer.losses is not None
                assert answer.losses.tolist() == [math.inf if math.isnan(v) else v for v in losses]
                seen += losses
            elif "gradient" in question:
                assert ledger.evaluations == before
                _check_gradient(form, answer, where)
            else:
                seen.append(_loss(where))
                assert answer.loss == (math.inf if math.isnan(seen[-1]) else seen[-1])
                if question == "both":
                    _check_gradient(form, answer, where)
            finite_point = request.x is not None and question != "population" and not math.isnan(_loss(where))
            asked = request.x if finite_point else None
    finite = [v for v in seen if math.isfinite(v)]
    assert ledger.evaluations == len(seen)
    assert ledger.nonfinite == len(seen) - len(finite)
    assert ledger.best_loss == min(finite)
    assert (ledger.forward + ledger.recomputed, ledger.backward) == (meter.forward, meter.backward)
    assert evaluations is None or ledger.evaluations <= evaluations
    assert ledger.forward_equivalents <= most


def asking(question: str, asked: FloatArray | None, *given_: Any) -> Request:
    if question == "value":
        x, keep_graph, probe = given_
        return at(Kind.VALUE, x, keep_graph=keep_graph, probe=probe)
    if question == "gradient":
        return at(Kind.GRADIENT, asked)
    if question == "in place":
        return at(Kind.VALUE_AND_GRADIENT)
    kinds = {
        "gradient elsewhere": Kind.GRADIENT,
        "both": Kind.VALUE_AND_GRADIENT,
        "population": Kind.POPULATION,
    }
    return at(kinds[question], *given_)


def _loss(x: FloatArray) -> float:
    return math.nan if x[0] > 100 else bowl(x)


def _check_gradient(form: str, answer: Answer, x: FloatArray) -> None:
    if form == "array":
        assert answer.gradient is None or not answer.gradient.any()
    elif math.isnan(_loss(x)):
        assert answer.gradient is not None
        assert not answer.gradient.any(), "not finite: zeros"
    else:
        assert answer.gradient is not None
        np.testing.assert_allclose(answer.gradient, slope(x), atol=1e-12)


# -- budgets --------------------------------------------------------------------------------------------------------


def noisy(x: Tensor) -> Tensor:
    return (x**2).sum() + torch.rand(()) + float(np.random.randn()) + random.random()


POPULATION = np.arange(12.0).reshape(6, 2) / 7


@pytest.mark.parametrize("noise", ["shared", "independent", "fixed"])
@pytest.mark.parametrize("budget", [{"evaluations": 4}, {"forward_equivalents": 4.5}])
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_population_is_cut_at_the_budget_and_goes_on_exactly(
    noise: Any, budget: dict[str, Any], through_a_file: bool
) -> None:
    calls = []

    def loss(x: Tensor) -> Tensor:
        calls.append(x.tolist())
        return noisy(x)

    def new(limits: Any) -> Objective:
        start = torch.zeros(2, dtype=torch.float64)
        return Objective(loss, start, limits, seed=3, noise=noise, batch="loop")

    with new(None) as whole:
        whole.answer(at(Kind.VALUE, [1, 1]))
        expected = whole.answer(at(Kind.POPULATION, POPULATION))
        after = whole.answer(at(Kind.POPULATION, POPULATION[:2]))
        best, state = whole.ledger.best_loss, saved(whole)
    calls.clear()

    objective = new(budget)
    objective.answer(at(Kind.VALUE, [1, 1]))
    for _ in range(2):  # asking again without more budget changes nothing
        with pytest.raises(Stop) as stop:
            objective.answer(at(Kind.POPULATION, POPULATION))
        assert stop.value.ledger is objective.ledger
        assert objective.ledger.evaluations == 4
    assert calls == [[1, 1], *POPULATION[:3].tolist()]
    if through_a_file:
        kept = saved(objective)
        objective.close()
        objective = new(None)
        objective.load_state_dict(kept)
    objective.ledger.limit(Budget(evaluations=9))
    answer = objective.answer(at(Kind.POPULATION, POPULATION))
    assert calls == [[1, 1], *POPULATION.tolist()], "no row twice"
    assert answer.losses is not None
    assert expected.losses is not None
    assert answer.losses.tolist() == expected.losses.tolist()
    assert objective.ledger.evaluations == 7
    again = objective.answer(at(Kind.POPULATION, POPULATION[:2]))
    assert again.losses is not None
    assert after.losses is not None
    assert again.losses.tolist() == after.losses.tolist(), "the numbers drawn afterwards are the same too"
    assert objective.ledger.best_loss == best
    got = saved(objective)
    for key in ("best", "buffers"):
        torch.testing.assert_close(got[key], state[key], rtol=0, atol=0)
    assert got["generations"]["begun"] is None
    objective.close()


def test_a_population_that_is_asked_anew_is_evaluated_anew() -> None:
    objective = Objective(lambda x: (x**2).sum(), torch.zeros(2), 3)
    with objective:
        with pytest.raises(Stop):
            objective.answer(at(Kind.POPULATION, POPULATION))
        objective.ledger.limit(Budget(evaluations=100))
        other = objective.answer(at(Kind.POPULATION, POPULATION[:2]))
        assert other.losses is not None
        assert len(other.losses) == 2
        assert objective.ledger.evaluations == 5
        for _ in range(2):
            objective.answer(at(Kind.POPULATION, POPULATION))
        assert objective.ledger.evaluations == 17


@pytest.mark.parametrize("form", SMOOTH)
@pytest.mark.parametrize("kind", [Kind.VALUE, Kind.VALUE_AND_GRADIENT, Kind.POPULATION])
def test_an_evaluation_that_would_pass_the_budget_is_not_begun(form: str, kind: Kind) -> None:
    own = form == "closure with backward"
    cost = 3 if own or kind is Kind.VALUE_AND_GRADIENT else 1
    objective, meter = made(form, {"forward_equivalents": 3 * cost + 0.5})
    x = [X] if kind is Kind.POPULATION else X
    with objective:
        for _ in range(3):
            objective.answer(at(kind, x))
        with pytest.raises(Stop) as stop:
            objective.answer(at(kind, x))
    assert stop.value.reason is Reason.FORWARD_EQUIVALENTS
    assert (meter.forward, objective.ledger.forward_equivalents) == (3, 3 * cost)


def test_seconds_are_looked_at_before_each_evaluation() -> None:
    now = [0.0]

    def slow(x: Tensor) -> Tensor:
        now[0] += 1
        return x.sum()

    objective = Objective(slow, torch.ones(2), {"seconds": 2.5}, batch="loop")
    objective.ledger._clock = lambda: now[0]
    with objective, pytest.raises(Stop) as stop:
        objective.answer(at(Kind.POPULATION, np.zeros((9, 2))))
    assert stop.value.reason is Reason.SECONDS
    assert objective.ledger.evaluations == now[0] == 3


def test_a_target_ends_the_run_before_the_next_evaluation() -> None:
    objective = Objective(lambda x: (x**2).sum(), torch.ones(2), {"evaluations": 9, "target": 1.0})
    with objective:
        assert objective.answer(at(Kind.VALUE, [1, 0])).loss == 1
        with pytest.raises(Stop) as stop:
            objective.answer(at(Kind.VALUE, [0, 0]))
    assert stop.value.reason is Reason.TARGET


def test_stages_are_limited_on_their_own_and_booked_in_the_run() -> None:
    objective = Objective(lambda x: (x**2).sum(), torch.ones(2), {"evaluations": 7})
    outer, inner = Ledger(Budget(evaluations=5)), Ledger(Budget(forward_equivalents=3), backward_cost=9)
    with objective:
        value = at(Kind.VALUE, [1, 0]).within(inner).within(outer)
        assert value.scopes == (outer, inner)
        for _ in range(3):
            assert objective.answer(value).stop is None
        stop = objective.answer(value).stop
        assert stop is not None
        assert (stop.ledger, stop.reason) == (inner, Reason.FORWARD_EQUIVALENTS)
        cut = objective.answer(at(Kind.POPULATION, [[0, 0], [3, 0], [2, 0]]).within(outer))
        assert cut.stop is not None
        assert cut.stop.ledger is outer
        assert [w.evaluations for w in (objective.ledger, outer, inner)] == [5, 5, 3]
        assert [w.best_loss for w in (objective.ledger, outer, inner)] == [0, 0, 1]
        assert inner.best_point.x.tolist() == [1, 0]
        # what a stage's stop cut off is not kept for somebody else's question
        late = Ledger()
        asked = at(Kind.POPULATION, [[0, 0], [3, 0], [2, 0]]).within(late)
        with pytest.raises(Stop) as caught:
            objective.answer(asked)
        assert caught.value.ledger is objective.ledger
        assert (objective.ledger.evaluations, late.evaluations) == (7, 2)
        assert inner.backward_cost == objective.ledger.backward_cost == 2, "one currency"


# -- the kept graph -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SMOOTH)
@pytest.mark.parametrize("event", ["write", "touch", "another objective", "another point", "asked twice"])
def test_a_graph_is_used_only_while_it_is_true(form: str, event: str) -> None:
    objective, meter = made(form)
    own = form == "closure with backward"
    x = np.array(X)
    with objective:
        objective.answer(at(Kind.VALUE, x, keep_graph=True))
        where = x
        if event == "write":
            objective.vector.write([9.0, 9.0, 9.0])
        elif event == "touch":
            objective.vector.touch()
        elif event == "another objective":
            takes_none = form.startswith("closure")
            with Objective((lambda: 0.0) if takes_none else (lambda _: 0.0), objective.vector) as other:
                other.answer(at(Kind.VALUE, [7.0, 7.0, 7.0]))
        elif event == "another point":
            where = np.array([0.0, 1.0, 2.0])
        else:
            objective.answer(at(Kind.GRADIENT, x))
        answer = objective.answer(at(Kind.GRADIENT, where))
        assert answer.gradient is not None
        np.testing.assert_allclose(answer.gradient, slope(where))
        ledger = objective.ledger
        assert (ledger.evaluations, ledger.forward, ledger.recomputed) == (1, 1, 1)
        assert ledger.backward == 1 + (event == "asked twice" or own)
        assert (meter.forward, meter.backward) == (2, ledger.backward)


@pytest.mark.parametrize("form", SMOOTH)
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_budget_may_end_between_a_value_and_its_gradient(form: str, through_a_file: bool) -> None:
    own = form == "closure with backward"
    objective, meter = made(form, {"forward_equivalents": 3})
    with objective:
        objective.answer(at(Kind.VALUE, X, keep_graph=True))
        objective.ledger.limit(Budget(forward_equivalents=3 if own else 2))
        if own:
            assert objective.answer(at(Kind.GRADIENT, X)).gradient is not None, "it was paid with the value"
            return
        with pytest.raises(Stop) as stop:
            objective.answer(at(Kind.GRADIENT, X))
        assert stop.value.reason is Reason.FORWARD_EQUIVALENTS
        if through_a_file:
            state = saved(objective)
            objective.close()
            objective, meter = made(form, {"forward_equivalents": 3})
            objective.load_state_dict(state)
        objective.ledger.limit(Budget(forward_equivalents=3))
        answer = objective.answer(at(Kind.GRADIENT, X))
        assert answer.gradient is not None
        assert answer.gradient.tolist() == slope(np.array(X)).tolist()
        ledger = objective.ledger
        # a forward that only a resume made necessary is no part of the budget
        assert (ledger.forward, ledger.backward, ledger.recomputed) == (1, 1, int(through_a_file))
        assert meter.forward == 1
        objective.close()


@pytest.mark.parametrize("noise", ["shared", "independent", "fixed"])
def test_a_value_and_its_gradient_see_the_same_noise(noise: Any) -> None:
    def loss(x: Tensor) -> Tensor:
        return (x * torch.rand(3)).sum() * float(np.random.rand())

    for lost in (False, True):
        with Objective(loss, torch.ones(3), seed=1, noise=noise) as objective:
            for x in ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]):
                value = objective.answer(at(Kind.VALUE, x, keep_graph=True)).loss
                if lost:
                    objective.vector.touch()
                gradient = objective.answer(at(Kind.GRADIENT, x)).gradient
                assert gradient is not None
                assert float(gradient @ np.array(x)) == pytest.approx(value)  # the loss is linear
            both = objective.answer(at(Kind.VALUE_AND_GRADIENT, x))
            assert both.gradient is not None
            assert float(both.gradient @ np.array(x)) == pytest.approx(both.loss)
            if not lost:
                path = both.loss
            else:
                assert both.loss == path, "a repeated forward leaves the later draws as they were"


def test_a_buffer_that_the_loss_moves_may_be_part_of_its_graph() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("size", torch.ones(2))

        def forward(self) -> Tensor:
            assert isinstance(self.size, Tensor)
            self.size += 1
            return (self.weight * self.size).sum()

    model = Running()
    with Objective(lambda m: m(), model) as objective:
        objective.answer(at(Kind.VALUE, [1, 1], keep_graph=True))
        gradient = objective.answer(at(Kind.GRADIENT, [1, 1])).gradient
        assert gradient is not None
        assert gradient.tolist() == [2, 2]
        both = objective.answer(at(Kind.VALUE_AND_GRADIENT, [1, 1])).gradient
        assert both is not None
        assert both.tolist() == [2, 2]
        assert model.size.tolist() == [1, 1], "nothing was committed"  # type: ignore[operator]


@pytest.mark.parametrize("kind", [Kind.VALUE, Kind.VALUE_AND_GRADIENT])
def test_a_loss_may_differentiate_inside(kind: Kind) -> None:
    """A residual of a differential equation: the loss itself needs autograd, whatever is asked."""

    def loss(model: nn.Module) -> Tensor:
        t = torch.linspace(0, 1, 5)[:, None].requires_grad_()
        u = model(t)
        (rate,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return ((rate + u) ** 2).mean()

    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    with Objective(loss, model) as objective:
        x = objective.vector.read()
        assert objective.answer(at(kind, x)).loss == pytest.approx(loss(model).item())
        objective.answer(at(Kind.POPULATION, [x, x]))


def test_gradients_in_place_may_be_written_into_like_those_of_backward() -> None:
    a, b, c = torch.ones(3), torch.ones(3), torch.ones(2, 3)
    with Objective(lambda d: (d["a"] + d["b"]).sum() + c.sum(), {"a": a, "b": b, "c": c}) as objective:
        objective.answer(at(Kind.VALUE_AND_GRADIENT))
        assert a.grad is not None
        assert b.grad is not None
        a.grad.mul_(2)  # as clipping and some optimizers do
        assert (a.grad.tolist(), b.grad.tolist()) == ([2, 2, 2], [1, 1, 1])
        assert a.grad.stride() == a.stride()


# -- losses that are not finite -------------------------------------------------------------------------------------

BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("form", ["array", "tensor"])
def test_a_loss_that_is_not_finite_is_rejected_counted_and_said_once(bad: float, form: str) -> None:
    def loss(x: Any) -> Any:
        return (x * x).sum() if x[0] < 5 else x[0] * 0 + bad

    objective = Objective(loss, np.zeros(2) if form == "array" else torch.zeros(2, dtype=torch.float64))
    with objective:
        objective.answer(at(Kind.VALUE, [1, 1]))
        with pytest.warns(RuntimeWarning) as caught:  # noqa: PT031 - all of these warn once
            answer = objective.answer(at(Kind.VALUE, [9, 0]))
            assert (answer.loss, answer.finite) == (math.inf, False)
            population = objective.answer(at(Kind.POPULATION, [[9, 0], [0.5, 0], [8, 0]]))
            assert population.losses is not None
            assert population.losses.tolist() == [math.inf, 0.25, math.inf]
            assert (population.loss, population.finite) == (0.25, False)
            if form == "tensor":
                both = objective.answer(at(Kind.VALUE_AND_GRADIENT, [9, 0]))
                assert (both.loss, both.finite) == (math.inf, False)
                assert both.gradient is not None
                assert both.gradient.tolist() == [0, 0]
        assert [str(w.message).partition(";")[0] for w in caught] == [
            f"loss {bad} at evaluation 2: rejected (told to the method as +inf, never the best)"
        ]
        ledger = objective.ledger
        assert ledger.nonfinite == 3 + (form == "tensor")
        assert (ledger.best_loss, ledger.best_evaluation) == (0.25, 4)
        assert ledger.best_point.x.tolist() == [0.5, 0]
        state = saved(objective)
    other = Objective(loss, np.zeros(2) if form == "array" else torch.zeros(2, dtype=torch.float64))
    other.load_state_dict(state)
    with other:
        other.answer(at(Kind.VALUE, [9, 0]))  # a resumed run does not warn again (warnings are errors here)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", [Kind.VALUE, Kind.VALUE_AND_GRADIENT, Kind.POPULATION])
def test_raise_on_request(bad: float, kind: Kind) -> None:
    objective = Objective(lambda x: x.sum() * bad, torch.ones(2), nonfinite="raise")
    with objective:
        with pytest.raises(NonFiniteLoss, match=r"got -?(nan|inf)"):
            objective.answer(at(kind, [[1, 1]] if kind is Kind.POPULATION else [1, 1]))
        assert (objective.ledger.evaluations, objective.ledger.nonfinite) == (1, 1)
        assert objective.ledger.best_point is None


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "request_",
    [
        at(Kind.VALUE_AND_GRADIENT, [1, 1]),
        at(Kind.VALUE_AND_GRADIENT),
        at(Kind.VALUE, [1, 1], keep_graph=True),
    ],
)
def test_a_method_that_needs_gradients_cannot_begin_where_there_is_none(
    bad: float, request_: Request
) -> None:
    with Objective(lambda x: x.sum() * bad, torch.ones(2)) as objective:
        with pytest.raises(
            NonFiniteLoss, match=r"at the start point.*cannot begin here: change the initial weights"
        ):
            objective.answer(request_)
    # a finite loss with a gradient that is not: sqrt at 0
    with Objective(lambda x: torch.sqrt(x - 1).sum(), torch.ones(2)) as objective:
        if request_.kind is Kind.VALUE_AND_GRADIENT:
            with pytest.raises(NonFiniteLoss, match="at the start point"):
                objective.answer(request_)


def test_a_gradient_that_is_not_finite_is_told_as_a_rejected_point_and_nothing_is_learned_from_it() -> None:
    objective = Objective(lambda x: torch.sqrt(x).sum(), torch.ones(2))
    with objective:
        objective.answer(at(Kind.VALUE_AND_GRADIENT, [1, 1]))
        with pytest.warns(RuntimeWarning, match=r"gradient.* at evaluation 2: rejected"):
            answer = objective.answer(at(Kind.VALUE_AND_GRADIENT, [0, 0]))
        assert (answer.loss, answer.finite) == (math.inf, False)
        assert answer.gradient is not None
        assert answer.gradient.tolist() == [0, 0]
        objective.answer(at(Kind.VALUE, [0, 0], keep_graph=True))
        with pytest.raises(Stop) as stop:  # asked for at an accepted point: there is no way on
            objective.answer(at(Kind.GRADIENT, [0, 0]))
        assert stop.value.reason is Reason.NON_FINITE


def _rejected(objective: Objective, request: Request, times: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(times):
            assert not objective.answer(request).finite


@pytest.mark.parametrize(
    "request_",
    [
        at(Kind.VALUE, [-1, 0]),
        at(Kind.POPULATION, [[-1, 0], [-2, 0], [-3, 0]]),
        at(Kind.VALUE_AND_GRADIENT, [-1, 0]),
        at(Kind.VALUE_AND_GRADIENT, [0, 0]),  # the loss is finite there, its gradient is not
    ],
)
def test_thirty_questions_in_a_row_without_a_finite_answer_end_the_run(request_: Request) -> None:
    assert NONFINITE_PATIENCE == 30
    objective = Objective(lambda x: torch.sqrt(x[0]), torch.ones(2))
    with objective:
        objective.answer(at(Kind.VALUE, [1, 0]))
        _rejected(objective, request_, 29)
        objective.answer(at(Kind.VALUE_AND_GRADIENT, [1, 0]))  # a finite one: counted anew
        objective.answer(at(Kind.VALUE, [1, 0]))
        _rejected(objective, request_, 30)
        before = objective.ledger.evaluations
        with pytest.raises(Stop) as stop:
            objective.answer(request_)
        assert (stop.value.reason, stop.value.ledger) == (Reason.NON_FINITE, objective.ledger)
        assert objective.ledger.evaluations == before


def test_a_generation_with_one_finite_loss_is_a_finite_answer() -> None:
    objective = Objective(lambda x: torch.sqrt(x[0]), torch.ones(2))
    with objective, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(40):
            objective.answer(at(Kind.POPULATION, [[1, 0], *[[-1, 0]] * 40]))
        assert objective.ledger.nonfinite == 1600


def test_a_stage_without_a_finite_loss_ends_and_the_next_one_begins() -> None:
    objective = Objective(lambda x: torch.sqrt(x[0]), torch.ones(2))
    first, second = Ledger(), Ledger()
    with objective:
        objective.answer(at(Kind.VALUE, [1, 0]))
        _rejected(objective, at(Kind.VALUE, [-1, 0]).within(first), 30)
        stop = objective.answer(at(Kind.VALUE, [-1, 0]).within(first)).stop
        assert stop is not None
        assert (stop.ledger, stop.reason) == (first, Reason.NON_FINITE)
        answer = objective.answer(at(Kind.VALUE, [1, 0]).within(second))
        assert (answer.stop, answer.loss) == (None, 1)


# -- nothing of the caller's is changed -----------------------------------------------------------------------------


class Zoo(nn.Module):
    """Dropout, batch statistics, a frozen layer, a submodule in another mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 1)
        self.train()
        self.last.eval()
        self.first.bias.requires_grad_(False)
        self.batch = torch.randn(8, 3)

    def forward(self) -> Tensor:
        return self.last(self.drop(self.norm(self.first(self.batch))).relu()).pow(2).mean()


def zoo_loss(model: Zoo) -> Tensor:
    random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(3)
    return model()


def caller() -> tuple[Any, ...]:
    """Everything of the global generators, in a form that compares."""
    _, words, position, has_gauss, cached = np.random.get_state()
    return torch.get_rng_state().tolist(), words.tolist(), position, has_gauss, cached, random.getstate()


QUESTIONS_OF_ALL_KINDS = [
    lambda x: at(Kind.VALUE, x, keep_graph=True),
    lambda x: at(Kind.GRADIENT, x),
    lambda x: at(Kind.VALUE_AND_GRADIENT, x),
    lambda x: at(Kind.POPULATION, [x, x]),
    lambda x: at(Kind.VALUE_AND_GRADIENT),
    lambda x: at(Kind.VALUE_AND_GRADIENT, commit=True),
]


@pytest.mark.parametrize("form", ["loss(model)", "closure", "closure with backward"])
@pytest.mark.parametrize("select", [None, "last.*", "first.bias"])
def test_nothing_of_the_callers_is_changed(form: str, select: str | None) -> None:
    model = Zoo()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    grads = [p.grad for p in model.parameters()]
    flags, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    norm = {k: v.clone() for k, v in model.norm.state_dict().items() if "running" in k or "num" in k}
    weights = {k: p.detach().clone() for k, p in model.named_parameters()}
    np.random.randn(), random.gauss(0, 1)  # each holds a cached number now
    before = caller()
    grad_mode = torch.is_grad_enabled()

    def closure() -> Tensor:
        loss = zoo_loss(model)
        if form == "closure with backward":
            loss.backward()
        return loss

    objective = Objective(zoo_loss if form == "loss(model)" else closure, model, select=select)
    x = objective.vector.read()
    moved = False
    for question in QUESTIONS_OF_ALL_KINDS:
        request = question(x + 0.25)
        objective.answer(request)
        assert torch.is_grad_enabled() == grad_mode
        moved = moved or request.commit
        for key, value in norm.items():
            assert torch.equal(model.norm.state_dict()[key], value) != moved
        assert torch.get_rng_state().tolist() == before[0]
    objective.close()

    assert caller() == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True)), "the same objects"
    assert all((g == 7).all() for g in grads if g is not None), "and untouched"
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]) == (name not in objective.vector.names)


def test_rejected_candidates_do_not_move_batch_statistics() -> None:
    model = Zoo()
    alone = Zoo()
    alone.load_state_dict(model.state_dict())
    alone.batch = model.batch
    with Objective(zoo_loss, model, noise="fixed") as objective:
        x = objective.vector.read()
        for _ in range(20):
            objective.answer(at(Kind.POPULATION, [x * 100]))
        objective.vector.write(x)
        objective.answer(at(Kind.VALUE_AND_GRADIENT, commit=True))
    alone.norm(alone.first(alone.batch))
    torch.testing.assert_close(model.norm.running_mean, alone.norm.running_mean)
    assert model.norm.num_batches_tracked == 1


def test_two_objectives_over_one_model_end_in_any_order() -> None:
    for order in ((0, 1), (1, 0)):
        model = nn.Linear(2, 1)
        model.weight.grad = mark = torch.ones(1, 2)
        model.bias.requires_grad_(False)
        before = caller()
        two = [Objective(lambda m: m.weight.sum() + m.bias.sum(), model, "9", select="*") for _ in range(2)]
        for objective in two:
            objective.answer(at(Kind.VALUE_AND_GRADIENT))
        for i in order:
            two[i].close()
        assert model.weight.grad is mark
        assert not model.bias.requires_grad
        assert caller() == before


# -- noise ----------------------------------------------------------------------------------------------------------


def dropout(x: Tensor) -> Tensor:
    return (nn.functional.dropout(x, 0.5) * torch.arange(1, 65).sqrt()).sum()


ONES = np.ones(64)


def noise_path(noise: Any, seed: int, between: bool = False) -> list[float]:
    """A step, the next step, a generation, its probes, a step."""
    with Objective(dropout, torch.ones(64), seed=seed, noise=noise) as objective:
        found = []
        for request in (
            at(Kind.VALUE, ONES),
            at(Kind.VALUE, ONES),
            at(Kind.POPULATION, [ONES] * 3),
            at(Kind.POPULATION, [ONES] * 2, probe=True),
            at(Kind.VALUE, ONES, probe=True),
            at(Kind.VALUE_AND_GRADIENT),
        ):
            if between:
                torch.rand(3), np.random.rand(3), random.random()
            answer = objective.answer(request)
            found += [answer.loss] if answer.losses is None else answer.losses.tolist()
        assert objective.stochastic == (noise != "fixed")
        assert objective.keeps_best == (noise == "fixed")
        assert (objective.ledger.best_point is not None) == objective.keeps_best
    return found


def test_noise_is_shared_within_a_step_independent_or_fixed() -> None:
    a, b, c, d, e, f, g, h, i = noise_path("shared", 1)
    assert c == d == e == f == g == h, "a generation and the probes after it"
    assert len({a, b, c, i}) == 4, "each step its own"
    assert len(set(noise_path("independent", 1))) == 9
    assert len(set(noise_path("fixed", 1))) == 1


@pytest.mark.parametrize("noise", ["shared", "independent", "fixed"])
def test_same_seed_same_noise(noise: Any) -> None:
    assert noise_path(noise, 1) == noise_path(noise, 1, between=True)
    assert noise_path(noise, 1) != noise_path(noise, 2)


@pytest.mark.parametrize("keep", ["auto", "best", "last"])
def test_which_point_counts_as_the_best(keep: Any) -> None:
    for loss, seen in ((dropout, True), (lambda x: x.sum(), False)):
        with Objective(loss, torch.ones(64), keep=keep) as objective:
            objective.answer(at(Kind.VALUE, ONES))
            assert objective.stochastic == seen
            assert objective.keeps_best == (keep == "best" or (keep == "auto" and not seen))
            assert (objective.ledger.best_point is not None) == objective.keeps_best


def test_a_surrogate_sees_the_noise_of_its_loss() -> None:
    seen: list[float] = []

    def draws(x: Tensor) -> Tensor:
        seen.append(torch.rand(()).item())
        return x.sum()

    with Objective(draws, torch.ones(2), surrogate=draws) as objective:
        for _ in range(2):
            objective.answer(at(Kind.VALUE_AND_GRADIENT))
            objective.answer(at(Kind.VALUE, [1, 1], keep_graph=True))
            objective.answer(at(Kind.GRADIENT, [1, 1]))
    a, b, c, d, e, f, g, h = seen
    assert a == b
    assert c == d
    assert e == f
    assert g == h
    assert len({a, c, e, g}) == 4


# -- exceptions in the loss -----------------------------------------------------------------------------------------


class Once:
    """A loss that draws, moves a buffer, and raises in its k-th call after all that."""

    def __init__(self, fails: int | None, error: BaseException, backward: bool) -> None:
        self.fails, self.error, self.backward, self.calls = fails, error, backward, 0

    def __call__(self, model: nn.Module) -> Tensor:
        self.calls += 1
        assert isinstance(model.count, Tensor)
        model.count += 1
        loss = (
            ((model.weight - 1) ** 2).sum() + torch.rand(()) + float(np.random.randn()) + random.gauss(0, 1)
        )
        if self.calls == self.fails:
            if self.backward:
                loss.register_hook(self._raise)
            else:
                self._raise(loss)
        return loss

    def _raise(self, _: Tensor) -> None:
        raise self.error


def counted_model() -> nn.Module:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    model.register_buffer("count", torch.zeros(()))
    return model


@pytest.mark.parametrize("noise", ["shared", "independent", "fixed"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("from the loss"), KeyboardInterrupt()])
def test_after_an_exception_the_question_can_be_asked_again(
    noise: Any, backward: bool, error: BaseException
) -> None:
    requests = [
        at(Kind.VALUE, [1, 2]),
        at(Kind.VALUE_AND_GRADIENT, commit=True),
        at(Kind.POPULATION, [[1, 1], [2, 2], [3, 3]]),
        at(Kind.VALUE_AND_GRADIENT, [0, 1]),
        at(Kind.VALUE, [1, 2], probe=True),
        at(Kind.VALUE, [2, 2], keep_graph=True),
        at(Kind.GRADIENT, [2, 2]),
        at(Kind.VALUE, [1, 2]),
    ]
    asks_for_gradient = {2, 6, 8}  # calls of the loss, from 1, whose backward is run

    def path(fails: int | None) -> list[Any]:
        model = counted_model()
        found: list[Any] = []
        before = caller()
        with Objective(Once(fails, error, backward), model, seed=5, noise=noise, keep="best") as objective:
            for request in requests:
                raised: BaseException | None = None
                try:
                    answer = objective.answer(request)
                except type(error) as caught:
                    raised = caught
                if raised is not None:
                    assert raised is error, "unchanged"
                    assert torch.get_rng_state().tolist() == before[0]
                    assert fails is not None
                    booked = fails if request.kind is Kind.GRADIENT else fails - 1
                    assert objective.ledger.evaluations == objective.ledger.forward == booked
                    answer = objective.answer(request)
                found.append((answer.loss, answer.losses, answer.gradient))
            ledger = objective.ledger
            found.append((ledger.evaluations, ledger.forward, ledger.backward, ledger.nonfinite))
            found.append((ledger.best_loss, ledger.best_evaluation, ledger.best_point.x))
            found.append(objective.stochastic)
        assert model.count == 1, "one was committed"
        assert caller() == before
        return found

    expected = path(None)
    for fails in range(1, 10) if not backward else sorted(asks_for_gradient):
        np.testing.assert_equal(path(fails), expected)


@pytest.mark.parametrize("form", ["closure with backward", "closure"])
def test_a_closure_may_fail_before_it_is_known_whether_it_calls_backward(form: str) -> None:
    meter = Meter()
    loss, target = FORMS[form](meter)
    broken = [True]

    def closure() -> Any:
        if broken:
            broken.pop()
            raise ValueError("first call")
        return loss()

    with Objective(closure, target, {"forward_equivalents": 3}) as objective:
        with pytest.raises(ValueError, match="first call"):
            objective.answer(at(Kind.VALUE, X))
        objective.answer(at(Kind.VALUE, X))
        assert (objective.ledger.evaluations, objective.ledger.backward) == (1, meter.backward)


# -- the best point -------------------------------------------------------------------------------------------------


class Statistics(nn.Module):
    """A model whose loss depends on batch statistics that committed evaluations move."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=dtype))
        self.register_buffer("mean", torch.zeros((), dtype=dtype))

    def forward(self) -> Tensor:
        assert isinstance(self.mean, Tensor)
        loss = ((self.weight - 1) ** 2).sum() + self.mean.abs()
        self.mean += 1
        return loss


@pytest.mark.parametrize("best", ["at a point", "in place"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_best_point_comes_back_with_the_buffers_it_was_seen_with(best: str, dtype: torch.dtype) -> None:
    def mean(model: Statistics) -> float:
        assert isinstance(model.mean, Tensor)
        return model.mean.item()

    model, again = Statistics(dtype), Statistics(dtype)
    with Objective(lambda m: m(), model) as objective:
        if best == "at a point":
            first = objective.answer(at(Kind.VALUE, [1, 1]))
        else:
            first = objective.answer(at(Kind.VALUE_AND_GRADIENT, commit=True))
        assert first.loss == 0
        committed = float(best == "in place")
        assert mean(model) == committed
        for where in (
            [1.125, 1.0],
            [3.0, 1.0],
            [1.0, 1.0],
        ):  # ends at the best weights, with other statistics
            objective.vector.write(where)
            assert objective.answer(at(Kind.VALUE_AND_GRADIENT, commit=True)).loss > 0
        state = saved(objective)
        objective.restore_best()
        assert objective.vector.read().tolist() == [1, 1]
        assert mean(model) == committed
    with Objective(lambda m: m(), again) as resumed:
        resumed.load_state_dict(state)
        assert mean(again) == committed + 3
        resumed.restore_best()
        assert again.weight.tolist() == [1, 1]
        assert mean(again) == committed
        assert resumed.ledger.best_loss == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(-9, 9)), min_size=1, max_size=8))
def test_the_best_point_is_a_copy_in_flat_and_in_place_form(visits: list[tuple[bool, int]]) -> None:
    weight = torch.full((2,), 20.0, dtype=torch.float32)
    scope = Ledger()
    with Objective(lambda x: (x**2).sum(), weight) as objective:
        for in_place, where in visits:
            x = np.full(2, float(where))
            if in_place:
                with torch.no_grad():
                    weight.copy_(torch.from_numpy(x))
                objective.answer(at(Kind.VALUE_AND_GRADIENT, commit=True).within(scope))
            else:
                objective.answer(at(Kind.VALUE, x).within(scope))
                x[:] = 99  # solvers reuse their arrays
        best = min((abs(w) for _, w in visits))
        for ledger in (objective.ledger, scope):
            assert ledger.best_loss == 2 * best**2
            flat = ledger.best_point.flat(objective.vector)
            assert np.abs(flat).tolist() == [best, best]
            flat[:] = 99
        assert objective.ledger.best_point is not scope.best_point
        objective.restore_best()
        assert weight.abs().tolist() == [best, best]


def test_points_outside_the_bounds_are_refused_before_anything_is_evaluated() -> None:
    calls = []
    vector = ParameterVector(torch.zeros(2), bounds=(-1, 1), scale=2.0)
    with Objective(lambda x: calls.append(1) or x.sum(), vector) as objective:
        objective.answer(at(Kind.VALUE, [0.5, -0.5]))
        assert vector.read().tolist() == [1, -1]
        unscaled = ParameterVector(torch.zeros(2), bounds=(-1, 1))
    with Objective(lambda x: calls.append(1) or x.sum(), unscaled) as objective:
        for kind, x in (
            (Kind.VALUE, [0, 1.5]),
            (Kind.VALUE_AND_GRADIENT, [-9, 0]),
            (Kind.POPULATION, [[0, 0], [0, 2]]),
        ):
            with pytest.raises(
                BoundsError, match=r"a point outside the bounds: weight [01] at .*fault of the method"
            ):
                objective.answer(at(kind, x))
        assert (len(calls), objective.ledger.evaluations) == (2, 1), "the row before it was evaluated"
        assert unscaled.read().tolist() == [0, 0]


def test_gradients_are_told_in_solver_coordinates() -> None:
    vector = ParameterVector(torch.ones(2, dtype=torch.float64), scale=[2.0, 10.0])
    with Objective(lambda x: (x**2).sum(), vector) as objective:
        z = np.array([3.0, 0.5])
        answer = objective.answer(at(Kind.VALUE_AND_GRADIENT, z))
        assert answer.loss == 36 + 25
        assert answer.gradient is not None
        assert answer.gradient.tolist() == [2 * 6 * 2, 2 * 5 * 10]  # d/dz of (scale z)²
        assert objective.ledger.best_point.x.tolist() == [6, 5], "kept in weights"


def test_a_gradient_may_be_large() -> None:
    weight = torch.ones(2, dtype=torch.float64)
    with Objective(lambda x: (x * 1e300).sum(), weight) as objective:
        assert objective.answer(at(Kind.VALUE_AND_GRADIENT, [1, 1])).finite
        assert objective.answer(at(Kind.VALUE_AND_GRADIENT)).finite


def test_unused_weights_have_gradient_zero_or_none_in_place() -> None:
    used, unused = torch.ones(1), torch.ones(2)
    with Objective(lambda d: d["used"].sum(), {"used": used, "unused": unused}) as objective:
        both = objective.answer(at(Kind.VALUE_AND_GRADIENT, [1, 1, 1]))
        assert both.gradient is not None
        assert both.gradient.tolist() == [1, 0, 0]
        objective.answer(at(Kind.VALUE_AND_GRADIENT))
        assert unused.grad is None
        assert used.grad is not None


@pytest.mark.parametrize("request_", [at(Kind.VALUE_AND_GRADIENT, [1, 1]), at(Kind.VALUE_AND_GRADIENT)])
def test_sparse_gradients_are_kept_in_place_and_told_dense(request_: Request) -> None:
    table = nn.Embedding(3, 1, sparse=True)
    with Objective(lambda m: m(torch.tensor([2, 2])).sum(), table) as objective:
        request_ = request_ if request_.x is None else request_._replace(x=np.ones(3))
        answer = objective.answer(request_)
        if request_.x is None:
            assert table.weight.grad is not None
            assert table.weight.grad.is_sparse
            assert table.weight.grad.to_dense().flatten().tolist() == [0, 0, 2]
        else:
            assert answer.gradient is not None
            assert answer.gradient.tolist() == [0, 0, 2]


# -- as a pure function ---------------------------------------------------------------------------------------------


# torch's forward mode compiles its own decompositions with torch.jit on first use
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("form", ["module", "mapping", "loss on a model with ties"])
def test_the_loss_as_a_pure_function(form: str) -> None:
    if form == "loss on a model with ties":
        model = nn.Module()
        model.a = model.b = nn.Parameter(torch.ones(3, dtype=torch.float64))
        model.register_buffer("two", torch.tensor(2.0, dtype=torch.float64))
        loss, target = (lambda m: (m.a * m.b * m.two).sum()), model
    else:

        def smooth(*parts: Tensor) -> Tensor:
            return ((torch.cat([p.reshape(-1) for p in parts]) - torch.from_numpy(CENTRE)) ** 2).sum()

        target = FORMS[form](Meter())[1]
        loss = (
            (lambda m: smooth(m.weight, m.bias)) if form == "module" else (lambda d: smooth(d["a"], d["b"]))
        )
    objective = Objective(loss, target)
    before = objective.vector.read()
    pure = objective.functional()
    population = torch.randn(4, 3, dtype=torch.float64)
    batched = torch.func.vmap(pure)(population)
    hessian = torch.func.hessian(pure)(population[0])
    torch.testing.assert_close(hessian, torch.eye(3, dtype=torch.float64) * (4 if "ties" in form else 2))
    assert objective.ledger.evaluations == 0, "it is not counted"
    assert objective.vector.read().tolist() == before.tolist()
    with objective:
        looped = objective.answer(at(Kind.POPULATION, population.numpy())).losses
    np.testing.assert_allclose(batched.numpy(), looped, rtol=1e-13)


@pytest.mark.parametrize("form", ["array", "closure", "closure with backward"])
def test_not_every_form_is_a_pure_function(form: str) -> None:
    with pytest.raises(
        ObjectiveError, match=r"functional: a loss of the form .* cannot be called at other weights"
    ):
        made(form)[0].functional()


# -- the rest -------------------------------------------------------------------------------------------------------


def test_listeners_hear_of_every_evaluation_with_the_counters_after_it() -> None:
    heard: list[tuple[Any, ...]] = []

    class Listener:
        def evaluated(self, ledger: Ledger, scopes: Sequence[Ledger], loss: float, probe: bool) -> None:
            heard.append((ledger.evaluations, ledger.forward, ledger.backward, tuple(scopes), loss, probe))

    scope = Ledger()
    with Objective(lambda x: x.sum(), torch.ones(2)) as objective:
        objective.listeners.append(Listener())
        objective.answer(at(Kind.VALUE, [1, 2], keep_graph=True).within(scope))
        objective.answer(at(Kind.GRADIENT, [1, 2]).within(scope))
        objective.answer(at(Kind.POPULATION, [[0, 0], [1, 1]], probe=True))
        objective.answer(at(Kind.VALUE_AND_GRADIENT))
    assert heard == [
        (1, 1, 0, (scope,), 3.0, False),
        (2, 2, 1, (), 0.0, True),
        (3, 3, 1, (), 2.0, True),
        (4, 4, 2, (), 2.0, False),
    ]


def test_a_closed_objective_answers_no_more() -> None:
    objective = Objective(lambda x: x.sum(), torch.ones(2))
    objective.answer(at(Kind.VALUE))
    objective.close()
    objective.close()
    with pytest.raises(ClosedError, match="it was closed; make a new one"):
        objective.answer(at(Kind.VALUE))


def test_a_state_of_other_weights_is_refused() -> None:
    state = saved(Objective(lambda x: x.sum(), torch.ones(2)))
    others: list[tuple[Any, str]] = [
        (torch.ones(3), r"shapes \[\[2\]\], this objective has \[\[3\]\]"),
        (
            torch.ones(2, dtype=torch.float64),
            r"dtypes \['torch\.float32'\], this objective has \['torch\.float64'\]",
        ),
        ({"y": torch.ones(2)}, r"names \['x'\], this objective has \['y'\]"),
    ]
    for target, message in others:
        with pytest.raises(StateError, match=message):
            Objective(lambda x: 0.0, target).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nonfinite": "ignore"}, r"nonfinite: expected one of 'reject', 'raise', got 'ignore'"),
        ({"keep": "first"}, r"keep: expected one of 'auto', 'best', 'last', got 'first'"),
        ({"noise": "none"}, r"noise: expected one of 'shared', 'independent', 'fixed', got 'none'"),
        (
            {"batch": "fast"},
            r"batch: expected 'auto', 'vmap', 'compiled', 'loop' or a number of rows per forward, got 'fast'",
        ),
        ({"backward_cost": 0}, r"backward_cost: expected a number > 0, got 0"),
        ({"backward_cost": math.nan}, r"backward_cost: expected a number > 0, got nan"),
        ({"backward_cost": math.inf}, r"backward_cost: expected a number > 0, got inf"),
        ({"backward_cost": "2"}, r"backward_cost: expected a number > 0, got '2'"),
        ({"budget": 0}, r"budget: expected evaluations > 0, got 0"),
        ({"surrogate": 3}, r"loss: expected a function, got int|surrogate: expected a function, got int"),
    ],
)
def test_wrong_arguments_are_said_clearly(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HybridoptError, match=message):
        Objective(lambda x: x.sum(), torch.ones(2), **arguments)


@pytest.mark.parametrize(
    ("loss", "request_", "message"),
    [
        (
            lambda x: x,
            at(Kind.VALUE, [1, 1]),
            r"loss: expected one real number, got a tensor of shape \(2,\)",
        ),
        (lambda x: x, at(Kind.VALUE_AND_GRADIENT), r"loss: expected one real number"),
        (
            lambda x: None,
            at(Kind.POPULATION, [[1, 1]]),
            r"loss: expected a number or a one-element tensor, got NoneType",
        ),
        (lambda x: x.sum(), at(Kind.RESIDUALS, [1, 1]), r"residuals: this loss returns one number"),
        (
            lambda x: x.detach().sum(),
            at(Kind.VALUE_AND_GRADIENT),
            r"gradient: the loss has no graph to the weights",
        ),
    ],
)
def test_losses_that_cannot_be_used_are_said_clearly(
    loss: Callable[..., Any], request_: Request, message: str
) -> None:
    with Objective(loss, torch.ones(2)) as objective:
        with pytest.raises(HybridoptError, match=message):
            objective.answer(request_)
        assert objective.ledger.evaluations == 0


def test_a_loss_without_a_graph_has_no_gradient_at_a_point() -> None:
    with Objective(lambda x: torch.round(x.detach()).sum(), torch.ones(2)) as objective:
        answer = objective.answer(at(Kind.VALUE_AND_GRADIENT, [1, 1]))
        assert (answer.loss, answer.gradient, answer.finite) == (2, None, True)
        objective.answer(at(Kind.VALUE, [1, 1], keep_graph=True))
        assert objective.answer(at(Kind.GRADIENT, [1, 1])).gradient is None
        assert (objective.ledger.forward, objective.ledger.backward) == (2, 0), (
            "nothing was done, nothing is paid"
        )


# -- two runs on the same weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["adam", "slsqp"])
def test_an_in_place_method_whose_weights_another_run_moved_says_so(other: str) -> None:
    def loss(model: nn.Module) -> torch.Tensor:
        return sum(((p - 3) ** 2).sum() for p in model.parameters())  # type: ignore[return-value]

    model = nn.Linear(2, 1)
    first = hybridopt.Run(loss, model, "adam", budget=50, seed=0)
    second = hybridopt.Run(loss, model, other, budget=50, seed=0)
    first.step()
    second.step()
    with pytest.raises(ObjectiveError, match=r"another run has moved them.*a model of its own"):
        first.step()
    second.finish()
    first.finish()
    again = hybridopt.minimize(loss, model, "adam(lr=0.1)", budget=20, seed=0)  # one after the other is right
    assert again.evaluations == 20


def test_solvers_that_bring_the_weights_to_each_point_may_take_turns() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return ((x - 3) ** 2).sum() + x.prod()

    def path(take_turns: bool) -> list[float]:
        x = torch.ones(3, dtype=torch.float64)
        run = hybridopt.Run(loss, x, "slsqp", budget=40, seed=0)
        other = hybridopt.Run(loss, x, "lbfgsb", budget=40, seed=0)
        with run, other:
            found = []
            while (step := run.step()) is not None:
                found.append(step.loss)
                if take_turns:
                    other.step()
        return found

    assert path(True) == path(False)
