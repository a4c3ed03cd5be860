"""What each question costs in each form of a loss, and any sequence of questions."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridopt.errors import (
    MissingGradient,
    Stop,
)
from hybridopt.ledger import Budget, Reason
from hybridopt.objective import Objective
from hybridopt.optimizer import Answer, Kind, Request
from hybridopt.vector import FloatArray
from tests.objective.drive import CENTRE, FORMS, SMOOTH, Meter, X, at, bowl, made, slope

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
