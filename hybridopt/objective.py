"""The only caller of forward and backward: answers an optimizer's questions, counts them, keeps the best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from hybridopt.accounts import NONFINITE_PATIENCE, Accounts, Listener
from hybridopt.batch import Choice
from hybridopt.code import code_digest
from hybridopt.constraints import Constraints
from hybridopt.derivatives import Derivatives
from hybridopt.errors import ClosedError, ObjectiveError, StateError, Stop
from hybridopt.evaluation import Evaluation
from hybridopt.feasibility import Feasibility
from hybridopt.forms import Form, as_vector, bind_loss
from hybridopt.generation import Generations
from hybridopt.guard import ModelGuard
from hybridopt.ledger import Budget, Ledger, Reason
from hybridopt.optimizer import Answer, Kind, Request
from hybridopt.point import Point
from hybridopt.points import Points
from hybridopt.randomness import NOISE_POLICIES, NoisePolicy, Randomness
from hybridopt.residuals import Residuals
from hybridopt.scores import Scores
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
        residuals: True = `loss` returns residuals, a tensor of any shape but always of the same size, and the loss is
            half their squared norm, which least-squares methods make use of and any other method can minimise too.
            "soft_l1", "huber", "cauchy" or "arctan": half the sum of that robust function of their squares; `("huber",
            0.1)`: where 0.1 is the size of a residual from which it counts less.
        constraints: what the weights must satisfy beside their bounds: `constraint(model) -> tensor`, not negative; a
            `Constraint`; a list of these, or a mapping from names to them. The best point is then the one of lowest
            loss among those that keep them all, or, while there is none, the one that breaks them least: of those
            evaluated, or where a method has asked no loss yet, of those whose constraints it asked, with a loss of
            inf. Each constraint function costs a forward wherever the loss is evaluated (but not at difference
            probes, which are never the best then), or where a method asks for it alone, which is no evaluation. Only
            some methods can keep them.
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
        score: a function of the same form as `loss` that is to choose the point at the end, whatever `keep` says: for
            noisy losses, their mean over a fixed batch, or a loss of data that nothing was fitted to. The
            `candidates` points of lowest loss and the method's own point are scored, and the model holds the one of
            lowest score. Each is a forward and an evaluation, which the budget keeps back for it (of seconds it
            keeps nothing back). An exception ends a run unscored. Not with constraints.
        candidates: see `score`. They are copies of the weights.
        batch: how populations are evaluated. `"auto"` (default): many members in one forward
            (`torch.func.vmap`), as many as a fixed allowance of memory takes, if that tells the same losses as one
            by one; the first population is checked for it, which costs two forwards and no evaluation. Otherwise,
            and for closures, losses of NumPy arrays, losses that keep tensors of a forward (a history, a
            running mean) and weights below float32, one by one; `notes` and `repr` say why. A number: as
            many members a forward, also where torch has no batched form of an operation and loops over it.
            `"vmap"`: such operations too, and `ObjectiveError` where there can be no batch. `"compiled"`: likewise,
            with that forward compiled by `torch.compile` for as many members as the first population has (larger
            ones are cut, smaller ones filled up): seconds once and two more forwards, then less time where a model is
            so small that calling its operations takes longer than they do; a CUDA graph on a GPU. `"loop"`: one
            by one, which a loss needs that counts its own calls. (Random numbers that torch draws into memory laid out
            otherwise, dropout of a transposed tensor, may be others in a batch than alone; its members share them.)
        select, bounds, scale, integer, log: as in `ParameterVector`, when `target` is not one.

    From its first answer to `close()` the objective holds the caller's `.grad`, `requires_grad`, train/eval modes,
    and global generators; `close()` (or leaving the `with` block) gives all of them back as found.

    Example:
        >>> import numpy as np
        >>> from hybridopt.optimizer import Kind, Request
        >>> from hybridopt import Objective
        >>> with Objective(lambda x: float((x**2).sum()), np.ones(3), budget=10) as objective:
        ...     objective.answer(Request(Kind.VALUE, np.array([1.0, 2.0, 3.0]))).loss
        14.0
        >>> objective.ledger.evaluations
        1
    """

    dear: ClassVar[bool] = False
    """Whether an evaluation takes so long, a training run, that a method's own time does not count."""

    def __init__(
        self,
        loss: Callable[..., Any],
        target: Any,
        budget: Any = None,
        *,
        residuals: bool | str | tuple[str, float] = False,
        constraints: Any = None,
        surrogate: Callable[..., Any] | None = None,
        nonfinite: Literal["reject", "raise"] = "reject",
        backward_cost: float = 2.0,
        seed: int = 0,
        noise: NoisePolicy = "shared",
        keep: Literal["auto", "best", "last"] = "auto",
        score: Callable[..., Any] | None = None,
        candidates: int = 5,
        batch: Choice = "auto",
        select: Any = None,
        bounds: Any = None,
        scale: Any = None,
        integer: Any = None,
        log: Any = None,
    ) -> None:
        _one_of("nonfinite", nonfinite, ("reject", "raise"))
        _one_of("keep", keep, ("auto", "best", "last"))
        _one_of("noise", noise, NOISE_POLICIES)
        number = isinstance(backward_cost, int | float) and not isinstance(backward_cost, bool)
        if not (number and 0 < backward_cost < math.inf):
            raise ObjectiveError(f"backward_cost: expected a number > 0, got {backward_cost!r}")
        self.vector = as_vector(target, select, bounds=bounds, scale=scale, integer=integer, log=log)
        self.loss = bind_loss(loss, self.vector)
        self.residuals = None if residuals is False else Residuals(self.loss, residuals)
        if self.residuals is not None:
            self.loss = self.residuals.loss
        self.constraints = None if constraints is None else Constraints(constraints, self.vector)
        self.vector.constrained = self.constraints is not None
        self.surrogate = None if surrogate is None else bind_loss(surrogate, self.vector, "surrogate")
        limits = None if budget is None else Budget.parse(budget)
        self.ledger = Ledger(limits, backward_cost=backward_cost)
        self.randomness = Randomness(seed, [t.device for t in self.vector.tensors], noise)
        self._guard = ModelGuard(self.vector)
        self.evaluation = Evaluation(
            self.vector,
            self.loss,
            self.surrogate,
            self.randomness,
            self._guard,
            keep,
            self.residuals,
            batch == "loop",
        )
        self._accounts = Accounts(self.ledger, nonfinite, self.evaluation)
        self.scores: Scores | None = None
        if score is not None and constraints is not None:
            raise ObjectiveError(
                "score: expected a loss without constraints, since a score does not tell whether a point keeps them; "
                "leave score= out and judge `Result.x` by hand"
            )
        if score is not None:
            self.scores = Scores(self.evaluation, bind_loss(score, self.vector, "score"), candidates)
        self._accounts.scores = self.scores
        self.listeners: list[Listener] = self._accounts.listeners
        self._feasibility = Feasibility(self.evaluation, self._accounts, self.constraints)
        self._generations = Generations(self.evaluation, self._accounts, self._feasibility, batch)
        self._points = Points(self.evaluation, self._accounts, self._feasibility)
        self._derivatives = Derivatives(self.evaluation, self._accounts)
        self._by_kind: dict[Kind, Callable[[Request, Sequence[Ledger]], Answer]] = {
            Kind.VALUE: self._points.value,
            Kind.VALUE_AND_GRADIENT: self._points.value,
            Kind.RESIDUALS: self._points.value,
            Kind.GRADIENT: self._points.gradient,
            Kind.POPULATION: self._generations.answer,
            Kind.VALUES_AND_GRADIENTS: self._generations.answer,
            Kind.JACOBIAN: self._derivatives.jacobian,
            Kind.HESSIAN: self._derivatives.hessian,
            Kind.HESSIAN_VECTOR: self._derivatives.hessian,
            Kind.LIMITS: self._feasibility.answer,
            Kind.CONSTRAINTS: self._feasibility.answer,
            Kind.CONSTRAINT_JACOBIAN: self._feasibility.jacobian,
        }
        self._code = code_digest(loss)
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
            self._feasibility.forget()
            self._derivatives.forget()
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
    def batchable(self) -> bool:
        """Whether many points may be evaluated in one forward, as far as is known (the first population shows it)."""
        return self._generations.batch.way != "loop"

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
        batches = (self._generations.batch, self._generations.gradient_batch)
        notes = [*(note for batch in batches for note in batch.notes), *self._derivatives.notes]
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
        if self._generations.gradient_batch.wanted:
            parts.append(f"with gradients {self._generations.gradient_batch!r}")
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
            NonFiniteLoss: under `nonfinite="raise"`; or if the first evaluation asks for a gradient where the weights
                stand. (A method that names its points is told +inf, and raises it if it cannot begin so.)
            BoundsError: the request lies outside the bounds.
        """
        self.open()
        ledgers = (self.ledger, *request.scopes)
        for depth, scope in enumerate(request.scopes, start=1):
            scope.backward_cost = self.ledger.backward_cost
            if scope.shares:
                scope.resolve(ledgers[:depth])
        try:
            return self._by_kind[request.kind](request, ledgers)
        except Stop as stop:
            if stop.ledger is self.ledger:
                raise
            self._generations.forget()
            if stop.reason is Reason.NON_FINITE:
                # the stage has given up; the next one is given its own patience
                for ledger in ledgers[: ledgers.index(stop.ledger)]:
                    ledger.nonfinite_in_a_row = 0
            return Answer(stop=stop, finite=False)

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
            >>> from hybridopt import Objective
            >>> with Objective(lambda x: (x**2).sum(), torch.ones(2)) as objective:
            ...     losses, gradients = objective.values_and_gradients(np.array([[1.0, 2.0], [0.0, 3.0]]))
            >>> losses.tolist(), gradients.tolist()
            ([5.0, 9.0], [[2.0, 4.0], [0.0, 6.0]])
        """
        if self.constraints is not None:
            raise ObjectiveError("values_and_gradients: expected an objective without constraints")
        self.open()
        for scope in scopes:
            scope.backward_cost = self.ledger.backward_cost
        answer = self._generations.values_and_gradients(x, (self.ledger, *scopes))
        assert answer.losses is not None
        assert answer.gradient is not None
        return answer.losses, answer.gradient

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
            >>> from hybridopt import Objective
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
            "coordinates": self.vector.coordinates.state_dict(),
            "ledger": self.ledger.state_dict(),
            "best": None if point is None else point.state_dict(),
            "randomness": self.randomness.state_dict(),
            "generations": self._generations.state_dict(),
            "feasibility": self._feasibility.state_dict(),
            "derivatives": self._derivatives.state_dict(),
            "scores": None if self.scores is None else self.scores.state_dict(),
            "closure_backward": self.evaluation.closure_backward,
            "warned": self._accounts.warned,
            "buffers": self._guard.copy_buffers(),
            "code": self._code,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved objective stood; limits stay as given here, so a budget can be raised.

        Warns where the loss's code is another than the one that was saved, as far as Python shows it.

        Raises:
            StateError: it was saved over other weights, or with other bounds, scale, noise or backward_cost.
        """
        mine, theirs = dict(self.vector.describe()), dict(state["vector"])
        if mine != theirs:
            key = next(k for k in mine if mine[k] != theirs.get(k))
            raise StateError(
                f"state: it was saved for weights with {key} {theirs.get(key)}, this objective has {mine[key]}"
            )
        for name, saved, given in (
            ("noise", state["randomness"]["policy"], self.randomness.policy),
            ("backward_cost", state["ledger"]["backward_cost"], self.ledger.backward_cost),
        ):
            if saved != given:
                raise StateError(f"state: it was saved with {name}={saved!r}, this objective has {given!r}")
        self.vector.resume(state["coordinates"])
        self.ledger.load_state_dict(state["ledger"])
        self.ledger.best_point = None if state["best"] is None else Point.from_state(state["best"])
        self.randomness.load_state_dict(state["randomness"])
        self._generations.load_state_dict(state["generations"])
        self._feasibility.load_state_dict(state["feasibility"])
        self._derivatives.load_state_dict(state["derivatives"])
        if self.scores is not None and state["scores"] is not None:
            self.scores.load_state_dict(state["scores"])
        self.evaluation.closure_backward = state["closure_backward"]
        self._accounts.warned = state["warned"]
        self._guard.set_buffers(state["buffers"])
        if self._code is not None and state["code"] not in (None, self._code):
            warnings.warn(
                "loss: its code has changed since the state was saved, whose losses and best point are the former "
                "one's; begin anew (with checkpoint=: another file) unless both tell the same",
                RuntimeWarning,
                stacklevel=5,
            )


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ObjectiveError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
