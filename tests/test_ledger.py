"""`hybridopt.ledger`: limits that cannot be passed, counters that cannot be cheated, budgets as people write them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridopt.errors import BudgetError, Stop
from hybridopt.ledger import Budget, Ledger, Reason


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Source:
    """A `Shadow` that hands out numbered copies, and notes which earlier copy it may overwrite."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def copy_point(self, into: Any) -> Any:
        self.given.append(into)
        return f"copy {len(self.given)}"


# -- limits ---------------------------------------------------------------------------------------------------------

COSTS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 2)), max_size=40)
LIMITS = st.tuples(st.none() | st.integers(1, 15), st.none() | st.floats(0.5, 40))


def spend(ledgers: list[Ledger], cost: tuple[int, int, int]) -> Stop | None:
    """Check all, then book in all, as the objective does."""
    evaluations, forward, backward = cost
    try:
        for ledger in ledgers:
            ledger.check(evaluations, forward, backward)
    except Stop as stop:
        return stop
    for ledger in ledgers:
        ledger.forward += forward
        ledger.backward += backward
        for _ in range(evaluations):
            ledger.book(1.0, False, Source())
    return None


@given(
    COSTS,
    st.lists(LIMITS, min_size=1, max_size=3),
    st.floats(0.1, 4),
    st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_nested_limits_are_never_passed_and_never_reached_too_early(
    costs: list[tuple[int, int, int]],
    limits: list[tuple[int | None, float | None]],
    backward_cost: float,
    inner: list[bool],
) -> None:
    ledgers = [
        Ledger(Budget(evaluations=e, forward_equivalents=fe), backward_cost=backward_cost) for e, fe in limits
    ]
    spent = [[0, 0, 0] for _ in ledgers]
    for cost, within in zip(costs, inner, strict=False):
        scope = ledgers if within else ledgers[:1]  # some questions are asked outside the inner stages
        after = [[a + b for a, b in zip(s, cost, strict=True)] for s in spent]
        passed = [
            ledger
            for ledger, (e, f, b), (most, most_fe) in zip(scope, after, limits, strict=False)
            if (most is not None and e > most) or (most_fe is not None and f + backward_cost * b > most_fe)
        ]
        stop = spend(scope, cost)
        assert (stop.ledger if stop else None) is (passed[0] if passed else None)  # the outermost is named
        if stop is None:
            spent[: len(scope)] = after[: len(scope)]
        for ledger, (e, f, b), (most, most_fe) in zip(ledgers, spent, limits, strict=True):
            assert (ledger.evaluations, ledger.forward, ledger.backward) == (e, f, b)
            assert most is None or ledger.evaluations <= most
            assert most_fe is None or ledger.forward_equivalents <= most_fe


def test_which_limit_is_said() -> None:
    def reason(ledger: Ledger) -> Reason:
        with pytest.raises(Stop) as caught:
            ledger.check(1, 1, 1)
        assert caught.value.ledger is ledger
        return caught.value.reason

    clock = Clock()
    spent = Ledger(Budget(evaluations=1, seconds=5), clock=clock)
    spent.check(1, 1, 1)
    spent.book(3.0, False, Source())
    assert reason(spent) is Reason.EVALUATIONS
    spent.limit(Budget(evaluations=2, seconds=5))
    spent.check(1, 1, 1)
    clock.now += 5
    assert reason(spent) is Reason.SECONDS
    assert reason(Ledger(Budget(forward_equivalents=2.9))) is Reason.FORWARD_EQUIVALENTS
    spent.limit(Budget(evaluations=1, target=3.0))
    assert spent.target_reached
    assert reason(spent) is Reason.TARGET  # said before any other


def test_a_target_is_not_reached_before_a_loss_was_seen() -> None:
    ledger = Ledger(Budget(evaluations=5, target=1e300))
    ledger.check(1, 1, 0)
    ledger.book(math.inf, False, Source())
    ledger.check(1, 1, 0)
    ledger.book(1e300, False, Source())
    with pytest.raises(Stop):
        ledger.check(1, 1, 0)


def test_a_limit_can_be_raised_and_what_was_spent_stays() -> None:
    ledger = Ledger(Budget(evaluations=2))
    for _ in range(2):
        assert spend([ledger], (1, 1, 0)) is None
    assert spend([ledger], (1, 1, 0)) is not None
    ledger.limit(Budget(evaluations=3))
    assert spend([ledger], (1, 1, 0)) is None
    assert spend([ledger], (1, 1, 0)) is not None
    assert ledger.evaluations == 3


def test_seconds_run_from_the_first_check_and_stop_in_between() -> None:
    clock = Clock()
    ledger = Ledger(Budget(seconds=10), clock=clock)
    clock.now += 100
    assert ledger.seconds == 0, "the model may take long to build"
    ledger.check(1, 1, 0)
    clock.now += 4
    assert ledger.seconds == 4
    ledger.stop_clock()
    clock.now += 100
    assert ledger.seconds == 4
    ledger.check(1, 1, 0)
    clock.now += 5.5
    saved = ledger.state_dict()
    assert saved["seconds"] == 9.5
    resumed = Ledger(Budget(seconds=10), clock=clock)
    resumed.load_state_dict(saved)
    clock.now += 100
    assert resumed.seconds == 9.5
    resumed.check(1, 1, 0)
    clock.now += 0.5
    with pytest.raises(Stop):
        resumed.check(1, 1, 0)


# -- what is kept ---------------------------------------------------------------------------------------------------

LOSSES = st.lists(
    st.tuples(st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, 0.0])), st.booleans()),
    max_size=30,
)


