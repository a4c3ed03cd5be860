"""Many starts of an elementwise torch optimizer as one, on matrices with a row for each start."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridopt.errors import ClosedError, NonFiniteLoss, StateError
from hybridopt.optim._base import FusedStep
from hybridopt.optimizer import Answer, HandOver, Incumbent, Kind, Need, Request, StageReport, Step
from hybridopt.vector import FloatArray, ParameterVector
from hybridopt_torch._inplace import load_optimizer

if TYPE_CHECKING:
    from hybridopt_torch._method import TorchMethod

# Each weight is updated from itself, its own gradient and state alone.
_TORCH = (
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax,
    torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
)  # fmt: skip
_COUPLED = (
    "max_grad_norm",
    "stochastic_rounding",
    "differentiable",
)  # options that make weights or starts differ


def batchable(method: TorchMethod, vector: ParameterVector) -> bool:
    """Whether starts of this method do not notice that they share tensors."""
    fused = issubclass(method.cls, FusedStep) and method.cls.step is FusedStep.step
    plain = vector.integer is None and vector.log is None and not vector.constrained
    return plain and (fused or method.cls in _TORCH) and not any(map(method.options().get, _COUPLED))


@dataclass
class _Part:
    """Weights of one dtype, device and parameter group."""

    group: int
    columns: npt.NDArray[np.intp]
    """Their places in the flat vector."""
    like: Tensor
    sides: tuple[Tensor, Tensor] | None
    """Their bounds."""


@dataclass
class _Block:
    """Starts that were updated equally often: per-tensor state (`step`) is common to them."""

    rows: npt.NDArray[np.intp]
    tensors: list[Tensor]
    """Of each part, shape (rows, columns)."""
    grads: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.grads = [torch.zeros_like(t) for t in self.tensors]


class ManyRun:
    """See `hybridopt.optimizer.Many`.

    The starts are the rows of one matrix (of each dtype), stepped by one torch optimizer. A start whose loss or
    gradient is not finite is left as it is, with its state, as it would be alone; from then on it has counted fewer
    steps than the others, so they are kept in separate matrices.
    """

    needs = frozenset({Need.GRADIENT})
    notes: Sequence[str] = ()
    reports: tuple[StageReport, ...] = ()

    def __init__(self, method: TorchMethod, vector: ParameterVector, points: FloatArray) -> None:
        self.method = method
        self.name = method.label
        self.vector = vector
        self._groups = _groups(vector)
        self._parts = _parts(vector, self._groups)
        x = vector.decode(points)
        self._blocks = [_Block(np.arange(len(x)), [_columns(part, x) for part in self._parts])]
        self.optimizer = self._make()
        self.losses = np.full(len(x), math.inf)
        self._last = np.full(len(x), math.inf)
        self._best = np.array(points)
        self._asked: FloatArray | None = None
        self._closed = False

    def _make(self) -> torch.optim.Optimizer:
        groups = [
            {
                **options,
                "params": [
                    block.tensors[k]
                    for block in self._blocks
                    for k, part in enumerate(self._parts)
                    if part.group == index
                ],
            }
            for index, options in enumerate(self._groups)
        ]
        return self.method.construct(groups)

    # -- the protocol -------------------------------------------------------------------------------------------

    def ask(self) -> Request:
        """See `Optimizer.ask`."""
        if self._closed:
            raise ClosedError(f"{self.name}: it was closed; start it again, or load its state into a new one")
        if self._asked is None:
            self._asked = self.vector.encode(self._weights())
        return Request(Kind.VALUES_AND_GRADIENTS, self._asked)

    def tell(self, answer: Answer) -> Step | None:
        """See `Optimizer.tell`."""
        if answer.stop is not None:
            raise answer.stop
        assert self._asked is not None
        assert answer.losses is not None
        assert answer.gradient is not None
        losses = answer.losses
        finite = np.isfinite(losses)
        if not finite.any() and np.isinf(self.losses).all():
            raise NonFiniteLoss.at_start(math.inf)
        self._last = np.where(finite, losses, self._last)
        better = losses < self.losses
        self.losses = np.where(better, losses, self.losses)
        self._best[better] = self._asked[better]
        self._asked = None
        if not finite.all():
            self._divide([rows[chosen] for rows in self._rows() for chosen in (finite[rows], ~finite[rows])])
        gradients = answer.gradient
        if self.vector.scale is not None:
            gradients = gradients / self.vector.scale
        for block in self._blocks:
            moves = bool(finite[block.rows[0]])
            for part, tensor, grad in zip(self._parts, block.tensors, block.grads, strict=True):
                tensor.grad = grad if moves else None
                if moves:
                    rows = gradients if len(block.rows) == len(gradients) else gradients[block.rows]
                    grad.copy_(_columns(part, rows))
        self.optimizer.step()
        for block in self._blocks:
            for part, tensor in zip(self._parts, block.tensors, strict=True):
                if part.sides is not None:
                    tensor.clamp_(*part.sides)
        return Step(answer.loss, self.name)

    def retain(self, rows: Sequence[int]) -> None:
        """See `Many.retain`."""
        kept = np.array(rows)
        self._divide([block[np.isin(block, kept)] for block in self._rows()])
        renamed = {int(old): new for new, old in enumerate(kept)}
        for block in self._blocks:
            block.rows = np.array([renamed[int(row)] for row in block.rows])
        self.losses, self._last, self._best = self.losses[kept], self._last[kept], self._best[kept]
        self._asked = None

    # -- matrices -----------------------------------------------------------------------------------------------

    def _rows(self) -> list[npt.NDArray[np.intp]]:
        return [block.rows for block in self._blocks]

    def _divide(self, rows: Sequence[npt.NDArray[np.intp]]) -> None:
        """Make a block of each of these sets of rows (empty ones vanish), with the states that they have."""
        before, states = self._blocks, self.optimizer.state
        wanted = [some for some in rows if len(some)]
        if [set(some) for some in wanted] == [set(block.rows) for block in before]:
            return
        sources = [next(block for block in before if some[0] in block.rows) for some in wanted]
        places = [
            torch.tensor([list(source.rows).index(row) for row in some])
            for some, source in zip(wanted, sources, strict=True)
        ]
        self._blocks = [
            _Block(some, [t.detach()[place.to(t.device)] for t in source.tensors])
            for some, source, place in zip(wanted, sources, places, strict=True)
        ]
        self.optimizer = self._make()
        for block, source, place in zip(self._blocks, sources, places, strict=True):
            for new, old in zip(block.tensors, source.tensors, strict=True):
                if old in states:
                    self.optimizer.state[new] = {
                        key: _taken(value, old, place) for key, value in states[old].items()
                    }

    def _weights(self) -> FloatArray:
        """All starts, shape (k, n), float64."""
        x = np.empty((sum(map(len, self._rows())), self.vector.n))
        for block in self._blocks:
            for part, tensor in zip(self._parts, block.tensors, strict=True):
                x[np.ix_(block.rows, part.columns)] = tensor.detach().to("cpu", torch.float64).numpy()
        return x

    # -- looking ------------------------------------------------------------------------------------------------

    @property
    def incumbent(self) -> Incumbent:
        """The start with the lowest loss so far, after its last update; the loss just before that."""
        leader = int(np.argmin(self.losses))
        return Incumbent(float(self._last[leader]), self.vector.encode(self._weights()[leader]))

    def hand_over(self) -> HandOver:
        """The best point of each start."""
        order = np.argsort(self.losses, kind="stable")
        order = order[np.isfinite(self.losses[order])]
        return HandOver(points=self._best[order], losses=self.losses[order])

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The matrices, torch's own state dict, and the best of each start."""
        return {
            "method": str(self.method),
            "rows": [torch.tensor(rows) for rows in self._rows()],
            "weights": [[t.detach().clone() for t in block.tensors] for block in self._blocks],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "losses": torch.tensor(np.stack([self.losses, self._last])),
            "best": torch.tensor(self._best),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """See `Optimizer.load_state_dict`."""
        if state["method"] != str(self.method):
            raise StateError(f"state: it was saved by {state['method']!r}, this is {str(self.method)!r}")
        self._blocks = [
            _Block(
                rows.numpy().copy(),
                [t.clone().to(p.like.device) for p, t in zip(self._parts, weights, strict=True)],
            )
            for rows, weights in zip(state["rows"], state["weights"], strict=True)
        ]
        self.optimizer = self._make()
        load_optimizer(self.optimizer, state["optimizer"])
        self.losses, self._last = state["losses"].numpy().copy()
        self._best = state["best"].numpy().copy()
        self._asked = None

    def close(self) -> None:
        """Refuse further questions."""
        self._closed = True


def _groups(vector: ParameterVector) -> list[dict[str, Any]]:
    """The options of each parameter group."""
    if vector.groups is None:
        return [{}]
    return [{key: value for key, value in group.items() if key != "params"} for group in vector.groups]


def _parts(vector: ParameterVector, groups: Sequence[Any]) -> list[_Part]:
    """The weights by parameter group, dtype and device."""
    group_of = dict.fromkeys(vector.names, 0)
    for index, group in enumerate(vector.groups or ()):
        group_of |= dict.fromkeys(group["params"], index)
    members: dict[Any, list[int]] = {}
    for i, (name, tensor) in enumerate(zip(vector.names, vector.tensors, strict=True)):
        members.setdefault((group_of[name], tensor.dtype, tensor.device), []).append(i)
    parts = []
    for (group, _, _), found in members.items():
        slices = [vector.slices[vector.names[i]] for i in found]
        columns = np.concatenate([np.arange(s.start, s.stop) for s in slices])
        part = _Part(group, columns, vector.tensors[found[0]].detach(), None)
        if vector.bounded:
            part.sides = (_columns(part, vector.lower), _columns(part, vector.upper))
        parts.append(part)
    return parts


def _columns(part: _Part, x: FloatArray) -> Tensor:
    """A part of weights or gradients, shape (..., n), in its dtype and on its device; a copy."""
    return torch.tensor(x[..., part.columns]).to(part.like)


def _taken(value: Any, matrix: Tensor, rows: Tensor) -> Any:
    """The state of some rows of a matrix."""
    if not isinstance(value, Tensor):
        return value
    return value[rows.to(value.device)] if value.shape == matrix.shape else value.clone()
