"""One forward, and the backward that may follow it, where the weights stand."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from hybridopt.errors import BoundsError, MissingGradient, ObjectiveError
from hybridopt.forms import Form, Loss, as_number
from hybridopt.guard import ModelGuard
from hybridopt.point import Point
from hybridopt.randomness import Randomness
from hybridopt.residuals import Residuals
from hybridopt.rows import DeviceRows, Rows
from hybridopt.vector import FloatArray, ParameterVector

_MOVERS: dict[int, object] = {}  # id of a first weight -> token of the evaluation that moved it last


class Kept(NamedTuple):
    """What a gradient question about the value just computed can use."""

    graph: Tensor | None
    """The loss with its graph; None if it has none to any tensor."""
    grads: list[Tensor | None] | None
    """The gradients that a closure's own backward left."""
    epoch: int
    """State of the weights (`ParameterVector.epoch`); another one means the graph is dead."""


class Evaluation:
    """Brings the weights to a point, calls the loss and autograd there, lends generators, puts buffers back.

    Args:
        vector: the weights.
        loss: what is minimised.
        surrogate: what gradients are taken of instead; None = the loss.
        randomness: lent to every call.
        guard: clears gradients, settles buffers.
        keep: which point counts as the best, see `Objective`.
        residuals: whose half squared norm the loss is; None = the loss is one number.
        one_by_one: whether derivatives of many numbers come one by one too (`batch="loop"`).
    """

    def __init__(
        self,
        vector: ParameterVector,
        loss: Loss,
        surrogate: Loss | None,
        randomness: Randomness,
        guard: ModelGuard,
        keep: Literal["auto", "best", "last"],
        residuals: Residuals | None = None,
        one_by_one: bool = False,
    ) -> None:
        self.one_by_one = one_by_one
        self.vector = vector
        self.residuals = residuals
        self.loss = loss
        self.surrogate = surrogate
        self.randomness = randomness
        self.guard = guard
        self.keep = keep
        self.aux: Any = None
        self.closure_backward: bool | None = None if loss.form is Form.CLOSURE else False
        """Whether the loss is a closure that calls `backward()` itself; None before its first call."""
        self.differentiates = False
        """Whether the loss was seen to need grad mode for its value."""
        self.x: FloatArray | None = None
        """Weights (flat) of the point being answered; None = where an in-place method keeps them."""
        self.kept: Kept | None = None
        """What a gradient question about the last value can use."""
        self._epoch = -1  # state of the weights when they were brought to `x`
        self._token = object()
        self._moved = False
        self._nowhere = False  # whether a coordinate of the point is nan

    # -- where the weights stand --------------------------------------------------------------------------------

    def move(self, z: FloatArray | None) -> None:
        """Bring the weights to a point in solver coordinates; None leaves them where they are.

        Raises:
            BoundsError: it lies outside the bounds.
            ObjectiveError: they should stay, but another run has moved them since.
        """
        self.kept = None
        tensor = self.vector.tensors[0]
        if z is None and self._moved and _MOVERS.get(id(tensor)) is not self._token:
            raise ObjectiveError(
                "weights: another run has moved them since this method, which keeps its iterate in them, did its last "
                "step; give each run a model of its own (copy.deepcopy), or let one finish before the other goes on"
            )
        self._moved = True
        if id(tensor) not in _MOVERS:
            weakref.finalize(tensor, _MOVERS.pop, id(tensor), None)
        _MOVERS[id(tensor)] = self._token
        if z is None:
            self.x, self._nowhere = None, False
            return
        self.x = self.decoded(z)
        self._nowhere = nowhere(self.x)
        self.vector.write(self.x)
        self._epoch = self.vector.epoch

    @overload
    def decoded(self, z: FloatArray) -> FloatArray: ...
    @overload
    def decoded(self, z: DeviceRows) -> DeviceRows: ...
    def decoded(self, z: Rows) -> Rows:
        """The weights, shape (..., n), that solver coordinates stand for: a new matrix, inside the bounds."""
        if isinstance(z, DeviceRows):
            return self._decoded_there(z)
        x = np.array(self.vector.decode(z))
        if self.vector.outside(x):
            row = tuple(np.argwhere((x < self.vector.lower) | (x > self.vector.upper))[0])
            low, high = (float(side[row[-1]]) for side in (self.vector.lower, self.vector.upper))
            raise BoundsError(
                f"the method asked for a point outside the bounds: weight {row[-1]} at {float(x[row])}, expected "
                f"within ({low}, {high}); this is a fault of the method"
            )
        return x

    def _decoded_there(self, z: DeviceRows) -> DeviceRows:
        """The same on a device; rows come there only from methods that ask nothing outside the bounds."""
        vector, x = self.vector, z.copy()
        if vector.scale is not None:
            x.tensor *= x.beside(vector.scale)
            if vector.bounded:
                x.clamp(vector.lower, vector.upper)
        return x

    def imagine(self, x: FloatArray) -> None:
        """Let `x` be the point being answered although the weights stand elsewhere (a member of a batch)."""
        self.x, self.kept, self._epoch = x, None, -1

    def stands_at(self, z: FloatArray | None) -> bool:
        """Whether the weights are where the last question put them, and that is `z`."""
        if self.x is None or z is None or self._epoch != self.vector.epoch:
            return False
        if _MOVERS.get(id(self.vector.tensors[0])) is not self._token:
            return False
        return np.array_equal(self.vector.decode(z), self.x)

    @property
    def stochastic(self) -> bool:
        """Whether the loss was seen to draw random numbers (in its first evaluation)."""
        return bool(self.randomness.used) and self.randomness.policy != "fixed"

    @property
    def paired(self) -> bool:
        """Whether the members of a population draw the same random numbers, and those of the next one others."""
        return self.stochastic and self.randomness.policy == "shared"

    @property
    def keeps_best(self) -> bool:
        """Whether the lowest loss evaluated counts as the best point (else the point where the method stands)."""
        return self.keep == "best" or (self.keep == "auto" and not self.stochastic)

    def copy_point(self, into: Point | None) -> Point | None:
        """The point being answered (for a ledger that found it to be its best), if the best is kept."""
        if not self.keeps_best:
            return None
        if self.x is None and into is not None and into.tensors is not None:
            self.vector.copy_to(into.tensors)
            return Point(None, into.tensors, self.guard.base_buffers())
        return self.point_here()

    def point_here(self, z: FloatArray | None = None) -> Point:
        """The point being answered, or that at some solver coordinates, with the buffers as last settled."""
        x = self.x if z is None else self.decoded(z)
        buffers = self.guard.base_buffers()
        return Point(None, self.vector.snapshot(), buffers) if x is None else Point(x.copy(), None, buffers)

    def undone_on_error(self) -> _Undone:
        """An evaluation that raises has not happened: the same question draws the same numbers again."""
        return _Undone(self)

    # -- forward and backward -----------------------------------------------------------------------------------

    def value(
        self, fresh: bool, with_graph: bool, commit: bool, again: bool = False
    ) -> tuple[float, Kept | None]:
        """The loss where the weights stand.

        Args:
            fresh: whether it draws new random numbers.
            with_graph: whether a gradient may be asked for.
            commit: whether buffers may keep what the forward did to them (`settle` follows).
            again: whether it repeats the last evaluation, whose graph was lost.

        Returns:
            The number, and what a gradient needs (None without `with_graph`). A point with a nan in it is no point: its
            loss is nan, whatever a loss that counts or rounds would say.
        """
        if self._nowhere:
            return math.nan, None
        closure = self.closure_backward is not False
        if closure:
            self.guard.clear_gradients()
        graph = with_graph or closure or self.differentiates
        lent = graph and not commit
        if lent:
            self.guard.lend_buffers()
        self.randomness.begin(fresh, again)
        try:
            with torch.set_grad_enabled(graph):
                result = self.loss.call()
            value, self.aux = as_number(result)
        except RuntimeError as error:
            # a loss that differentiates inside (a differential equation's residual) needs grad mode always
            if graph or "does not require grad" not in str(error):
                raise
            self.differentiates = True
        finally:
            self.randomness.end()
            if lent:
                self.guard.return_buffers()
            elif not commit:
                self.guard.settle_buffers(False)
        if self.differentiates and not graph:
            return self.value(False, with_graph, commit, again=True)
        if closure:
            grads = [t.grad for t in self.vector.tensors]
            if self.closure_backward is None:
                self.closure_backward = any(g is not None for g in grads)
            if self.closure_backward:
                self.guard.clear_gradients()
                return value, Kept(None, grads, self.vector.epoch)
        return value, Kept(_graph(result), None, self.vector.epoch) if with_graph else None

    def gradients(self, kept: Kept | None, in_place: bool) -> Sequence[Tensor | None] | None:
        """The gradients of the kept value, or of the surrogate here; None if there is no graph to differentiate.

        In place they are made by `backward`, which gives each weight memory of its own in its own layout.
        """
        if self.surrogate is not None:
            kept = Kept(_graph(self.call(self.surrogate.call, True)), None, self.vector.epoch)
        assert kept is not None
        if kept.grads is not None:
            return kept.grads
        if kept.graph is None:
            return None
        if not in_place:
            return torch.autograd.grad(kept.graph, self.vector.tensors, allow_unused=True)
        self.guard.clear_gradients()
        torch.autograd.backward(kept.graph, inputs=list(self.vector.tensors))
        return [t.grad for t in self.vector.tensors]

    def call(self, function: Callable[[], Any], graph: bool) -> Any:
        """What another function than the loss says where the weights stand, with the draws of the last evaluation.

        Args:
            function: without arguments.
            graph: whether it is called in grad mode.
        """
        before = self.randomness.used
        self.guard.lend_buffers()
        self.randomness.begin(False)
        try:
            with torch.set_grad_enabled(graph):
                return function()
        finally:
            self.randomness.end()
            self.guard.return_buffers()
            self.guard.settle_buffers(False)
            if before is None:
                self.randomness.used = None  # only the loss can say whether it draws

    def backwards(self, gradient: bool, before: bool = False) -> int:
        """Backward passes of one evaluation: a closure's own serves as its gradient's unless a surrogate is asked.

        Args:
            gradient: whether one is wanted.
            before: whether the most that it may come to is asked (a closure not yet called may call `backward`).
        """
        own = int(self.closure_backward is not False) if before else int(self.closure_backward is True)
        return own + int(gradient) if self.surrogate is not None else max(own, int(gradient))

    def deliver(self, grads: Sequence[Tensor | None], in_place: bool) -> tuple[FloatArray | None, bool]:
        """Put gradients into `.grad` (`in_place`), or return them flat in solver coordinates; and whether finite."""
        if in_place:
            for tensor, grad in zip(self.vector.tensors, grads, strict=True):
                tensor.grad = grad
            return None, _all_finite(grads)
        with torch.no_grad():
            flat = self.vector.gather([None if g is None else g.to_dense() for g in grads])
        finite = bool(np.isfinite(flat).all())
        return self.to_solver(flat), finite

    def to_solver(self, derivative: FloatArray) -> FloatArray:
        """Derivatives by the weights, shape (..., n), at the point being answered, as those by solver coordinates."""
        slope = None if self.x is None else self.vector.coordinates.slope(self.x)
        return derivative if slope is None else derivative * slope

    def nothing(self, in_place: bool) -> FloatArray | None:
        """What is delivered where a loss was not finite: no `.grad`, or zeros."""
        return self.deliver([None] * len(self.vector.tensors), in_place)[0]

    def require_graph(self, grads: Sequence[Tensor | None] | None) -> Sequence[Tensor | None]:
        """Raise `MissingGradient` if there was no graph."""
        if grads is None:
            raise MissingGradient(
                "gradient: the loss has no graph to the weights (it was detached, rounded, turned into a number, "
                "or computed under no_grad); give a surrogate=, or use a method that needs no gradients"
            )
        return grads


