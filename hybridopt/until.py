"""When a stage ends: switch rules, which combine with `|` and `&`."""

from __future__ import annotations

import abc
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from hybridopt.errors import MethodError
from hybridopt.ledger import Budget, Ledger, Share
from hybridopt.optimizer import FloatArray
from hybridopt.options import Count, NonNegative, Positive, check_options, check_value
from hybridopt.text import print_value

LIMITS = ("evaluations", "forward_equivalents", "seconds", "steps", "target")
"""The rules that are limits of a stage: alone or joined by `|` they hold exactly, checked before each evaluation."""


class View(Protocol):
    """What a rule sees of its stage after each step."""

    @property
    def ledger(self) -> Ledger:
        """What the stage has spent, and its own best loss."""
        ...

    @property
    def steps(self) -> int:
        """Steps done in this stage."""
        ...

    @property
    def loss(self) -> float:
        """Loss of the last step."""
        ...

    @property
    def noisy(self) -> bool:
        """Whether the loss draws random numbers, so that its lowest value is a lucky draw."""
        ...

    @property
    def gradient_norm(self) -> float:
        """Euclidean norm of the last gradient; inf before the first.

        In solver coordinates; for in-place methods, of the weights.
        """
        ...

    @property
    def gradient_found(self) -> bool | None:
        """Whether the first gradient by autograd was there, and not exactly 0; None while none was asked for."""
        ...

    @property
    def change_found(self) -> bool | None:
        """Whether the loss changed at most points of the first difference quotient; None while there was none."""
        ...

    def point(self) -> FloatArray:
        """The method's own point, shape (n,), in solver coordinates."""
        ...