@given(LOSSES)
def test_the_best_is_the_lowest_finite_loss(losses: list[tuple[float, bool]]) -> None:
    ledger, source = Ledger(), Source()
    for loss, probe in losses:
        ledger.book(loss, probe, source)
    finite = [loss for loss, _ in losses if math.isfinite(loss)]
    assert ledger.evaluations == len(losses)
    assert ledger.nonfinite == len(losses) - len(finite)
    assert ledger.best_loss == min(finite, default=math.inf)
    assert ledger.worst_loss == max(finite, default=-math.inf)
    row = 0
    for loss, _ in losses:
        row = 0 if math.isfinite(loss) else row + 1
    assert ledger.nonfinite_in_a_row == row
    own = [loss for loss, probe in losses if not probe]
    assert ledger.last_loss == (own[-1] if own else math.nan) or math.isnan(ledger.last_loss)
    if finite:
        # the first evaluation that had it: a tie is no improvement, and costs no copy
        assert ledger.best_evaluation == 1 + [loss for loss, _ in losses].index(min(finite))
        assert ledger.best_point == f"copy {len(source.given)}"
        assert source.given == [None, *(f"copy {i}" for i in range(1, len(source.given)))]
    else:
        assert (ledger.best_evaluation, ledger.best_point, source.given) == (0, None, [])


@given(LOSSES)
def test_a_saved_ledger_goes_on_as_if_nothing_had_happened(losses: list[tuple[float, bool]]) -> None:
    import io

    one, other = Ledger(backward_cost=1.5), Ledger()
    half = len(losses) // 2
    for loss, probe in losses[:half]:
        spend([one], (0, 1, 1))
        one.book(loss, probe, Source())
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for ledger in (one, other):
        for loss, probe in losses[half:]:
            spend([ledger], (0, 1, 1))
            ledger.book(loss, probe, Source())
        ledger.stop_clock()
    for name in Ledger._PLAIN:
        a, b = getattr(one, name), getattr(other, name)
        assert a == b or (math.isnan(a) and math.isnan(b)), name
    assert one.spent().keys() == {"evaluations", "forward", "backward", "forward_equivalents", "seconds"}


def test_every_reason_has_a_sentence() -> None:
    assert all(reason.sentence and reason.sentence != reason.value for reason in Reason)
    assert len({reason.sentence for reason in Reason}) == len(Reason)