class _Undone:
    """What `undone_on_error` does; a class, since a generator as context costs more than both of its ends do."""

    __slots__ = ("_evaluation", "_point")

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation

    def __enter__(self) -> None:
        self._point = self._evaluation.randomness.savepoint()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._evaluation.randomness.rollback(self._point)
            self._evaluation.guard.settle_buffers(False)
            self._evaluation.kept = None


def _graph(result: Any) -> Tensor | None:
    tensor = result[0] if isinstance(result, tuple) else result
    return tensor if isinstance(tensor, Tensor) and tensor.requires_grad else None


def nowhere(x: FloatArray) -> bool:
    """Whether a weight of a point, shape (n,), is nan."""
    return math.isnan(x[x.argmin()])  # which is the first nan


def present(grads: Iterable[Tensor | None]) -> list[Tensor]:
    """The numbers of gradients that there are, of sparse ones those stored; norms of them are those of the whole."""
    found = (g if g.layout is torch.strided else g.coalesce().values() for g in grads if g is not None)
    return [g for g in found if g.numel()]


def _all_finite(grads: Sequence[Tensor | None]) -> bool:
    numbers = present(grads)
    if not numbers:
        return True
    if len({g.device for g in numbers}) > 1:
        return all(bool(g.isfinite().all()) for g in numbers)
    norms = torch._foreach_norm(numbers, math.inf)
    return math.isfinite(torch.stack([n.double() for n in norms]).sum().item())