class Switch(abc.ABC):
    """A rule that says after each step of a stage whether the next stage shall begin.

    Frozen values with a text form (`plateau(50)`, `target(0.1) & evaluations(100)`). What a rule remembers from step
    to step is in a dict of plain data that the stage keeps and saves.

    Example:
        >>> import hybridopt
        >>> from hybridopt.until import evaluations, plateau, target
        >>> str(hybridopt.method("adam", lr=0.01).until(plateau(50) | target(0.1) & evaluations(100)))
        'adam(lr=0.01) until plateau(50) | target(0.1) & evaluations(100)'
        >>> hybridopt.method("adam(lr=0.01) until plateau(50) | evaluations(900)")
        Stage(adam(lr=0.01, evaluations=900) until plateau(50))
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def met(self, view: View, memory: dict[str, Any]) -> bool:
        """Whether the stage shall end; called once after each step. `memory` is empty when the stage begins."""

    @property
    def needs_gradient(self) -> bool:
        """Whether it reads `View.gradient_norm`, which costs a norm a step."""
        return False

    def __or__(self, other: Switch) -> Switch:
        return _joined(AnyOf, (self, other))

    def __and__(self, other: Switch) -> Switch:
        return _joined(AllOf, (self, other))

    def __str__(self) -> str:
        values = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]  # type: ignore[arg-type]
        first = print_value(values[0][1]) if values else ""
        rest = [f"{name}={print_value(value)}" for name, value, default in values[1:] if value != default]
        return f"{self.name}({', '.join([first, *rest])})" if values else self.name


@dataclass(frozen=True)
class Limit(Switch):
    """One of `LIMITS`. Joined by `&` it means "not before": checked after each step, passed by what a step costs."""

    quantity: str
    value: Any

    def __post_init__(self) -> None:
        if self.quantity not in LIMITS:
            raise MethodError(f"until: expected a limit on {', '.join(LIMITS)}, got {self.quantity!r}")
        if isinstance(self.value, Share):
            if self.quantity in ("steps", "target"):
                raise MethodError(f"until: expected a number of {self.quantity}, got a share, {self.value}")
        elif self.quantity == "steps":
            check_value("until", "steps", self.value, Count)
        else:
            Budget(**{self.quantity: self.value})

    def met(self, view: View, memory: dict[str, Any]) -> bool:
        """See `Switch.met`."""
        if self.quantity == "target":
            return view.ledger.best_violation == 0 and view.ledger.best_loss <= float(self.value)
        spent = view.steps if self.quantity == "steps" else getattr(view.ledger, self.quantity)
        return bool(spent >= self.value)

    def __str__(self) -> str:
        return f"{self.quantity}({print_value(self.value)})"


@dataclass(frozen=True)
class Plateau(Switch):
    """The loss has improved by less than `tolerance`, relative to its own size, over the last `window` evaluations.

    What counts is the best loss of the stage. For a loss that draws random numbers it is the mean loss of the steps in
    the last window against that of the window before: less than `tolerance`, or not to be told from chance
    (two standard errors).

    Args:
        window: evaluations, ≥ 1. (Steps of different methods are not comparable; a step of Adam is one evaluation,
            a step of CMA-ES a population.)
        tolerance: relative improvement, ≥ 0; default 1e-3.
    """

    name = "plateau"

    window: Count
    tolerance: NonNegative = 1e-3

    def __post_init__(self) -> None:
        check_options(self)

    def met(self, view: View, memory: dict[str, Any]) -> bool:
        """See `Switch.met`."""
        spent: list[float] = memory.setdefault("spent", [])
        losses: list[float] = memory.setdefault("losses", [])
        now = view.ledger.evaluations
        spent.append(now)
        losses.append(view.loss if view.noisy else view.ledger.best_loss)
        broken: list[float] = memory.setdefault("broken", [])
        broken.append(view.ledger.best_violation)
        kept = self.window * (2 if view.noisy else 1)
        while len(spent) > 1 and spent[1] <= now - kept:
            del spent[0], losses[0], broken[0]
        if spent[0] > now - kept:
            return False
        if view.noisy:
            return self._chance([s > now - self.window for s in spent], losses)
        if broken[-1] < broken[0]:  # the loss may rise while the constraints come to be kept
            return False
        then, best = losses[0], losses[-1]
        return math.isfinite(then) and then - best <= self.tolerance * max(abs(then), abs(best))

    def _chance(self, late: list[bool], losses: list[float]) -> bool:
        """Whether the means before and within the last window differ by less than the tolerance or chance."""
        halves = [
            [
                loss
                for loss, is_late in zip(losses, late, strict=True)
                if is_late is half and math.isfinite(loss)
            ]
            for half in (False, True)
        ]
        if not all(halves):
            return False
        before, after = map(statistics.fmean, halves)
        error = math.sqrt(sum(statistics.pvariance(half) / len(half) for half in halves))
        return before - after <= max(self.tolerance * max(abs(before), abs(after)), 2 * error)


@dataclass(frozen=True)
class GradientNorm(Switch):
    """The Euclidean norm of the last gradient is at most `tolerance`; never met by a method without gradients."""

    name = "gradient_norm"

    tolerance: Positive

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def needs_gradient(self) -> bool:
        """See `Switch.needs_gradient`."""
        return True

    def met(self, view: View, memory: dict[str, Any]) -> bool:
        """See `Switch.met`."""
        return view.gradient_norm <= self.tolerance


@dataclass(frozen=True)
class StepSize(Switch):
    """The method's own point last moved by at most `tolerance` (Euclidean, solver coordinates).

    A step that leaves the point where it is (a rejected trial, a generation without a better point) says nothing.
    Costs a copy of the point a step.
    """

    name = "step_size"

    tolerance: Positive

    def __post_init__(self) -> None:
        check_options(self)

    def met(self, view: View, memory: dict[str, Any]) -> bool:
        """See `Switch.met`."""
        x = view.point()
        before = memory.get("x")
        if before is None:
            memory["x"] = torch.tensor(x)
            return False
        moved = float(np.linalg.norm(x - before.numpy()))
        if moved > 0:
            memory["x"] = torch.tensor(x)
        return 0 < moved <= self.tolerance


@dataclass(frozen=True)
class Converged(Switch):
    """The method itself has ended, which always ends its stage: `converged` alone (or joined by `&`) forbids others."""

    name = "converged"

    def met(self, view: View, memory: dict[str, Any]) -> bool:
        """See `Switch.met`."""
        return False


@dataclass(frozen=True)
class Noise(Switch):
    """The loss draws random numbers: a stage that cannot bear it ends with its first step, for one that can.

    What is seen is that it draws from PyTorch's, NumPy's or Python's global generators (or that the run has
    `keep="last"`); a generator of its own goes unseen. `slsqp until noise > cmaes` is SLSQP, but CMA-ES with noise.
    """

    name = "noise"

    def met(self, view: View, memory: dict[str, Any]) -> bool:
        """See `Switch.met`."""
        return view.noisy


@dataclass(frozen=True)
class NoGradient(Switch):
    """Autograd's first gradient is missing or exactly 0: a stage that would go on with differences ends.

    For many weights, where these cost an evaluation each: `lbfgsb until no_gradient > snes`.
    """

    name = "no_gradient"

    def met(self, view: View, memory: dict[str, Any]) -> bool:
        """See `Switch.met`."""
        return view.gradient_found is False


@dataclass(frozen=True)
class Flat(Switch):
    """At half or more of its points the first difference quotient finds no change: the loss counts, or rounds.

    A stage that follows slopes ends, for one that samples: `restart(slsqp) until flat > cmaes`.
    """

    name = "flat"

    def met(self, view: View, memory: dict[str, Any]) -> bool:
        """See `Switch.met`."""
        return view.change_found is False


@dataclass(frozen=True)
class Predicate(Switch):
    """A function of the user's: called with the stage's `View` after each step, ends the stage when it is true.

    Args:
        function: `f(view) -> bool`, or its place as text: `predicate("package.module:function")`. It must not change
            anything, and an exact resume needs it to depend on the view alone.
    """

    name = "predicate"

    function: Any

    def __post_init__(self) -> None:
        if isinstance(self.function, str):
            object.__setattr__(self, "function", _imported(self.function))
        if not callable(self.function):
            raise MethodError(f"predicate: expected a function of the stage, got {self.function!r}")

    def met(self, view: View, memory: dict[str, Any]) -> bool:
        """See `Switch.met`."""
        return bool(self.function(view))

    def __str__(self) -> str:
        place = f"{getattr(self.function, '__module__', '')}:{getattr(self.function, '__qualname__', '')}"
        return f"predicate({place!r})"


@dataclass(frozen=True)
class _Joined(Switch):
    parts: tuple[Switch, ...]

    mark: ClassVar[str]

    @property
    def needs_gradient(self) -> bool:
        """See `Switch.needs_gradient`."""
        return any(part.needs_gradient for part in self.parts)

    def _all_met(self, view: View, memory: dict[str, Any]) -> list[bool]:
        """Every part's word: each is asked at every step, since it may remember."""
        return [part.met(view, memory.setdefault(str(i), {})) for i, part in enumerate(self.parts)]

    def __str__(self) -> str:
        return f" {self.mark} ".join(f"({p})" if isinstance(p, AnyOf) else str(p) for p in self.parts)


