"""Greenlet, thread and exclusive carriers: exact switching, nothing that leaks across a switch or is left behind."""

from __future__ import annotations

import gc
import itertools
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import greenlet
import numpy as np
import pytest
import torch

from hybridopt.carrier import Abandoned, Carrier, Done, Isolation, Question, carry
from hybridopt.errors import MethodError, ReplayMismatch
from hybridopt.optimizer import Answer, Kind, Request

ALL: list[Isolation] = ["greenlet", "thread", "exclusive"]


def ask_for(question: Question, number: float) -> float:
    return question(Request(Kind.VALUE, np.array([number]))).loss


def counting(question: Question) -> list[float]:
    return [ask_for(question, i) for i in range(3)]


def drive(carrier: Carrier, answers: Iterator[float]) -> Any:
    """Answer until the body is done; its value."""
    out = carrier.advance(None)
    while not isinstance(out, Done):
        out = carrier.advance(Answer(next(answers)))
    return out.value


@pytest.fixture(params=ALL)
def isolation(request: pytest.FixtureRequest) -> Isolation:
    return request.param  # type: ignore[no-any-return]


# -- switching ---------------------------------------------------------------------------------------------------


def test_questions_and_answers_in_turn(isolation: Isolation) -> None:
    carrier = carry(counting, isolation)
    out = carrier.advance(None)
    for i in range(3):
        assert isinstance(out, Request)
        assert out.x is not None
        assert out.x.tolist() == [i]
        out = carrier.advance(Answer(10.0 + i))
    assert out == Done([10.0, 11.0, 12.0])
    assert not carrier.usable()


def test_exception_of_the_body_comes_out_as_the_same_object(isolation: Isolation) -> None:
    error = ZeroDivisionError("in the solver")

    def body(question: Question) -> None:
        ask_for(question, 0)
        raise error

    carrier = carry(body, isolation)
    carrier.advance(None)
    with pytest.raises(ZeroDivisionError) as caught:
        carrier.advance(Answer(0.0))
    assert caught.value is error
    carrier.close()


def test_two_and_eight_interleaved(isolation: Isolation) -> None:
    for copies in (2, 8):
        carriers = [carry(counting, isolation) for _ in range(copies)]
        outs: list[Any] = [c.advance(None) for c in carriers]
        order = np.random.default_rng(copies).permutation(np.repeat(np.arange(copies), 3))
        for i in order:
            outs[i] = carriers[i].advance(Answer(float(i) + outs[i].x[0]))
        assert [out.value for out in outs] == [[i, i + 1.0, i + 2.0] for i in range(copies)]


def test_one_inside_the_answer_to_another(isolation: Isolation) -> None:
    """The loss of one solver runs another solver."""

    def inner(number: float) -> float:
        return float(sum(drive(carry(counting, isolation), iter([number] * 3))))

    carrier = carry(counting, isolation)
    out = carrier.advance(None)
    while not isinstance(out, Done):
        assert out.x is not None
        out = carrier.advance(Answer(inner(out.x[0])))
    assert out.value == [0.0, 3.0, 6.0]


def test_advanced_from_a_foreign_greenlet(isolation: Isolation) -> None:
    carrier = carry(counting, isolation)
    results: list[Any] = []

    def stepper(answer: Answer | None) -> None:
        results.append(carrier.advance(answer))

    for answer in (None, Answer(1.0), Answer(2.0), Answer(3.0)):
        greenlet.greenlet(stepper).switch(answer)
    assert results[-1] == Done([1.0, 2.0, 3.0])


def test_a_suspended_solver_does_not_keep_its_caller_alive() -> None:
    carrier = carry(counting, "greenlet")

    class Witness:
        pass

    def stepper(_: Any) -> None:
        witness = Witness()
        refs.append(weakref.ref(witness))
        carrier.advance(None)

    refs: list[Any] = []
    greenlet.greenlet(stepper).switch(None)
    gc.collect()
    assert refs[0]() is None
    carrier.close()


def test_usable_only_in_its_own_thread() -> None:
    carriers = {isolation: carry(counting, isolation) for isolation in ALL}
    found = {}

    def elsewhere() -> None:
        found.update({isolation: c.usable() for isolation, c in carriers.items()})

    for c in carriers.values():
        c.advance(None)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == {"greenlet": False, "thread": True, "exclusive": True}
    assert all(c.usable() for c in carriers.values())
    for c in carriers.values():
        c.close()


