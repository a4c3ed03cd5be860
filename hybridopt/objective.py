"""The only caller of forward and backward: answers an optimizer's questions, counts them, keeps the best."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridopt.errors import (
    BoundsError,
    ClosedError,
    NonFiniteLoss,
    ObjectiveError,
    StateError,
    Stop,
)
from hybridopt.evaluation import Evaluation, Kept
from hybridopt.forms import Form, as_vector, bind_loss
from hybridopt.guard import ModelGuard
from hybridopt.ledger import Budget, Ledger, Reason
from hybridopt.optimizer import Answer, Kind, Request
from hybridopt.point import Point
from hybridopt.randomness import NOISE_POLICIES, NoisePolicy, Randomness

FloatArray: TypeAlias = npt.NDArray[np.float64]
NONFINITE_PATIENCE = 30  # questions in a row without a finite loss before a run or stage ends


class Listener(Protocol):
    """Told of every evaluation (a `Tracker`)."""

    def evaluated(self, ledger: Ledger, scopes: Sequence[Ledger], loss: float, probe: bool) -> None:
        """One loss was computed; `ledger` is the run's, `scopes` those of its stages, outermost first."""


class Objective:
    """A loss over a vector of weights, answering `Request`s within a budget.

    Args:
        loss: `loss(model)` when `target` is a module; `f(x)` when it is a tensor or array; `f(params)` when it is a
            dict; or a `closure()` without arguments, with or without its own `backward()`. Returns one number (or
            a pair of a number and anything, which is kept as `aux`). A closure that calls `backward()` costs a
            forward and a backward at every question, values included, and a population is a loop over it.
        target: the model, tensor(s), array, dict, parameter groups or `ParameterVector` to optimize.
        budget: limits, see `Budget`; None = unlimited (the harness requires one).
        surrogate: a differentiable stand-in with the same form as `loss`, used for gradients only; best point,
            budget and tracker go by `loss`. A gradient then costs two forwards and a backward.
        nonfinite: `"reject"` (default): a loss that is nan or inf is told as +inf and counted, and 30 questions in
            a row without a finite one end the run or stage; `"raise"`: it raises `NonFiniteLoss`.
        backward_cost: forward-equivalents of one backward; a fixed number, because a measured one would make
            budgets depend on a clock.
        seed: of the random numbers that the loss draws.
        noise: who shares draws, see `Randomness`.
        keep: which point is "the best": `"best"` (lowest loss evaluated), `"last"` (where the method stands), or
            `"auto"` (default): the best, unless the first evaluation drew random numbers, which makes the lowest
            loss a lucky draw.
        select, bounds, scale: as in `ParameterVector`, when `target` is not one.

    From its first answer to `close()` the objective holds the caller's `.grad`, `requires_grad`, train/eval modes,
    and global generators; `close()` (or leaving the `with` block) gives all of them back as found.

    Example:
        >>> import numpy as np
        >>> from hybridopt.optimizer import Kind, Request
        >>> with Objective(lambda x: float((x**2).sum()), np.ones(3), budget=10) as objective:
        ...     objective.answer(Request(Kind.VALUE, np.array([1.0, 2.0, 3.0]))).loss
        14.0
        >>> objective.ledger.evaluations
        1
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        target: Any,
        budget: Any = None,
        *,
        surrogate: Callable[..., Any] | None = None,
        nonfinite: Literal["reject", "raise"] = "reject",
        backward_cost: float = 2.0,
        seed: int = 0,
        noise: NoisePolicy = "shared",
        keep: Literal["auto", "best", "last"] = "auto",
        select: Any = None,
        bounds: Any = None,
        scale: Any = None,
    ) -> None:
        _one_of("nonfinite", nonfinite, ("reject", "raise"))
        _one_of("keep", keep, ("auto", "best", "last"))
        _one_of("noise", noise, NOISE_POLICIES)
        number = isinstance(backward_cost, int | float) and not isinstance(backward_cost, bool)
        if not (number and 0 < backward_cost < math.inf):
            raise ObjectiveError(f"backward_cost: expected a number > 0, got {backward_cost!r}")
        self.vector = as_vector(target, select, bounds, scale)
        self.loss = bind_loss(loss, self.vector)
        self.surrogate = None if surrogate is None else bind_loss(surrogate, self.vector)
        limits = None if budget is None else Budget.parse(budget)
        self.ledger = Ledger(limits, backward_cost=backward_cost)
        self.nonfinite = nonfinite
        self.keep = keep
        self.listeners: list[Listener] = []
        self.randomness = Randomness(seed, [t.device for t in self.vector.tensors], noise)
        self._guard = ModelGuard(self.vector)
        self.evaluation = Evaluation(self.vector, self.loss, self.surrogate, self.randomness, self._guard)
        self._x: FloatArray | None = None  # weights (flat) at the last question; None = in place
        self._epoch = -1  # state of the weights when they were brought there
        self._kept: Kept | None = None
        self._value = math.nan  # the last loss computed
        self._partial: tuple[FloatArray, list[float]] | None = None
        self._warned = False
        self._closed = False

    # -- session ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take hold of the model's gradients and modes and of the global generators; done by the first answer."""
        if self._closed:
            raise ClosedError("objective: it was closed; make a new one to evaluate again")
        if not self._guard.held:
            self._guard.open()
            self.randomness.open()

    def close(self) -> None:
        """Give everything back as found, weights and buffers as they stand; the objective cannot answer any more."""
        if self._guard.held:
            self._kept = None
            self.randomness.close()
            self._guard.close()
            self.ledger.stop_clock()
        self._closed = True

    def __enter__(self) -> Objective:
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def aux(self) -> Any:
        """What the last evaluation's loss returned beside the number; None if nothing."""
        return self.evaluation.aux

    @property
    def differentiable(self) -> bool:
        """Whether autograd could in principle see the weights (a loss of a NumPy array never can)."""
        return self.loss.form is not Form.ARRAY or self.surrogate is not None

    @property
    def stochastic(self) -> bool:
        """Whether the loss was seen to draw random numbers (in its first evaluation)."""
        return bool(self.randomness.used) and self.randomness.policy != "fixed"

    @property
    def keeps_best(self) -> bool:
        """Whether the lowest loss evaluated counts as the best point (else the point where the method stands)."""
        return self.keep == "best" or (self.keep == "auto" and not self.stochastic)

    @property
    def notes(self) -> list[str]:
        """What the user should know of the way this loss is evaluated."""
        if self.evaluation.closure_backward:
            return [
                "the closure calls backward(): every question costs a forward and a backward, values included"
            ]
        return []

    def __repr__(self) -> str:
        parts = [self.loss.form.value]
        if self.loss.form is Form.CLOSURE:
            cost = {
                None: "not called yet",
                True: "forward + backward at every call",
                False: "no backward of its own",
            }
            parts.append(f"{cost[self.evaluation.closure_backward]}, populations one by one")
        if self.surrogate is not None:
            parts.append("gradients of a surrogate")
        return f"Objective({', '.join(parts)}; {self.vector!r}; {self.ledger!r})"

    # -- answering ----------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Answer:
        """Evaluate one request, book it, and reply.

        Raises:
            Stop: a limit of this objective's own ledger forbids it. (A limit of one of the request's scopes comes
                back as `Answer.stop`.) Of a population the rows that fit are evaluated and remembered; asked
                again with a larger budget, only the rest is.
            NonFiniteLoss: under `nonfinite="raise"`; or at the first evaluation of a method that needs gradients.
            BoundsError: the request lies outside the bounds.
        """
        self.open()
        ledgers = (self.ledger, *request.scopes)
        for scope in request.scopes:
            scope.backward_cost = self.ledger.backward_cost
        try:
            if request.kind is Kind.POPULATION:
                return self._answer_population(request, ledgers)
            if request.kind is Kind.GRADIENT:
                return self._answer_gradient(request, ledgers)
            if request.kind is Kind.RESIDUALS:
                raise ObjectiveError("residuals: this loss returns one number, not a vector of residuals")
            return self._answer_point(request, ledgers)
        except Stop as stop:
            if stop.ledger is self.ledger:
                raise
            self._partial = None
            if stop.reason is Reason.NON_FINITE:
                # the stage has given up; the next one is given its own patience
                for ledger in ledgers[: ledgers.index(stop.ledger)]:
                    ledger.nonfinite_in_a_row = 0
            return Answer(stop=stop, finite=False)

    def _answer_point(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        want_gradient = request.kind is Kind.VALUE_AND_GRADIENT
        evaluation, surrogate = self.evaluation, self.surrogate is not None
        # a closure not yet called may turn out to call backward(): allow for it before, book what it did after
        own = int(evaluation.closure_backward is not False)
        self._check(ledgers, 1, 1 + int(want_gradient and surrogate), self._backwards(want_gradient, own))
        self._move(request.x)
        first = self.ledger.evaluations == 0
        keep_graph = request.keep_graph and not surrogate
        in_place = request.x is None
        gradient: FloatArray | None = None
        told = False
        with self._undone_on_error():
            value, kept = evaluation.value(not request.probe, want_gradient or keep_graph, request.commit)
            finite = math.isfinite(value)
            if want_gradient and not finite:
                gradient = evaluation.nothing(in_place)
            elif want_gradient:
                grads = evaluation.gradients(kept, in_place)
                if in_place:
                    grads = evaluation.require_graph(grads)
                if grads is not None:
                    gradient, finite = evaluation.deliver(grads, in_place)
                    told = True
            elif keep_graph:
                self._kept = kept
            if request.commit:
                self._guard.settle_buffers(finite)  # a rejected step moves no statistics
        self._value = value
        forward = 1 + int(want_gradient and surrogate and math.isfinite(value))
        backward = self._backwards(told, int(evaluation.closure_backward is True))
        in_a_row = [ledger.nonfinite_in_a_row for ledger in ledgers]
        self._book(ledgers, value, forward, backward, request.probe)
        if not finite:
            if math.isfinite(value):  # a gradient that is not finite is no finite answer either
                for ledger, before in zip(ledgers, in_a_row, strict=True):
                    ledger.nonfinite_in_a_row = before + 1
            what = "gradient" if math.isfinite(value) else "loss"
            shown = math.nan if math.isfinite(value) else value
            self._on_nonfinite(shown, first and (want_gradient or request.keep_graph), what)
            if gradient is not None:
                gradient = np.zeros_like(gradient)
        return Answer(value if finite else math.inf, None, gradient, finite, surrogate=surrogate)

    def _backwards(self, gradient: bool, own: int) -> int:
        """Backward passes of one evaluation: a closure's own serves as its gradient's unless a surrogate is asked."""
        return own + int(gradient) if self.surrogate is not None else max(own, int(gradient))

    @contextlib.contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """An evaluation that raises has not happened: the same question draws the same numbers again."""
        point = self.randomness.savepoint()
        try:
            yield
        except BaseException:
            self.randomness.rollback(point)
            self._guard.settle_buffers(False)
            self._kept = None
            raise

    def _answer_gradient(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        """The gradient at the point just valued, from its kept graph; the forward is repeated only if that was lost."""
        surrogate = self.surrogate is not None
        in_place = request.x is None
        here = self._stands_at(request.x)
        kept = self._kept if here else None
        if kept is not None and kept.graph is None and kept.grads is None:
            return Answer(self._value)  # no graph to the weights: nothing to do, nothing to pay
        paid = kept is not None and kept.grads is not None  # by a closure that calls backward() itself
        if not paid:
            self._check(ledgers, 0, int(surrogate), 1)
        if not here:
            self._move(request.x)
        with self._undone_on_error():
            if kept is None and not surrogate:
                _, kept = self.evaluation.value(False, True, False, again=True)
                for ledger in ledgers:
                    ledger.recomputed += 1
            grads = self.evaluation.gradients(kept, in_place)
        if grads is None:
            return Answer(self._value)
        gradient, finite = self.evaluation.deliver(grads, in_place)
        for ledger in ledgers:
            ledger.forward += int(surrogate)
            ledger.backward += int(not paid)
        self._kept = None
        if not finite:
            self._on_nonfinite(math.nan, False, "gradient")
            raise Stop(ledgers[-1], Reason.NON_FINITE)
        return Answer(self._value, None, gradient, finite, surrogate=surrogate)

    def _answer_population(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        assert request.x is not None
        losses: list[float] = []
        if self._partial is not None and np.array_equal(self._partial[0], request.x):
            losses = self._partial[1]
        self._partial = (request.x.copy(), losses)
        for i in range(len(losses), len(request.x)):
            self._check(ledgers, 1, 1, int(self.evaluation.closure_backward is not False))
            self._move(request.x[i])
            with self._undone_on_error():
                value, _ = self.evaluation.value(i == 0 and not request.probe, False, False)
            in_a_row = [ledger.nonfinite_in_a_row for ledger in ledgers]
            backward = int(self.evaluation.closure_backward is True)
            self._book(ledgers, value, 1, backward, request.probe)
            if not math.isfinite(value):
                for ledger, before in zip(ledgers, in_a_row, strict=True):
                    ledger.nonfinite_in_a_row = before  # a generation counts once, below
                self._on_nonfinite(value, False)
            losses.append(value if math.isfinite(value) else math.inf)
        self._partial = None
        told = np.array(losses)
        if len(told) and not np.isfinite(told).any():
            for ledger in ledgers:
                ledger.nonfinite_in_a_row += 1
        return Answer(float(told.min()) if len(told) else math.inf, told, None, bool(np.isfinite(told).all()))

    # -- one evaluation -----------------------------------------------------------------------------------------

    def _check(self, ledgers: Sequence[Ledger], evaluations: int, forward: int, backward: int) -> None:
        for ledger in ledgers:
            ledger.check(evaluations, forward, backward)
        for ledger in reversed(ledgers):
            if ledger.nonfinite_in_a_row >= NONFINITE_PATIENCE:
                raise Stop(ledger, Reason.NON_FINITE)

    def _stands_at(self, z: FloatArray | None) -> bool:
        """Whether the weights are where the last question put them, and that is `z`."""
        if self._x is None or z is None or self._epoch != self.vector.epoch:
            return False
        return np.array_equal(self.vector.decode(z), self._x)

    def _move(self, z: FloatArray | None) -> None:
        """Bring the weights to the point of a question."""
        self._kept = None
        if z is None:
            self._x = None
            return
        x = self.vector.decode(z)
        if self.vector.outside(x):
            i = int(np.argmax((x < self.vector.lower) | (x > self.vector.upper)))
            raise BoundsError(
                f"the method asked for a point outside the bounds: weight {i} at {x[i]!r}, expected within "
                f"({self.vector.lower[i]!r}, {self.vector.upper[i]!r}); this is a fault of the method"
            )
        self._x = np.array(x)
        self.vector.write(x)
        self._epoch = self.vector.epoch

    def _book(
        self, ledgers: Sequence[Ledger], value: float, forward: int, backward: int, probe: bool
    ) -> None:
        for ledger in ledgers:
            ledger.forward += forward
            ledger.backward += backward
            ledger.book(value, probe, self)
        for listener in self.listeners:
            listener.evaluated(self.ledger, ledgers[1:], value, probe)

    def _on_nonfinite(self, value: float, start: bool, what: str = "loss") -> None:
        where = f"evaluation {self.ledger.evaluations}"
        if start:
            raise NonFiniteLoss(
                f"loss: expected a finite loss and gradient at the start point, got {value}; a method that needs "
                "gradients cannot begin here: change the initial weights, or put a gradient-free method before it"
            )
        if self.nonfinite == "raise":
            raise NonFiniteLoss(f'{what}: got {value} at {where} (nonfinite="raise")')
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{what} {value} at {where}: rejected (told to the method as +inf, never the best); later ones are "
                "counted without a warning",
                RuntimeWarning,
                stacklevel=4,
            )

    # -- the best point -----------------------------------------------------------------------------------------

    def copy_point(self, into: Point | None) -> Point | None:
        """The point just evaluated (for a ledger that found it to be its best)."""
        if not self.keeps_best:
            return None
        buffers = self._guard.base_buffers()
        if self._x is not None:
            return Point(self._x, None, buffers)
        if into is not None and into.tensors is not None:
            self.vector.copy_to(into.tensors)
            return Point(None, into.tensors, buffers)
        return Point(None, self.vector.snapshot(), buffers)

    def restore_best(self) -> None:
        """Put the best point, buffers included, into the model; nothing if none was kept."""
        point: Point | None = self.ledger.best_point
        if point is None:
            return
        self._kept = None
        point.put(self.vector)
        self._guard.set_buffers(point.buffers)

    def functional(self) -> Callable[[Tensor], Any]:
        """The loss as a pure function of the flat weights: differentiable, usable under `torch.func`, uncounted.

        Raises:
            ObjectiveError: the loss is a closure or takes a NumPy array.

        Example:
            >>> import torch
            >>> objective = Objective(lambda x: (x**2).sum(), torch.ones(2))
            >>> torch.func.grad(objective.functional())(torch.tensor([1.0, 3.0]))
            tensor([2., 6.])
        """
        pure = self.loss.functional
        if pure is None:
            raise ObjectiveError(
                f"functional: a loss of the form {self.loss.form.value} cannot be called at other weights; "
                "write it as loss(model), f(params) or f(x) of a torch tensor"
            )
        return lambda x: pure(self.vector.unflatten(x))

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters, best point, random states, and a half-answered generation, as plain data."""
        point: Point | None = self.ledger.best_point
        partial = self._partial
        return {
            "vector": dict(self.vector.describe()),
            "ledger": self.ledger.state_dict(),
            "best": None if point is None else point.state_dict(),
            "randomness": self.randomness.state_dict(),
            "partial": None
            if partial is None
            else [torch.tensor(partial[0]), torch.tensor(partial[1], dtype=torch.float64)],
            "closure_backward": self.evaluation.closure_backward,
            "warned": self._warned,
            "buffers": self._guard.copy_buffers(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved objective stood; limits stay as given here, so a budget can be raised.

        Raises:
            StateError: it was saved over other weights.
        """
        mine, theirs = dict(self.vector.describe()), dict(state["vector"])
        if mine != theirs:
            key = next(k for k in mine if mine[k] != theirs.get(k))
            raise StateError(
                f"state: it was saved for weights with {key} {theirs.get(key)}, this objective has {mine[key]}"
            )
        self.ledger.load_state_dict(state["ledger"])
        self.ledger.best_point = None if state["best"] is None else Point.from_state(state["best"])
        self.randomness.load_state_dict(state["randomness"])
        if state["partial"] is not None:
            x, losses = state["partial"]
            self._partial = (x.numpy().copy(), losses.tolist())
        else:
            self._partial = None
        self.evaluation.closure_backward = state["closure_backward"]
        self._warned = state["warned"]
        self._guard.set_buffers(state["buffers"])


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ObjectiveError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
