"""Weights that no engine can step, beside those that one can: torch's own code, for them alone."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridopt.optim._kind import NOTHING
from hybridopt.optim._plan import Number, Part

if TYPE_CHECKING:
    from hybridopt.optim._base import FusedStep


class Aside(Part):
    """The odd weights of a parameter group (sparse gradients, subclasses of tensors, weights with gaps).

    Args:
        optimizer: whose step in Python is used; not kept alive.
        index: of the parameter group.
        odd: the weights (one that is listed twice is stepped twice), and why no engine can step each.
    """

    def __init__(self, optimizer: FusedStep, index: int, odd: Sequence[tuple[Tensor, str]]) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.index = index
        self.params = [p for p, _ in odd]
        self.everything: list[Tensor] = optimizer.param_groups[index]["params"]
        self.seen = [_looks(p) for p in self.params]
        self.reason = odd[0][1]
        self.which = f"{len(odd)} of {len(self.everything)} weights of group {index}"

    def refresh(self) -> bool:
        """See `Part.refresh`; that nothing else got a gradient is what the plans beside it look at."""
        return all(_looks(p) == seen for p, seen in zip(self.params, self.seen, strict=True))

    def read_options(self, optimizer: FusedStep, group: dict[str, Any]) -> bool:
        """See `Part.read_options`; torch's code reads them itself."""
        return group["params"] is self.everything and not group.get("differentiable")

    def square_sum(self) -> float:
        """See `Part.square_sum`."""
        return square_sum(p.grad for p in self.params if p.grad is not None)

    @torch.no_grad()
    def run(self, extras: Mapping[str, Number] = NOTHING, skip: Tensor | None = None) -> None:
        """See `Part.run`."""
        optimizer = self.optimizer()
        assert optimizer is not None  # its parts do not outlive it
        divisor, factor = float(extras.get("divisor", 1.0)), float(extras.get("factor", 1.0))
        given = [p.grad for p in self.params]
        try:
            if divisor != 1:  # not in place: a gradient may be expanded, or another weight's too
                scaled = {p: g / divisor for p, g in zip(self.params, given, strict=True) if g is not None}
                for p, g in scaled.items():
                    p.grad = g
            with self._only(optimizer):
                optimizer._elsewhere(None if factor == 1 else factor)
        except BaseException:
            for p, before in zip(self.params, given, strict=True):
                p.grad = before
            raise

    @contextlib.contextmanager
    def _only(self, optimizer: FusedStep) -> Iterator[None]:
        """For this time the optimizer has these weights only; their noise stays their own."""
        groups, numbers = optimizer.param_groups, optimizer._stream_numbers
        group = groups[self.index]
        if optimizer._extras.stochastic_rounding:
            positions = optimizer._streams(self.index)
            optimizer._stream_numbers = dict(zip(group["params"], positions, strict=True))
        optimizer.param_groups = [{**group, "params": self.params}]
        try:
            yield
        finally:
            optimizer.param_groups, optimizer._stream_numbers = groups, numbers


def _looks(p: Tensor) -> tuple[Any, ...]:
    """What decides whether an engine can step a weight, as far as it changes from step to step."""
    g = p.grad
    if g is None:
        return ()
    strides = (p.stride(), g.stride()) if g.layout is p.layout is torch.strided else ()
    return type(g), g.layout, g.dtype, g.device, g.is_neg(), g.is_conj(), type(p), p.dtype, p.shape, *strides


def square_sum(gradients: Iterable[Tensor]) -> float:
    """Of dense and sparse gradients, in float64."""
    total = 0.0
    for g in gradients:
        dense = g if g.layout is torch.strided else g.coalesce().values()
        wide = torch.complex128 if g.dtype.is_complex else torch.float64
        total += torch.linalg.vector_norm(dense, dtype=wide).item() ** 2
    return total