def test_a_thread_that_reuses_an_ident_is_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idents of ended threads are reused; a greenlet must not be taken for one of the new thread."""
    carrier = carry(counting, "greenlet")
    carrier.advance(None)
    mine = threading.get_ident()
    verdicts: list[bool] = []

    def elsewhere() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading, "get_ident", lambda: mine)
            verdicts.append(carrier.usable())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert verdicts == [False]
    assert carrier.usable()


def test_a_question_from_a_helper_thread_is_refused() -> None:
    def body(question: Question) -> Any:
        errors: list[BaseException] = []

        def helper() -> None:
            try:
                ask_for(question, 0)
            except MethodError as error:
                errors.append(error)

        thread = threading.Thread(target=helper)
        thread.start()
        thread.join()
        return errors

    carrier = carry(body, "greenlet")
    out = carrier.advance(None)
    assert isinstance(out, Done)
    assert "in its own thread" in str(out.value[0])


# -- exclusive ---------------------------------------------------------------------------------------------------


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Its result; a failure, not a test run that hangs, if two solvers wait for each other."""
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    return out[0]


class Locked:
    """A solver as COBYQA is: of all that share the lock, one can be at work."""

    def __init__(self, lock: threading.Lock) -> None:
        self.lock = lock
        self.begun = 0

    def __call__(self, question: Question) -> list[float]:
        with self.lock:
            self.begun += 1
            told: list[float] = []
            for _ in range(4):
                told.append(ask_for(question, sum(told)))
            return told


def test_exclusive_solvers_take_turns() -> None:
    """Whoever goes on closes the other first, which is run again from its answers; nobody asks anything twice."""
    lock = threading.Lock()
    bodies = [Locked(lock) for _ in range(3)]

    def work() -> list[Any]:
        carriers = [carry(body, "exclusive") for body in bodies]
        outs: list[Any] = [c.advance(None) for c in carriers]
        asked: list[list[float]] = [[], [], []]
        for _ in range(4):
            for i, c in enumerate(carriers):
                asked[i].append(outs[i].x[0])
                outs[i] = c.advance(Answer(i + 1.0))
        assert not any(c.usable() for c in carriers)
        assert asked == [[0, k, 2 * k, 3 * k] for k in (1.0, 2.0, 3.0)]
        return [out.value for out in outs]

    assert within(60, work) == [[k] * 4 for k in (1.0, 2.0, 3.0)]
    assert [body.begun for body in bodies] == [5, 5, 5]
    assert not lock.locked()


def test_an_exclusive_solver_left_in_peace_runs_once() -> None:
    body = Locked(threading.Lock())
    assert within(60, lambda: drive(carry(body, "exclusive"), iter([1.0] * 4))) == [1.0] * 4
    assert body.begun == 1


