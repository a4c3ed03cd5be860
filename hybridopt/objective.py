"""The only caller of forward and backward: answers an optimizer's questions, counts them, keeps the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from hybridopt.accounts import NONFINITE_PATIENCE, Accounts, Listener
from hybridopt.batch import Choice
from hybridopt.errors import ClosedError, ObjectiveError, StateError, Stop
from hybridopt.evaluation import Evaluation
from hybridopt.forms import Form, as_vector, bind_loss
from hybridopt.generation import Generations
from hybridopt.guard import ModelGuard
from hybridopt.ledger import Budget, Ledger, Reason
from hybridopt.optimizer import Answer, Kind, Request
from hybridopt.point import Point
from hybridopt.randomness import NOISE_POLICIES, NoisePolicy, Randomness
from hybridopt.vector import FloatArray

__all__ = ["NONFINITE_PATIENCE", "Listener", "Objective"]


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
        batch: how populations are evaluated. `"auto"` (default): many members in one forward
            (`torch.func.vmap`), as many as a fixed allowance of memory takes, if that tells the same losses as one
            by one; the first population is checked for it, which costs two forwards and no evaluation. Otherwise,
            and for closures, losses of NumPy arrays, losses that keep tensors of a forward (a history, a
            running mean) and weights below float32, one by one; `notes` and `repr` say why. A number: as
            many members a forward, also where torch has no batched form of an operation and loops over it.
            `"vmap"`: such operations too, and `ObjectiveError` where there can be no batch. `"loop"`: one
            by one, which a loss needs that counts its own calls.
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
        batch: Choice = "auto",
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
        self.randomness = Randomness(seed, [t.device for t in self.vector.tensors], noise)
        self._guard = ModelGuard(self.vector)
        self.evaluation = Evaluation(
            self.vector, self.loss, self.surrogate, self.randomness, self._guard, keep
        )
        self._accounts = Accounts(self.ledger, nonfinite, self.evaluation)
        self.listeners: list[Listener] = self._accounts.listeners
        self._generations = Generations(self.evaluation, self._accounts, batch)
        self._value = math.nan  # the last loss computed
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
            self.evaluation.kept = None
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
        """What the last evaluation's loss returned beside the number; None if nothing, and after a batch."""
        return self.evaluation.aux

    @property
    def differentiable(self) -> bool:
        """Whether autograd could in principle see the weights (a loss of a NumPy array never can)."""
        return self.loss.form is not Form.ARRAY or self.surrogate is not None

    @property
    def stochastic(self) -> bool:
        """Whether the loss was seen to draw random numbers (in its first evaluation)."""
        return self.evaluation.stochastic

    @property
    def keeps_best(self) -> bool:
        """Whether the lowest loss evaluated counts as the best point (else the point where the method stands)."""
        return self.evaluation.keeps_best

    @property
    def notes(self) -> list[str]:
        """What the user should know of the way this loss is evaluated."""
        notes = [*self._generations.batch.notes, *self._generations.gradient_batch.notes]
        if self.evaluation.closure_backward:
            notes.append(
                "the closure calls backward(): every question costs a forward and a backward, values included"
            )
        return notes

    def __repr__(self) -> str:
        parts = [self.loss.form.value]
        if self.loss.form is Form.CLOSURE:
            cost = {
                None: "not called yet",
                True: "forward + backward at every call",
                False: "no backward of its own",
            }
            parts.append(cost[self.evaluation.closure_backward])
        parts.append(repr(self._generations.batch))
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
                return self._generations.answer(request, ledgers)
            if request.kind is Kind.GRADIENT:
                return self._answer_gradient(request, ledgers)
            if request.kind is Kind.RESIDUALS:
                raise ObjectiveError("residuals: this loss returns one number, not a vector of residuals")
            return self._answer_point(request, ledgers)
        except Stop as stop:
            if stop.ledger is self.ledger:
                raise
            self._generations.forget()
            if stop.reason is Reason.NON_FINITE:
                # the stage has given up; the next one is given its own patience
                for ledger in ledgers[: ledgers.index(stop.ledger)]:
                    ledger.nonfinite_in_a_row = 0
            return Answer(stop=stop, finite=False)

    def _answer_point(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        want_gradient = request.kind is Kind.VALUE_AND_GRADIENT
        evaluation, surrogate = self.evaluation, self.surrogate is not None
        # a closure not yet called may turn out to call backward(): allow for it before, book what it did after
        backward = evaluation.backwards(want_gradient, before=True)
        self._accounts.check(ledgers, 1, 1 + int(want_gradient and surrogate), backward)
        evaluation.move(request.x)
        first = self.ledger.evaluations == 0
        keep_graph = request.keep_graph and not surrogate
        in_place = request.x is None
        gradient: FloatArray | None = None
        told = False
        with evaluation.undone_on_error():
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
                evaluation.kept = kept
            if request.commit:
                self._guard.settle_buffers(finite)  # a rejected step moves no statistics
        self._value = value
        forward = 1 + int(want_gradient and surrogate and math.isfinite(value))
        in_a_row = [ledger.nonfinite_in_a_row for ledger in ledgers]
        self._accounts.book(ledgers, value, forward, evaluation.backwards(told), request.probe)
        if not finite:
            if math.isfinite(value):  # a gradient that is not finite is no finite answer either
                for ledger, before in zip(ledgers, in_a_row, strict=True):
                    ledger.nonfinite_in_a_row = before + 1
            what = "gradient" if math.isfinite(value) else "loss"
            shown = math.nan if math.isfinite(value) else value
            self._accounts.reject(shown, first and (want_gradient or request.keep_graph), what)
            if gradient is not None:
                gradient = np.zeros_like(gradient)
        return Answer(value if finite else math.inf, None, gradient, finite, surrogate=surrogate)

    def _answer_gradient(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        """The gradient at the point just valued, from its kept graph; the forward is repeated only if that was lost."""
        surrogate = self.surrogate is not None
        in_place = request.x is None
        here = self.evaluation.stands_at(request.x)
        kept = self.evaluation.kept if here else None
        if kept is not None and kept.graph is None and kept.grads is None:
            return Answer(self._value)  # no graph to the weights: nothing to do, nothing to pay
        paid = kept is not None and kept.grads is not None  # by a closure that calls backward() itself
        if not paid:
            self._accounts.check(ledgers, 0, int(surrogate), 1)
        if not here:
            self.evaluation.move(request.x)
        with self.evaluation.undone_on_error():
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
        self.evaluation.kept = None
        if not finite:
            self._accounts.reject(math.nan, False, "gradient")
            raise Stop(ledgers[-1], Reason.NON_FINITE)
        return Answer(self._value, None, gradient, finite, surrogate=surrogate)

    def values_and_gradients(
        self, x: FloatArray, scopes: Sequence[Ledger] = ()
    ) -> tuple[FloatArray, FloatArray]:
        """Losses and gradients at many points, in batches as for populations (with a check of their own).

        Args:
            x: solver coordinates, shape (popsize, n).
            scopes: as in `Request`.

        Returns:
            Losses, shape (popsize,), and gradients in solver coordinates, shape (popsize, n). Where one of the two
            is not finite: +inf and zeros. Each row is an evaluation with a forward and a backward.

        Raises:
            Stop: not all rows fit into the limits; nothing was evaluated.
            MissingGradient: the loss has no graph to the weights.

        Example:
            >>> import numpy as np, torch
            >>> with Objective(lambda x: (x**2).sum(), torch.ones(2)) as objective:
            ...     losses, gradients = objective.values_and_gradients(np.array([[1.0, 2.0], [0.0, 3.0]]))
            >>> losses.tolist(), gradients.tolist()
            ([5.0, 9.0], [[2.0, 4.0], [0.0, 6.0]])
        """
        self.open()
        for scope in scopes:
            scope.backward_cost = self.ledger.backward_cost
        return self._generations.values_and_gradients(x, (self.ledger, *scopes))

    # -- the best point -----------------------------------------------------------------------------------------

    def restore_best(self) -> None:
        """Put the best point, buffers included, into the model; nothing if none was kept."""
        point: Point | None = self.ledger.best_point
        if point is None:
            return
        self.evaluation.kept = None
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
        """Counters, best point, random states, a half-answered generation and how it is batched, as plain data."""
        point: Point | None = self.ledger.best_point
        return {
            "vector": dict(self.vector.describe()),
            "ledger": self.ledger.state_dict(),
            "best": None if point is None else point.state_dict(),
            "randomness": self.randomness.state_dict(),
            "generations": self._generations.state_dict(),
            "closure_backward": self.evaluation.closure_backward,
            "warned": self._accounts.warned,
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
        self._generations.load_state_dict(state["generations"])
        self.evaluation.closure_backward = state["closure_backward"]
        self._accounts.warned = state["warned"]
        self._guard.set_buffers(state["buffers"])


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ObjectiveError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
