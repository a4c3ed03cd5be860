"""Who runs a blocking solver while we hold the reins: a greenlet, or a thread of its own.

Either way control passes back and forth explicitly; never do two sides run at once. A greenlet switch costs about
a microsecond and is right for every solver that keeps its state in Python objects. A solver that keeps a pointer
into the C stack while it calls back (f2py callbacks, MINPACK) needs a thread. A solver of which a process can run only
one at a time (COBYQA holds a lock until it ends) is exclusive: whoever is to go on closes the others first, and a
closed one is run again from its answers when its turn comes.
"""

from __future__ import annotations

import operator
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import greenlet
import torch

from hybridopt import filters
from hybridopt.errors import MethodError, ReplayMismatch
from hybridopt.journal import Journal
from hybridopt.optimizer import Answer, Request

Isolation: TypeAlias = Literal["greenlet", "thread", "exclusive"]
_local = threading.local()
_STUBBORN = (
    1000  # questions a solver may still ask while it is being closed; then it is left to the collector
)


class Abandoned(BaseException):
    """Raised inside a solver's question when its run is closed; a solver should let it pass."""


class Done(NamedTuple):
    """The solver returned."""

    value: Any


class Carrier(Protocol):
    """Runs `body(question)` piecewise."""

    def advance(self, answer: Answer | None) -> Request | Done:
        """Let the solver go on (with the answer to its last question) until its next question or its end."""
        ...

    def usable(self) -> bool:
        """Whether the calling thread may advance it."""
        ...

    def close(self) -> None:
        """End the solver; nothing it does afterwards is seen."""
        ...


Question: TypeAlias = Callable[[Request], Answer]
Body: TypeAlias = Callable[[Question], Any]


def carry(body: Body, isolation: Isolation) -> Carrier:
    """A carrier of the wanted kind; the body must not refer to the run that owns it (such a cycle is never freed)."""
    kinds: dict[str, Callable[[Body], Carrier]] = {
        "greenlet": GreenletCarrier,
        "thread": ThreadCarrier,
        "exclusive": ExclusiveCarrier,
    }
    return kinds[isolation](body)


def _thread_token() -> object:
    """Identifies the calling thread; unlike its ident it is never reused by a later one."""
    try:
        return _local.token
    except AttributeError:
        _local.token = object()
        return _local.token


class _Filters:
    """Keeps apart the warnings filters of a solver and of its caller.

    A solver may be suspended inside its own `warnings.catch_warnings()`, whose effect is process-wide. As long as it
    is not, it sees its caller's filters. Since other threads would see its own, solvers of several threads take turns
    from question to question; losses do not.
    """

    # the last name is private to the standard library: it is what `catch_warnings(record=True)` replaces
    _NAMES = tuple(n for n in ("filters", "showwarning", "_showwarnmsg_impl") if hasattr(warnings, n))
    _read = operator.attrgetter(*_NAMES)

    def __init__(self) -> None:
        self._caller: tuple[Any, ...] = ()
        self._outer: tuple[Any, ...] = ()  # what the solver's own changes began from
        self._solver: tuple[Any, ...] | None = None

    def __enter__(self) -> None:
        """Control passes to the solver."""
        self._lock = filters.alone
        self._lock.acquire()
        self._caller = self._read(warnings)
        if self._solver is None:
            self._outer = self._caller
        else:
            self._set(self._solver)

    def __exit__(self, *_: object) -> None:
        """Control comes back."""
        now = self._read(warnings)
        self._solver = None if _same(now, self._outer) else now
        if not _same(now, self._caller):
            self._set(self._caller)
        self._caller = ()
        self._lock.release()

    def _set(self, values: tuple[Any, ...]) -> None:
        for name, value in zip(self._NAMES, values, strict=True):
            setattr(warnings, name, value)
        with warnings.catch_warnings():
            pass  # tells the interpreter that the filters have changed


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(map(operator.is_, a, b))


def _ask_parent(request: Request) -> Answer:
    parent = greenlet.getcurrent().parent
    if parent is None:
        raise MethodError(
            "solver: expected every question to come from the thread that runs the solver, got one from another "
            "thread; let it evaluate in its own thread (one worker)"
        )
    answer: Answer = parent.switch(request)
    return answer


class GreenletCarrier:
    """A solver on its own stack in the calling thread."""

    def __init__(self, body: Body) -> None:
        self._token = _thread_token()
        self._greenlet = greenlet.greenlet(lambda _: Done(body(_ask_parent)))
        self._grad_mode = True  # torch's default, whatever the mode of the caller who happens to begin it
        self._filters = _Filters()

    def advance(self, answer: Answer | None) -> Request | Done:
        """See `Carrier`. Grad mode and warnings filters of caller and solver stay apart; no loss runs in here."""
        result: Request | Done = self._switch(self._greenlet.switch, answer)
        return result

    def usable(self) -> bool:
        """A greenlet belongs to the thread that began it."""
        return self._token is _thread_token() and not self._greenlet.dead

    def close(self) -> None:
        """Unwind the solver's stack, in this thread; from another one, leave it to its own thread's collector."""
        for _ in range(_STUBBORN):
            if not self.usable():
                return
            try:
                self._switch(self._greenlet.throw, Abandoned)
            except Abandoned:
                return
            except Exception:  # noqa: BLE001 - what a solver raises while it is being closed concerns nobody
                return

    def __del__(self) -> None:
        # left to the collector, the unwinding solver would leave its grad mode and filters to whoever runs by then
        if not sys.is_finalizing():
            self.close()

    def _switch(self, switch: Callable[[Any], Any], value: Any) -> Any:
        mine = torch.is_grad_enabled()
        self._greenlet.parent = greenlet.getcurrent()
        with self._filters:
            torch.set_grad_enabled(self._grad_mode)
            try:
                return switch(value)
            finally:
                self._grad_mode = torch.is_grad_enabled()
                torch.set_grad_enabled(mine)


