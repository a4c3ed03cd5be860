"""Weights that no engine can step, beside those that one can: torch's own code, for them alone."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridopt.optim._kind import NOTHING, FirstStep, Odd, kind_of
from hybridopt.optim._plan import Number, Part

if TYPE_CHECKING:
    from hybridopt.optim._base import FusedStep


class Aside(Part):
    """The odd weights of a parameter group (sparse gradients, subclasses of tensors, weights with gaps).

    Args:
        optimizer: whose step in Python is used; not kept alive.
        index: of the parameter group.
        odd: the weights, and why no engine can step each.
    """

    engine = "python"

    def __init__(self, optimizer: FusedStep, index: int, odd: Mapping[Tensor, str]) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.index = index
        self.odd = odd
        self.params = list(odd)
        self.everything: list[Tensor] = optimizer.param_groups[index]["params"]

    @property
    def reason(self) -> str:
        """Why the first of them is odd."""
        return next(iter(self.odd.values()))

    def refresh(self) -> bool:
        """See `Part.refresh`; that nothing else got a gradient is what the plans beside it look at."""
        return all(p.grad is not None and self._is_odd(p) for p in self.params)

    def _is_odd(self, p: Tensor) -> bool:
        optimizer = self._whose()
        try:
            kind_of(optimizer, p, optimizer._flags_by_name(optimizer.param_groups[self.index]))
        except Odd:
            return True
        except FirstStep:
            pass
        return False

    def read_options(self, optimizer: FusedStep, group: dict[str, Any]) -> bool:
        """See `Part.read_options`; torch's code reads them itself."""
        return group["params"] is self.everything and not group.get("differentiable")

    def square_sum(self) -> float:
        """See `Part.square_sum`."""
        return square_sum(p.grad for p in self.params if p.grad is not None)

    @torch.no_grad()
    def run(self, extras: Mapping[str, Number] = NOTHING, skip: Tensor | None = None) -> None:
        """See `Part.run`."""
        optimizer = self._whose()
        if "divisor" in extras:
            unscale((p.grad for p in self.params if p.grad is not None), float(extras["divisor"]))
        factor = float(extras.get("factor", 1.0))
        with self._alone(optimizer):
            optimizer._elsewhere(None if factor == 1 else factor)
        count = f"{len(self.odd)} of {len(self.everything)} weights of group {self.index}"
        optimizer._warn(f"{optimizer._asked}{self.reason}; {optimizer._otherwise()} runs for {count}")

    def _whose(self) -> FusedStep:
        optimizer = self.optimizer()
        assert optimizer is not None  # its parts do not outlive it
        return optimizer

    @contextlib.contextmanager
    def _alone(self, optimizer: FusedStep) -> Iterator[None]:
        """For this time the optimizer has these weights only; their noise stays their own."""
        groups, numbers = optimizer.param_groups, optimizer._stream_numbers
        group = groups[self.index]
        own = dict(zip(group["params"], optimizer._streams(self.index), strict=True))
        optimizer.param_groups = [{**group, "params": self.params}]
        optimizer._stream_numbers = own
        try:
            yield
        finally:
            optimizer.param_groups, optimizer._stream_numbers = groups, numbers


def square_sum(gradients: Iterable[Tensor]) -> float:
    """Of dense and sparse gradients, in float64."""
    total = 0.0
    for g in gradients:
        dense = g if g.layout is torch.strided else g.coalesce().values()
        wide = torch.complex128 if g.dtype.is_complex else torch.float64
        total += torch.linalg.vector_norm(dense, dtype=wide).item() ** 2
    return total


def unscale(gradients: Iterable[Tensor], scale: float) -> None:
    """Divide gradients, in place."""
    for g in gradients:
        g.div_(scale)
