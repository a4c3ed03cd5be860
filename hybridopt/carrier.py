"""Who runs a blocking solver while we hold the reins: a greenlet, or a thread of its own.

Either way control passes back and forth explicitly; never do two sides run at once. A greenlet switch costs about
a microsecond and is right for every solver that keeps its state in Python objects. A solver that keeps a pointer
into the C stack while it calls back (f2py callbacks, MINPACK) needs a thread.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import greenlet
import torch

from hybridopt.optimizer import Answer, Request

Isolation: TypeAlias = Literal["greenlet", "thread"]
_local = threading.local()


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
    return GreenletCarrier(body) if isolation == "greenlet" else ThreadCarrier(body)


def _thread_token() -> object:
    """Identifies the calling thread; unlike its ident it is never reused by a later one."""
    try:
        return _local.token
    except AttributeError:
        _local.token = object()
        return _local.token


def _ask_parent(request: Request) -> Answer:
    parent = greenlet.getcurrent().parent
    assert parent is not None
    answer: Answer = parent.switch(request)
    return answer


class GreenletCarrier:
    """A solver on its own stack in the calling thread."""

    def __init__(self, body: Body) -> None:
        self._token = _thread_token()
        self._greenlet = greenlet.greenlet(lambda _: Done(body(_ask_parent)))
        self._greenlet.gr_context = contextvars.copy_context()
        self._grad_mode = torch.is_grad_enabled()

    def advance(self, answer: Answer | None) -> Request | Done:
        """See `Carrier`. The caller's grad mode and the solver's stay apart; the loss never runs in here."""
        mine = torch.is_grad_enabled()
        self._greenlet.parent = greenlet.getcurrent()
        torch.set_grad_enabled(self._grad_mode)
        try:
            result: Request | Done = self._greenlet.switch(answer)
        finally:
            self._grad_mode = torch.is_grad_enabled()
            torch.set_grad_enabled(mine)
            # a suspended greenlet must not keep its last caller alive
            self._greenlet.parent = _root()
        return result

    def usable(self) -> bool:
        """A greenlet belongs to the thread that began it."""
        return self._token is _thread_token() and not self._greenlet.dead

    def close(self) -> None:
        """Unwind the solver's stack, in this thread; from another one, leave it to its own thread's collector."""
        if self.usable():
            mine = torch.is_grad_enabled()
            self._greenlet.parent = greenlet.getcurrent()
            try:
                self._greenlet.throw(Abandoned)
            except Abandoned:
                pass
            finally:
                torch.set_grad_enabled(mine)


def _root() -> greenlet.greenlet:
    current = greenlet.getcurrent()
    while current.parent is not None:
        current = current.parent
    return current


class _Box:
    """What a solver's thread and its caller share; refers to neither run nor carrier."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.out: Request | Done | BaseException | None = None
        self.closing = False
        self.to_solver = threading.Lock()
        self.to_caller = threading.Lock()
        self.to_solver.acquire()
        self.to_caller.acquire()


def _serve(box: _Box, body: Body) -> None:
    def question(request: Request) -> Answer:
        if box.closing:
            raise Abandoned
        box.out = request
        box.to_caller.release()
        box.to_solver.acquire()
        if box.closing:
            raise Abandoned
        answer, box.answer = box.answer, None
        assert answer is not None
        return answer

    box.to_solver.acquire()
    try:
        box.out = None if box.closing else Done(body(question))
    except BaseException as error:  # handed to the caller, or dropped when it closed us
        box.out = error
    box.to_caller.release()


def _shut(box: _Box) -> None:
    if not box.closing:
        box.closing = True
        box.to_solver.release()


class ThreadCarrier:
    """A solver in a thread of its own; about 40 µs a question."""

    def __init__(self, body: Body) -> None:
        self._box = _Box()
        self._thread = threading.Thread(target=_serve, args=(self._box, body), daemon=True, name="hybridopt-solver")
        self._finalizer = weakref.finalize(self, _shut, self._box)
        self._finalizer.atexit = False
        self._thread.start()

    def advance(self, answer: Answer | None) -> Request | Done:
        """See `Carrier`. An interrupt while waiting is raised after the solver has come to its next question."""
        box = self._box
        box.answer = answer
        box.to_solver.release()
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                box.to_caller.acquire()
                break
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
            self._finalizer()
            self._thread.join()
