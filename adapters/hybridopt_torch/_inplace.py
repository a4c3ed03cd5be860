"""A torch optimizer at work in the model's own tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hybridopt.errors import ClosedError, MissingGradient, NonFiniteLoss, StateError
from hybridopt.optimizer import Answer, HandOver, Incumbent, Kind, Need, Request, StageReport, Step
from hybridopt.trail import relative
from hybridopt.vector import FloatArray, ParameterVector

if TYPE_CHECKING:
    from hybridopt_torch._method import TorchMethod

_QUESTION = Request(Kind.VALUE_AND_GRADIENT, None, commit=True)


class InPlaceRun:
    """One evaluation, one update: the flat vector is never built.

    The iterate lives in the model's tensors. When somebody else writes them (another method's turn), it is saved
    first and put back at the next question. Where no best point is kept (the loss is noisy), the point before each
    update is: it is named if the update led to where no loss is finite.
    """

    needs = frozenset({Need.GRADIENT})

    reports: tuple[StageReport, ...] = ()

    def __init__(self, method: TorchMethod, vector: ParameterVector, warm: HandOver | None) -> None:
        self.method = method
        self.name = method.label
        self.vector = vector
        self.optimizer = method.make(vector, warm)
        self.notes: list[str] = []
        self._loss = math.inf
        self._known = warm is not None and math.isfinite(warm.loss)
        self._saved: list[Tensor] | None = None
        self._sound: list[Tensor] | None = None
        """Where the last finite loss was told, if no best point is kept."""
        self._lost = False  # whether the loss since the last update was not finite
        self._closed = False
        if warm is not None and warm.x is not None:
            vector.write(vector.decode(warm.x))
        vector.claim(self)

    def evicted(self) -> None:
        """Save the iterate: somebody else is about to write the weights."""
        self._saved = self.vector.snapshot()

    def _hold(self) -> None:
        """Have the iterate in the tensors."""
        if self.vector.claim(self) and self._saved is not None:
            self.vector.restore(self._saved)
            self._saved = None

    def ask(self) -> Request:
        """See `Optimizer.ask`."""
        if self._closed:
            raise ClosedError(f"{self.name}: it was closed; start it again, or load its state into a new one")
        self._hold()
        return _QUESTION

    def tell(self, answer: Answer) -> Step | None:
        """See `Optimizer.tell`; a step that is not finite leaves weights and state as they are.

        Raises:
            NonFiniteLoss: at the first step, where no predecessor found a finite loss.
        """
        if answer.stop is not None:
            raise answer.stop
        if not answer.finite and not self._known:
            raise NonFiniteLoss.at_start(answer.loss)
        self._hold()
        self._lost = not answer.finite
        if answer.finite:
            self._loss, self._known = answer.loss, True
            if all(t.grad is None for t in self.vector.tensors):
                raise MissingGradient(
                    "gradient: the loss depends on none of the selected weights "
                    f"({', '.join(map(repr, self.vector.names[:5]))}); select others, or use a gradient-free method"
                )
            if not answer.keeps_best:
                self._keep()
            self.optimizer.step()
            self.vector.touch()
            self.vector.project()
        return Step(answer.loss, self.name)

    def _keep(self) -> None:
        if self._sound is None:
            self._sound = self.vector.snapshot()
        else:
            self.vector.copy_to(self._sound)

    @property
    def incumbent(self) -> Incumbent:
        """The weights as they stand after the last update, and the last loss (evaluated just before it)."""
        standing = self.vector.tensors if self._saved is None else self._saved
        if self._sound is not None and (self._lost or not all(bool(t.isfinite().all()) for t in standing)):
            return Incumbent(self._loss, self.vector.encode(self.vector.gather(self._sound)))
        if self._saved is None:
            return Incumbent(self._loss, None)
        return Incumbent(self._loss, self.vector.encode(self.vector.gather(self._saved)))

    def hand_over(self) -> HandOver:
        """See `Optimizer.hand_over`: variances from the running mean of squared gradients, where there is one."""
        return HandOver(covariance=second_moments(self.optimizer, self.vector, self._saved))

    def state_dict(self) -> dict[str, Any]:
        """The weights and torch's own state dict."""
        weights = self.vector.snapshot() if self._saved is None else [t.clone() for t in self._saved]
        return {
            "method": str(self.method),
            "weights": weights,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "loss": self._loss,
            "known": self._known,
            "sound": None if self._sound is None else [t.clone() for t in self._sound],
            "lost": self._lost,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """See `Optimizer.load_state_dict`; writes the saved weights into the model."""
        if state["method"] != str(self.method):
            raise StateError(f"state: it was saved by {state['method']!r}, this is {str(self.method)!r}")
        self._saved = None
        self.vector.claim(self)
        self.vector.restore(state["weights"])
        load_optimizer(self.optimizer, state["optimizer"])
        self._loss, self._known = state["loss"], state["known"]
        self._sound = None if state["sound"] is None else [t.clone() for t in state["sound"]]
        self._lost = state["lost"]

    def close(self) -> None:
        """Let go of the tensors."""
        self.vector.release(self)
        self._closed = True


def second_moments(
    optimizer: torch.optim.Optimizer, vector: ParameterVector, weights: list[Tensor] | None
) -> FloatArray | None:
    """Relative variances, shape (n,), in solver coordinates: one over the root of each gradient's root mean square.

    One over the root mean square itself would be the diagonal of the inverse Hessian as Adam and its relatives take it.
    But it mixes curvature with the way that led here; half of its logarithm helps CMA-ES nearly as much on an ellipsoid
    of condition 1e6 (20 weights: 6700 forward-equivalents, all of it 5300, nothing 12 800) and costs less where all of
    it misleads (Rosenbrock-20: 4 % more than nothing, all of it 10 %).

    None where the optimizer keeps no squares, or not of every weight. `weights`: where the optimizer stands if not in
    the tensors.
    """
    squares = []
    for tensor in vector.tensors:
        state = optimizer.state.get(tensor, {})
        found = next((state[key] for key in ("exp_avg_sq", "square_avg", "sum") if key in state), None)
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            return None
        squares.append(found)
    roots = np.sqrt(np.abs(vector.gather(squares)))
    slope = vector.coordinates.slope(vector.read() if weights is None else vector.gather(weights))
    if slope is not None:
        roots = roots * slope
    positive = roots[roots > 0]
    return relative(np.maximum(roots, positive.min()) ** -0.5) if len(positive) else None


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a torch state dict, keeping the dtypes that were saved.

    torch casts floating state to its weight's dtype on load (fp32 moments of a bf16 weight become bf16), which
    would break an exact resume.
    """
    saved = copy.deepcopy(dict(state))
    optimizer.load_state_dict(saved)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in saved["state"].items():
        live = optimizer.state[params[index]]
        for key, value in entries.items():
            if isinstance(value, Tensor) and isinstance(live[key], Tensor) and live[key].dtype != value.dtype:
                live[key] = value.to(live[key].device)