# -- budgets as people write them -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (137, Budget(evaluations=137)),
        (137.0, Budget(evaluations=137)),
        (np.int64(137), Budget(evaluations=137)),
        (np.float32(8), Budget(evaluations=8)),
        ("137", Budget(evaluations=137)),
        (" 1_000 ", Budget(evaluations=1000)),
        ("1e3", Budget(evaluations=1000)),
        ("5evals", Budget(evaluations=5)),
        ("1000fe", Budget(forward_equivalents=1000)),
        ("2.5forward_equivalents", Budget(forward_equivalents=2.5)),
        ("30s", Budget(seconds=30)),
        ("0.5seconds", Budget(seconds=0.5)),
        ("137, 30s", Budget(evaluations=137, seconds=30)),
        ("1000fe 30s 137", Budget(137, 1000, 30)),
        ({"evaluations": 3, "target": 0}, Budget(evaluations=3, target=0)),
        (Budget(seconds=1), Budget(seconds=1)),
    ],
)
def test_budgets_as_written(value: Any, expected: Budget) -> None:
    parsed = Budget.parse(value)
    assert parsed == expected
    assert repr(parsed) == repr(expected)
    for field, kind in (
        ("evaluations", int),
        ("forward_equivalents", float),
        ("seconds", float),
        ("target", float),
    ):
        assert getattr(parsed, field) is None or type(getattr(parsed, field)) is kind
    assert Budget.parse(vars(parsed)) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"expected a number of evaluations, text such as '137'.*got None; a run needs a limit"),
        (True, r"got True; a run needs a limit"),
        ([137], r"got \[137\]"),
        (0, r"expected evaluations > 0, got 0"),
        (-1, r"expected evaluations > 0, got -1"),
        (1.5, r"expected a whole number of evaluations, got 1\.5"),
        (math.nan, r"expected evaluations > 0, got nan"),
        (math.inf, r"expected a finite limit on evaluations, got inf; None means no limit"),
        (
            "",
            r"expected '137' \(evaluations\), '1000fe' \(forward-equivalents\) or '30s' \(seconds\), got ''",
        ),
        ("fe", r"got 'fe'"),
        ("-5", r"got '-5'"),
        ("1_", r"got '1_'"),
        ("5,", r"got '5,'"),
        ("10 fe", r"got '10 fe'"),
        ("10FE", r"got '10FE'"),
        ("5min", r"got '5min'"),
        ("5 6", r"got '5 6'"),
        ("inf", r"got 'inf'"),
        ("1e400", r"expected a finite limit on evaluations"),
        ("0s", r"expected seconds > 0"),
        ("1.5", r"expected a whole number of evaluations, got 1\.5"),
        (
            {"evals": 3},
            r"unknown limit \['evals'\]; known are \['evaluations', 'forward_equivalents', 'seconds'",
        ),
        ({"seconds": "3"}, r"expected seconds > 0, got '3'"),
        ({"seconds": math.inf}, r"expected a finite limit on seconds"),
        ({"evaluations": True}, r"expected evaluations > 0, got True"),
        ({"evaluations": 5, "target": math.nan}, r"expected a finite number as target, got nan"),
        ({"evaluations": 5, "target": "low"}, r"expected a finite number as target, got 'low'"),
        (
            {"target": 1.0},
            r"expected a limit on evaluations, forward_equivalents or seconds \(a target alone",
        ),
        ({}, r"expected a limit on evaluations"),
        (Budget(target=1), r"expected a limit on evaluations"),
    ],
)
def test_wrong_budgets_are_said_clearly(value: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=r"^budget: ") as caught:
        Budget.parse(value)
    assert caught.match(message)


@given(st.text("0123456789._eE+-fs, \tinfa", max_size=12))
def test_any_text_is_a_budget_or_a_budget_error(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except BudgetError:
        return
    assert any(value is not None and value > 0 for value in vars(budget).values())