class _Box:
    """What a solver's thread and its caller share; refers to neither run nor carrier."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.out: Request | Done | BaseException | None = None
        self.closing = False
        self.callers_turn = False
        self.to_solver = threading.Lock()
        self.to_caller = threading.Lock()
        self.to_solver.acquire()
        self.to_caller.acquire()


def _serve(box: _Box, body: Body) -> None:
    def question(request: Request) -> Answer:
        if box.closing:
            raise Abandoned
        box.out = request
        _hand_over(box)
        box.to_solver.acquire()
        if box.closing:
            raise Abandoned
        answer, box.answer = box.answer, None
        assert answer is not None
        return answer

    box.to_solver.acquire()
    try:
        box.out = None if box.closing else Done(body(question))
    except BaseException as error:  # noqa: BLE001 - handed to the caller, or dropped when it closed us
        box.out = None if box.closing else error
    _hand_over(box)


def _hand_over(box: _Box) -> None:
    # the flag counts, the lock only wakes: an interrupt may strike just before or just after it was acquired
    box.callers_turn = True
    if box.to_caller.locked():
        box.to_caller.release()


def _shut(box: _Box) -> None:
    if not box.closing:
        box.closing = True
        # not locked where an interrupt cut `advance` short: the solver is already on its way
        if box.to_solver.locked():
            box.to_solver.release()


class ThreadCarrier:
    """A solver in a thread of its own; about 40 µs a question."""

    def __init__(self, body: Body) -> None:
        self._box = _Box()
        self._filters = _Filters()
        self._thread = threading.Thread(
            target=_serve, args=(self._box, body), daemon=True, name="hybridopt-solver"
        )
        self._finalizer = weakref.finalize(self, _shut, self._box)
        self._finalizer.atexit = False
        self._thread.start()

    def advance(self, answer: Answer | None) -> Request | Done:
        """See `Carrier`. An interrupt while waiting is raised after the solver has come to its next question."""
        box = self._box
        box.answer = answer
        interrupt: KeyboardInterrupt | None = None
        with self._filters:
            box.callers_turn = False
            box.to_solver.release()
            while not box.callers_turn:
                try:
                    box.to_caller.acquire()
                except KeyboardInterrupt as error:
                    interrupt = error
        if interrupt is not None:
            self.close()
            raise interrupt
        out = box.out
        box.out = None
        if isinstance(out, BaseException):
            raise out
        assert out is not None
        return out

    def usable(self) -> bool:
        """Any thread may advance it, as long as it is alive."""
        return self._thread.is_alive() and not self._box.closing

    def close(self) -> None:
        """End the solver and wait for its thread."""
        if self._finalizer.alive:
            with self._filters:
                self._finalizer()
                self._thread.join()


class ExclusiveCarrier:
    """A solver of which the process can run only one: at work it has a thread of its own, waiting it may have none.

    A turn costs the solver's own work on all answers so far, if another one went on in between; else as a thread.
    """

    _at_work: Callable[[], ExclusiveCarrier | None] = staticmethod(lambda: None)  # the last one, weakly

    def __init__(self, body: Body) -> None:
        self._body = body
        self._journal = Journal()
        self._thread: ThreadCarrier | None = None
        self._asked: Request | None = None
        self._over = False

    def advance(self, answer: Answer | None) -> Request | Done:
        """See `Carrier`. Waits while another thread has an exclusive solver on its way to its next question."""
        with filters.alone:  # from one question to the next, so two that alternate both get on
            if answer is not None:
                assert self._asked is not None
                self._journal.append(self._asked, answer)
            try:
                out = self._go_on(answer)
            except BaseException:
                self.close()
                raise
        self._over = isinstance(out, Done)
        self._asked = None if isinstance(out, Done) else out
        return out

    def usable(self) -> bool:
        """Any thread may advance it, as long as it has not ended."""
        return not self._over

    def close(self) -> None:
        """End the solver and wait for its thread."""
        self._over = True
        if self._thread is not None:
            self._thread.close()

    def _go_on(self, answer: Answer | None) -> Request | Done:
        last = ExclusiveCarrier._at_work()
        if last is self and self._thread is not None and self._thread.usable():
            return self._thread.advance(answer)
        if last is not None and last._thread is not None:
            last._thread.close()
        ExclusiveCarrier._at_work = weakref.ref(self)
        self._thread = ThreadCarrier(self._body)
        self._journal.rewind()
        out = self._thread.advance(None)
        for i in range(len(self._journal)):
            if isinstance(out, Done) or not self._journal.matches(out):
                raise ReplayMismatch(
                    f"solver: question {i + 1} of {len(self._journal)} differs when it is run again in one process; "
                    "it draws random numbers of its own, or keeps something from run to run"
                )
            out = self._thread.advance(self._journal.next())
        return out
