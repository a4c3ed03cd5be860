"""The only caller of forward and backward: answers an optimizer's questions, counts them, keeps the best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridopt.errors import (
    BoundsError,
    ClosedError,
    MissingGradient,
    NonFiniteLoss,
    ObjectiveError,
    StateError,
    Stop,
)
from hybridopt.forms import Form, as_number, as_vector, bind_loss
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
        if not backward_cost > 0:
            raise ObjectiveError(f"backward_cost: expected a number > 0, got {backward_cost!r}")
        self.vector = as_vector(target, select, bounds, scale)
        self.loss = bind_loss(loss, self.vector)
        self.surrogate = None if surrogate is None else bind_loss(surrogate, self.vector)
        limits = None if budget is None else Budget.parse(budget)
        self.ledger = Ledger(limits, backward_cost=backward_cost)
        self.nonfinite = nonfinite
        self.keep = keep
        self.listeners: list[Listener] = []
        self.aux: Any = None
        self.randomness = Randomness(seed, [t.device for t in self.vector.tensors], noise)
        self._guard = ModelGuard(self.vector)
        self._x: FloatArray | None = None  # weights (flat) at the last question; None = in place
        self._kept: _Kept | None = None
        self._partial: tuple[FloatArray, list[float]] | None = None
        self._closure_backward: bool | None = None if self.loss.form is Form.CLOSURE else False
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
            return Answer(stop=stop, finite=False)

    def _answer_point(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        want_gradient = request.kind is Kind.VALUE_AND_GRADIENT
        forward = 1 + int(want_gradient and self.surrogate is not None)
        # a closure not yet called may turn out to call backward(): allow for it before, book what it did after
        self._check(ledgers, 1, forward, int(want_gradient or self._closure_backward is not False))
        self._move(request.x)
        first = self.ledger.evaluations == 0
        keep_graph = request.keep_graph and self.surrogate is None
        value, kept = self._forward(not request.probe, want_gradient or keep_graph, request.commit)
        gradient: FloatArray | None = None
        finite = math.isfinite(value)
        backward = int(self._closure_backward is True)
        if want_gradient:
            gradient, gradient_finite = self._differentiate(kept, request, finite)
            finite = finite and gradient_finite
            backward = int(request.x is None or gradient is not None)
        elif keep_graph:
            self._kept = kept
        self._book(ledgers, value, forward, backward, request.probe)
        if not finite:
            self._on_nonfinite(value, first and (want_gradient or request.keep_graph))
            if gradient is not None:
                gradient = np.zeros_like(gradient)
        return Answer(
            value if finite else math.inf, None, gradient, finite, surrogate=self.surrogate is not None
        )

    def _answer_gradient(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        """The gradient at the point just valued, from its kept graph; the forward is repeated only if it was lost."""
        kept = self._kept
        surrogate = self.surrogate is not None
        fresh = kept is not None and not surrogate and kept.epoch == self.vector.epoch
        if fresh and kept is not None and request.x is not None:
            fresh = self._x is not None and np.array_equal(self.vector.decode(request.x), self._x)
        if fresh and kept is not None and kept.grads is not None:
            gradient, finite = self._collect(kept.grads, request)  # a closure's own backward: already paid
        elif fresh and kept is not None and kept.graph is None:
            return Answer(self.ledger.last_loss, None, None)  # no graph: nothing to do, nothing to pay
        else:
            self._check(ledgers, 0, int(surrogate), 1)
            if not fresh:
                self._move(request.x)
                _, kept = self._forward(False, not surrogate, False)
                for ledger in ledgers:
                    ledger.recomputed += int(not surrogate)
            gradient, finite = self._differentiate(kept, request, True)
            for ledger in ledgers:
                ledger.forward += int(surrogate)
                ledger.backward += 1
        self._kept = None
        if not finite:
            self._on_nonfinite(math.nan, False, "gradient")
            raise Stop(ledgers[-1], Reason.NON_FINITE)
        return Answer(self.ledger.last_loss, None, gradient, finite, surrogate=surrogate)

    def _answer_population(self, request: Request, ledgers: Sequence[Ledger]) -> Answer:
        assert request.x is not None
        losses: list[float] = []
        if self._partial is not None and np.array_equal(self._partial[0], request.x):
            losses = self._partial[1]
        self._partial = (request.x.copy(), losses)
        for i in range(len(losses), len(request.x)):
            self._check(ledgers, 1, 1, int(self._closure_backward is not False))
            self._move(request.x[i])
            value, _ = self._forward(i == 0 and not request.probe, False, False)
            in_a_row = [ledger.nonfinite_in_a_row for ledger in ledgers]
            backward = int(self._closure_backward is True)
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

    def _forward(self, fresh: bool, with_graph: bool, commit: bool) -> tuple[float, _Kept | None]:
        """The loss where the weights stand; with its graph (or a closure's own gradients) if wanted."""
        closure = self._closure_backward is not False
        if closure:
            self._guard.clear_gradients()
        self.randomness.begin(fresh)
        try:
            with torch.set_grad_enabled(with_graph or closure):
                result = self.loss.call()
            value, self.aux = as_number(result)
        finally:
            self.randomness.end()
            self._guard.settle_buffers(commit)
        tensor = result[0] if isinstance(result, tuple) else result
        kept: _Kept | None = None
        if closure:
            grads = [t.grad for t in self.vector.tensors]
            if self._closure_backward is None:
                self._closure_backward = any(g is not None for g in grads)
            if self._closure_backward:
                kept = _Kept(None, grads, self.vector.epoch)
                self._guard.clear_gradients()
        if kept is None and with_graph:
            graph = tensor if isinstance(tensor, Tensor) and tensor.requires_grad else None
            kept = _Kept(graph, None, self.vector.epoch)
        return value, kept

    def _differentiate(
        self, kept: _Kept | None, request: Request, finite: bool
    ) -> tuple[FloatArray | None, bool]:
        """Gradients of the surrogate or of the kept value, put where the request wants them."""
        if not finite:
            return self._collect([None] * len(self.vector.tensors), request)
        if self.surrogate is not None:
            self.randomness.begin(False)
            try:
                with torch.enable_grad():
                    result = self.surrogate.call()
                tensor = result[0] if isinstance(result, tuple) else result
            finally:
                self.randomness.end()
                self._guard.settle_buffers(False)
            graph = tensor if isinstance(tensor, Tensor) and tensor.requires_grad else None
            kept = _Kept(graph, None, self.vector.epoch)
        assert kept is not None
        if kept.grads is not None:
            return self._collect(kept.grads, request)
        if kept.graph is None:
            if request.x is None:
                raise MissingGradient(
                    "gradient: the loss has no graph to the weights (it was detached, rounded, turned into a number, "
                    "or computed under no_grad); give a surrogate=, or use a method that needs no gradients"
                )
            return None, True
        grads = torch.autograd.grad(kept.graph, self.vector.tensors, allow_unused=True)
        return self._collect(grads, request)

    def _collect(self, grads: Sequence[Tensor | None], request: Request) -> tuple[FloatArray | None, bool]:
        if request.x is None:
            for tensor, grad in zip(self.vector.tensors, grads, strict=True):
                tensor.grad = grad
            return None, _all_finite(grads)
        with torch.no_grad():
            flat = self.vector.gather([None if g is None else g.to_dense() for g in grads])
        finite = bool(np.isfinite(flat).all())
        return (flat if self.vector.scale is None else flat * self.vector.scale), finite

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
        buffers = self._guard.copy_buffers() if self._x is None else []
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
            "closure_backward": self._closure_backward,
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
        self._closure_backward = state["closure_backward"]
        self._warned = state["warned"]
        self._guard.set_buffers(state["buffers"])


class _Kept(NamedTuple):
    """What a later gradient question about the value just computed can use."""

    graph: Tensor | None
    grads: list[Tensor | None] | None
    epoch: int


def _all_finite(grads: Sequence[Tensor | None]) -> bool:
    present = [g if g.layout is torch.strided else g.coalesce().values() for g in grads if g is not None]
    present = [g for g in present if g.numel()]
    if not present:
        return True
    if len({g.device for g in present}) > 1:
        return all(bool(g.isfinite().all()) for g in present)
    norms = torch._foreach_norm(present, math.inf)
    return math.isfinite(torch.stack([n.float() for n in norms]).sum().item())


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ObjectiveError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
