"""What methods are tried on: a model, losses that count their calls, listeners, a constraint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybridopt.constraints import Constraint
from hybridopt.harness import Run
from hybridopt.ledger import Ledger
from hybridopt.vector import ParameterVector


class Model(nn.Module):
    """Weights to optimize, in two tensors, beside a frozen one that nobody may touch.

    Args:
        start: the weights, at least one.
        dtype, device: of all of them.
    """

    def __init__(
        self, start: Sequence[float], dtype: torch.dtype = torch.float64, device: str = "cpu"
    ) -> None:
        super().__init__()
        values = torch.tensor(start, dtype=dtype, device=device)
        cut = len(start) - len(start) // 2
        self.a = nn.Parameter(values[:cut].clone())
        if cut < len(start):
            self.b = nn.Parameter(values[cut:].clone())
        self.frozen = nn.Parameter(torch.ones(2, dtype=dtype, device=device), requires_grad=False)

    def x(self) -> Tensor:
        """All weights, flat."""
        return torch.cat([p for name, p in self.named_parameters() if name != "frozen"])

    def bits(self) -> list[bytes]:
        """The exact weights."""
        return [bits(p) for p in self.parameters()]


class Loss:
    """A loss of a `Model` that counts, by itself, how often it is called and differentiated.

    Args:
        function: the loss of the flat weights.
        spoil: what is done to each value before it is returned; called with the value and the number of the call,
            from 1.
        residuals: whether it returns residuals instead, of `bowl`, `valley` or `flat`.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        spoil: Callable[[Tensor, int], Any] | None = None,
        residuals: bool = False,
    ) -> None:
        self.function = RESIDUALS[function] if residuals else function
        self.spoil = spoil
        self.residuals = residuals
        self.calls = 0
        self.backwards = 0
        self.values: list[float] = []

    def __call__(self, model: Model) -> Any:
        """The loss, after it was counted."""
        self.calls += 1
        value = self.function(model.x())
        if value.requires_grad:
            value.register_hook(self._count)  # type: ignore[no-untyped-call]
        told = value if self.spoil is None else self.spoil(value, self.calls)
        number = 0.5 * (told * told).sum() if self.residuals else told
        self.values.append(number.item() if isinstance(number, Tensor) else float(number))
        return told

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1

    @property
    def finite(self) -> list[float]:
        """The finite values returned so far."""
        return [v for v in self.values if math.isfinite(v)]


class Row(NamedTuple):
    """One evaluation as a listener sees it; equal rows mean equal bits."""

    loss: str
    probe: bool
    x: bytes


class Rows:
    """Listens to an objective: one `Row` an evaluation."""

    def __init__(self, vector: ParameterVector) -> None:
        self._vector = vector
        self.rows: list[Row] = []

    def evaluated(self, ledger: Ledger, scopes: Sequence[Ledger], loss: float, probe: bool) -> None:
        """See `hybridopt.objective.Listener`."""
        self.rows.append(Row(float(loss).hex(), probe, self._vector.read().tobytes()))


class Heard:
    """Listens to an objective: the loss of each evaluation."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def evaluated(self, ledger: Ledger, scopes: Sequence[Ledger], loss: float, probe: bool) -> None:
        """See `hybridopt.objective.Listener`."""
        self.heard.append(float(loss).hex())


def bowl(x: Tensor) -> Tensor:
    """A convex quadratic with its minimum 0 at 0.5."""
    weights = 1 + torch.arange(len(x), dtype=x.dtype, device=x.device)
    return (weights * (x - 0.5) ** 2).sum()


def valley(x: Tensor) -> Tensor:
    """Rosenbrock's bent valley in two weights, minimum 0 at (1, 1)."""
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def flat(x: Tensor) -> Tensor:
    """3 everywhere."""
    return (x * 0).sum() + 3


def bowl_residuals(x: Tensor) -> Tensor:
    weights = 1 + torch.arange(len(x), dtype=x.dtype, device=x.device)
    return (2 * weights).sqrt() * (x - 0.5)


def valley_residuals(x: Tensor) -> Tensor:
    return math.sqrt(2) * torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def flat_residuals(x: Tensor) -> Tensor:
    return (x * 0).sum() + torch.tensor([1.0, 1.0, 2.0], dtype=x.dtype, device=x.device)


# Half their squared norm is the function.
RESIDUALS: dict[Any, Callable[[Tensor], Tensor]] = {
    bowl: bowl_residuals,
    valley: valley_residuals,
    flat: flat_residuals,
}


def batched_valley(model: Model) -> Tensor:
    return valley(model.x())


class Disc:
    """A constraint that counts its calls: the weights lie within a disc of radius 1 around 0."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Model) -> Tensor:
        """1 - |x|², which must not be negative."""
        self.calls += 1
        return 1 - (model.x() ** 2).sum()

    def constraint(self) -> Constraint:
        """For an objective."""
        return Constraint(self)

    def recomputed(self, run: Run) -> int:
        """Calls that were made again because a graph was lost, which costs nothing."""
        return run.objective.ledger.recomputed

    def inside(self, x: Tensor) -> bool:
        """Whether a point keeps it, within the tolerance of float64 weights."""
        return bool((x**2).sum() <= 1 + 1e-6)


def bits(tensor: Tensor) -> bytes:
    """Of all its numbers."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
