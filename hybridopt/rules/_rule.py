"""What a rule is: an elementwise update and the scalars it needs, in a language that several engines understand."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridopt.errors import MethodError


class State(NamedTuple):
    """One elementwise state of a rule."""

    name: str
    """Its key in the optimizer's state, as in torch (`exp_avg`)."""
    flag: str | None = None
    """The flag under which it exists; None = always."""


@dataclass(frozen=True)
class Rule:
    """One optimizer's equation.

    Args:
        update: `update(p, g, *state, *coefficients, *, **flags) -> (p, *state)`, elementwise: assignments and a return
            of a tuple, of `+ - * / **`, comparisons and `& | ^ ~` of them, `if` on flags, and `xp.sqrt, exp, log, abs,
            sign, where, maximum, minimum, fma`. A state whose flag is off is passed as 0 and its return ignored.
        scalars: `scalars(step, *scalar_state, *hyper) -> (*coefficients, *scalar_state)`, on numbers, in float64.
            `step` counts from 1. None: the coefficients are the hyperparameters.
        state: the elementwise states in order.
        scalar_state: names of per-tensor numbers besides `step` that `scalars` advances.
        hyper: names of the hyperparameters, for messages; the optimizer passes their values in this order.
        counts: whether the optimizer keeps a `step` per tensor (torch's SGD does not).
    """

    update: Callable[..., tuple[Any, ...]]
    scalars: Callable[..., tuple[float, ...]] | None
    state: tuple[State, ...]
    hyper: tuple[str, ...]
    scalar_state: tuple[str, ...] = ()
    counts: bool = True

    @functools.cached_property
    def coefficients(self) -> tuple[str, ...]:
        """Names of the coefficients that `update` takes."""
        names = [p.name for p in self._parameters() if p.kind is not p.KEYWORD_ONLY]
        return tuple(names[2 + len(self.state) :])

    @functools.cached_property
    def flags(self) -> tuple[str, ...]:
        """Names of the flags that `update` takes."""
        return tuple(p.name for p in self._parameters() if p.kind is p.KEYWORD_ONLY)

    def coefficients_at(
        self, step: float, scalars: Sequence[float], hyper: Sequence[float]
    ) -> tuple[float, ...]:
        """The coefficients of a step, and the new scalar states behind them, as Python computes them."""
        return tuple(hyper) if self.scalars is None else self.scalars(step, *scalars, *hyper)

    def active(self, flags: dict[str, bool]) -> tuple[str, ...]:
        """Names of the states that exist under these flags."""
        return tuple(s.name for s in self.state if s.flag is None or flags[s.flag])

    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.update).parameters.values())


class _Functions:
    """`xp` where Python runs a rule: on numbers, on tensors (the reference), on lists of tensors (foreach)."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = ", ".join(sorted(n for n in vars(type(self)) if not n.startswith("_")))
        raise MethodError(
            f"xp.{name}: a rule has no such function; it may use xp.{known.replace(', ', ', xp.')}"
        )

    @staticmethod
    def sqrt(x: Any) -> Any:
        return math.sqrt(x) if isinstance(x, int | float) else x.sqrt()

    @staticmethod
    def exp(x: Any) -> Any:
        return math.exp(x) if isinstance(x, int | float) else x.exp()

    @staticmethod
    def log(x: Any) -> Any:
        return math.log(x) if isinstance(x, int | float) else x.log()

    @staticmethod
    def abs(x: Any) -> Any:
        return abs(x)

    @staticmethod
    def sign(x: Any) -> Any:
        return x.sign()

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if isinstance(condition, bool):
            return a if condition else b
        return torch.where(condition, a, b) if isinstance(condition, Tensor) else condition.where(a, b)

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        if isinstance(a, int | float):
            return max(a, b)
        if isinstance(a, Tensor) and not isinstance(b, Tensor):
            return a.clamp(min=b)
        return a.maximum(b)

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        if isinstance(a, int | float):
            return min(a, b)
        if isinstance(a, Tensor) and not isinstance(b, Tensor):
            return a.clamp(max=b)
        return a.minimum(b)

    @staticmethod
    def stored(x: float) -> float:
        """A number as a per-tensor state holds it (torch keeps them in float32 until they are loaded)."""
        return torch.tensor(x, dtype=torch.get_default_dtype()).item()

    @staticmethod
    def default(x: float) -> float:
        """A number as torch makes a tensor of it."""
        return torch.tensor(x, dtype=torch.get_default_dtype()).item()

    @staticmethod
    def fma(a: Any, b: Any, c: Any) -> Any:
        """`a * b + c` with one rounding where the hardware has it, as torch's `add(alpha=)` and `lerp` do."""
        if isinstance(c, Tensor) and isinstance(a, Tensor) and not isinstance(b, Tensor):
            return torch.add(c, a, alpha=b)
        return a * b + c


xp = _Functions()