def test_exclusive_solvers_in_two_threads() -> None:
    lock = threading.Lock()

    def work() -> list[Any]:
        out: dict[int, Any] = {}
        threads = [
            threading.Thread(
                target=lambda i=i: out.update(
                    {i: drive(carry(Locked(lock), "exclusive"), iter([float(i)] * 4))}
                )
            )
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [out[i] for i in range(4)]

    for _ in range(25):
        assert within(60, work) == [[float(i)] * 4 for i in range(4)]
    assert not lock.locked()


def test_an_abandoned_exclusive_solver_makes_room() -> None:
    lock = threading.Lock()

    def work() -> Any:
        carry(Locked(lock), "exclusive").advance(None)  # dropped in the middle, never closed
        return drive(carry(Locked(lock), "exclusive"), iter([1.0] * 4))

    assert within(60, work) == [1.0] * 4


def test_a_failed_exclusive_solver_makes_room() -> None:
    lock = threading.Lock()

    def failing(question: Question) -> None:
        with lock:
            ask_for(question, 0)
            raise ZeroDivisionError

    def work() -> Any:
        failed = carry(failing, "exclusive")
        failed.advance(None)
        with pytest.raises(ZeroDivisionError):
            failed.advance(Answer(0.0))
        assert not failed.usable()
        return drive(carry(Locked(lock), "exclusive"), iter([1.0] * 4))

    assert within(60, work) == [1.0] * 4


def test_an_exclusive_solver_that_is_random_is_found_out() -> None:
    numbers = iter(range(100))

    def random(question: Question) -> None:
        ask_for(question, next(numbers))
        ask_for(question, next(numbers))

    carrier, other = carry(random, "exclusive"), carry(counting, "exclusive")
    carrier.advance(None)
    carrier.advance(Answer(0.0))
    other.advance(None)
    with pytest.raises(ReplayMismatch, match="question 1 of 2 differs when it is run again in one process"):
        carrier.advance(Answer(0.0))
    assert not carrier.usable()
    carrier.close()
    other.close()


# -- closing -----------------------------------------------------------------------------------------------------


def test_close_unwinds_the_solver(isolation: Isolation) -> None:
    seen: list[str] = []

    def body(question: Question) -> None:
        try:
            ask_for(question, 0)
        except Abandoned:
            seen.append("abandoned")
            raise
        finally:
            seen.append("finally")

    carrier = carry(body, isolation)
    carrier.advance(None)
    carrier.close()
    carrier.close()
    assert seen == ["abandoned", "finally"]
    assert not carrier.usable()


def test_close_before_the_first_question(isolation: Isolation) -> None:
    before = threading.active_count()
    carrier = carry(counting, isolation)
    carrier.close()
    assert threading.active_count() == before


def test_close_outlasts_a_solver_that_asks_on(isolation: Isolation) -> None:
    """Solvers that swallow the exception and ask again, or raise another one, are closed all the same."""
    asked: list[int] = []

    def stubborn(question: Question) -> None:
        for i in range(20):
            try:
                ask_for(question, i)
            except Abandoned:
                asked.append(i)
        raise ZeroDivisionError

    carrier = carry(stubborn, isolation)
    carrier.advance(None)
    carrier.close()
    assert asked == list(range(20))
    assert not carrier.usable()


def test_abandoned_carriers_leave_nothing(isolation: Isolation) -> None:
    class Witness:
        pass

    alive: list[weakref.ref[Witness]] = []

    def make() -> Callable[[Question], Any]:
        witness = Witness()
        alive.append(weakref.ref(witness))

        def body(question: Question) -> Any:
            return ask_for(question, 0), witness

        return body

    before = set(threading.enumerate())
    for _ in range(200):
        carry(make(), isolation).advance(None)
    gc.collect()
    for thread in set(threading.enumerate()) - before:  # they were told to end
        thread.join()
    gc.collect()
    assert [ref for ref in alive if ref() is not None] == []


def test_a_closed_thread_is_gone(isolation: Isolation) -> None:
    before = threading.active_count()
    carriers = [carry(counting, isolation) for _ in range(20)]
    for carrier in carriers:
        carrier.advance(None)
    for carrier in carriers:
        carrier.close()
    assert threading.active_count() == before


# -- what must not cross a switch --------------------------------------------------------------------------------


def test_grad_mode_stays_apart(isolation: Isolation) -> None:
    def body(question: Question) -> list[bool]:
        modes = [torch.is_grad_enabled()]
        with torch.no_grad():
            ask_for(question, 0)
            modes.append(torch.is_grad_enabled())
            ask_for(question, 1)
            modes.append(torch.is_grad_enabled())
        ask_for(question, 2)
        return [*modes, torch.is_grad_enabled()]

    carrier = carry(body, isolation)
    out: Any = None
    answer = None
    for mode in (True, False, True, False):
        with torch.set_grad_enabled(mode):
            out = carrier.advance(answer)
            assert torch.is_grad_enabled() is mode
        answer = Answer(0.0)
    assert out == Done([True, False, False, True])


def test_a_solver_begun_without_gradients_has_them_all_the_same(isolation: Isolation) -> None:
    """Its own mode is torch's default: a revived solver must not depend on who revives it."""
    with torch.no_grad():
        carrier = carry(lambda question: torch.is_grad_enabled(), isolation)
        assert carrier.advance(None) == Done(True)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("end", ["close", "collect"])
def test_grad_mode_survives_the_end_of_a_suspended_solver(isolation: Isolation, end: str) -> None:
    def body(question: Question) -> None:
        with torch.no_grad():
            ask_for(question, 0)

    carrier = carry(body, isolation)
    carrier.advance(None)
    with torch.no_grad():
        if end == "close":
            carrier.close()
        del carrier
        gc.collect()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_errstate_stays_apart(isolation: Isolation) -> None:
    def body(question: Question) -> str:
        with np.errstate(divide="raise"):
            ask_for(question, 0)
            return np.geterr()["divide"]

    carrier = carry(body, isolation)
    before = np.geterr()
    carrier.advance(None)
    assert np.geterr() == before
    with np.errstate(divide="ignore"):
        assert carrier.advance(Answer(0.0)) == Done("raise")
        assert np.geterr()["divide"] == "ignore"


@pytest.mark.parametrize("record", [False, True])
def test_warnings_filters_stay_apart(isolation: Isolation, record: bool) -> None:
    """A solver suspended in `catch_warnings` must not silence (or record) its caller's warnings."""

    def body(question: Question) -> int:
        with warnings.catch_warnings(record=record) as log:
            warnings.simplefilter("ignore" if log is None else "always")
            ask_for(question, 0)
            warnings.warn("the solver's", RuntimeWarning, stacklevel=1)
            ask_for(question, 1)
        return -1 if log is None else len(log)

    carrier = carry(body, isolation)
    carrier.advance(None)
    with pytest.warns(RuntimeWarning, match="the caller's"):
        warnings.warn("the caller's", RuntimeWarning, stacklevel=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        carrier.advance(Answer(0.0))
        warnings.warn("another caller's", RuntimeWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["another caller's"]
    filters = warnings.filters
    assert carrier.advance(Answer(0.0)) == Done(1 if record else -1)
    assert warnings.filters is filters
    with pytest.warns(RuntimeWarning, match="the caller's"):
        warnings.warn("the caller's", RuntimeWarning, stacklevel=1)


def test_a_solver_sees_its_callers_filters_of_the_moment(isolation: Isolation) -> None:
    def body(question: Question) -> None:
        with warnings.catch_warnings():
            ask_for(question, 0)
        ask_for(question, 1)
        warnings.warn("heard", RuntimeWarning, stacklevel=1)

    carrier = carry(body, isolation)
    carrier.advance(None)
    carrier.advance(Answer(0.0))
    with pytest.warns(RuntimeWarning, match="heard"):
        assert carrier.advance(Answer(0.0)) == Done(None)


def test_filters_survive_the_close_of_a_suspended_solver(isolation: Isolation) -> None:
    def body(question: Question) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ask_for(question, 0)

    carrier = carry(body, isolation)
    with warnings.catch_warnings():
        carrier.advance(None)
    filters, content = warnings.filters, list(warnings.filters)
    carrier.close()
    assert warnings.filters is filters
    assert list(warnings.filters) == content


def test_filters_survive_solvers_of_several_threads(
    isolation: Isolation,
) -> None:
    """Filters belong to the process: two that change them at once would leave it with those of one of them."""

    def body(question: Question) -> int:
        for i in range(150):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ask_for(question, i)
                warnings.warn("unheard", RuntimeWarning, stacklevel=1)
        return 150

    told: list[Any] = []
    found, filters, content = sys.getswitchinterval(), warnings.filters, list(warnings.filters)
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda: told.append(drive(carry(body, isolation), itertools.repeat(0.0))))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(found)
    assert told == [150, 150, 150]
    assert warnings.filters is filters
    assert list(warnings.filters) == content


# -- interrupts --------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler of Ctrl-C, whatever this process was begun with."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_while_a_thread_carries() -> None:
    """Ctrl-C in the solver's own time is raised once the solver has come to its next question; no thread is left."""
    before = threading.active_count()

    def body(question: Question) -> None:
        ask_for(question, 0)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        counting(question)

    def advance_until_interrupted(carrier: Carrier) -> None:
        carrier.advance(Answer(0.0))
        for _ in iter(int, 1):  # the signal may be delivered a moment later
            pass

    for _ in range(200):  # before, while and after the lock is taken
        carrier = carry(body, "thread")
        carrier.advance(None)
        with pytest.raises(KeyboardInterrupt):
            advance_until_interrupted(carrier)
        carrier.close()
        assert not carrier.usable()
    assert threading.active_count() == before