@dataclass(frozen=True)
class AnyOf(_Joined):
    """`a | b`: one of them."""

    mark = "|"

    def met(self, view: View, memory: dict[str, Any]) -> bool:
        """See `Switch.met`."""
        return any(self._all_met(view, memory))


@dataclass(frozen=True)
class AllOf(_Joined):
    """`a & b`: all of them after the same step."""

    mark = "&"

    def __post_init__(self) -> None:
        for part in self.parts:
            if isinstance(part, Limit) and isinstance(part.value, Share):
                raise MethodError(
                    f"until: a share ({part}) is a limit of its own: it cannot be joined by '&'"
                )

    def met(self, view: View, memory: dict[str, Any]) -> bool:
        """See `Switch.met`."""
        return all(self._all_met(view, memory))


def _joined(how: type[AnyOf] | type[AllOf], parts: Iterable[Switch]) -> Switch:
    flat: list[Switch] = []
    for part in parts:
        if not isinstance(part, Switch):
            raise MethodError(f"until: expected a rule beside {how.mark!r}, got {part!r}")
        flat.extend(part.parts if isinstance(part, how) else (part,))
    return how(tuple(flat))


def _imported(place: str) -> Any:
    import pkgutil

    try:
        return pkgutil.resolve_name(place)
    except (ImportError, AttributeError, ValueError) as error:
        raise MethodError(f"predicate: expected the place of a function, got {place!r}: {error}") from error


# -- as the user types them --------------------------------------------------------------------------------------


def evaluations(value: int | str | Share) -> Switch:
    """At most so many evaluations; `"20%"` of the enclosing budget."""
    return Limit("evaluations", Share.read(value))


def forward_equivalents(value: float | str | Share) -> Switch:
    """At most so many forward-equivalents; `"20%"` of the enclosing budget."""
    return Limit("forward_equivalents", Share.read(value))


def seconds(value: float | str | Share) -> Switch:
    """At most so many seconds; `"20%"` of the enclosing budget."""
    return Limit("seconds", Share.read(value))


def steps(value: int) -> Switch:
    """At most so many steps."""
    return Limit("steps", value)


def target(value: float) -> Switch:
    """The stage's best loss is at or below this."""
    return Limit("target", value)


plateau = Plateau
gradient_norm = GradientNorm
step_size = StepSize
predicate = Predicate
converged = Converged()
noise = Noise()
no_gradient = NoGradient()
flat = Flat()

RULES: dict[str, Any] = {
    **{name: globals()[name] for name in LIMITS},
    "plateau": Plateau,
    "gradient_norm": GradientNorm,
    "step_size": StepSize,
    "predicate": Predicate,
    "converged": Converged,
    "noise": Noise,
    "no_gradient": NoGradient,
    "flat": Flat,
}
"""The rules of the text form by name."""
