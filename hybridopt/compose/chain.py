"""Methods one after another, once (`Chain`) or over and over (`Cycle`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from hybridopt.compose._sequence import Sequence
from hybridopt.compose.stage import Stage, gather, several
from hybridopt.errors import MethodError
from hybridopt.optimizer import Method
from hybridopt.options import Count, check_options
from hybridopt.text import method as read_method
from hybridopt.text import print_call


@dataclass(frozen=True, init=False)
class Chain(Sequence):
    """Stages in order; each starts at the best point that the chain has seen so far.

    A stage ends when its method does, when one of its own limits is reached, or when its switch rule is met; the
    chain ends with its last stage. Besides the point a stage is handed what its predecessor knows and it can use
    (`HandOver`): the distance still to go, its shape, good points. The first stage has the chain's seed; later ones a
    seed derived from it and from their place. Chains within a chain that have no limits of their own are flattened:
    `(a >> b) >> c == a >> (b >> c)`.

    Args:
        stages: methods, `Stage`s or texts, at least one.

    Example:
        >>> from hybridopt import method
        >>> chain = method("dual_annealing", evaluations=500) >> method("slsqp", ftol=1e-12)
        >>> str(chain)
        'scipy.dual_annealing(evaluations=500) > scipy.slsqp(ftol=1e-12)'
        >>> method(str(chain)) == chain
        True
    """

    name: ClassVar[str] = "chain"

    stages: tuple[Stage, ...]

    def __init__(self, stages: Iterable[Method]) -> None:
        flat: list[Stage] = []
        for item in several(self.name, stages):
            if isinstance(item, Chain):
                flat.extend(item.stages)
            elif isinstance(item, Stage) and isinstance(item.method, Chain) and item.plain:
                flat.extend(item.method.stages)
            else:
                flat.append(item if isinstance(item, Stage) else Stage(item))
        if not flat:
            raise MethodError("chain: expected at least one stage")
        object.__setattr__(self, "stages", tuple(flat))
        gather(self, self.stages)

    @property
    def label(self) -> str:
        """Its text."""
        return self.call()

    @property
    def period(self) -> int:  # type: ignore[override]
        """Number of stages."""
        return len(self.stages)

    def stage(self, index: int) -> Stage | None:
        """See `Sequence.stage`."""
        return self.stages[index] if index < len(self.stages) else None

    def call(self, limits: Mapping[str, Any] = MappingProxyType({})) -> str:
        """See `Method.call`."""
        text = " > ".join(map(str, self.stages))
        return print_call(f"({text})", limits) if limits else text


@dataclass(frozen=True)
class Cycle(Sequence):
    """The stages of a chain over and over, each from the best point so far: `cycle(adam(steps=50) > cmaes(steps=9))`.

    A stage begins anew each time it comes round; what it knew is handed over like anything else. The cycle ends when
    the budget does, after its rounds, or when none of its stages evaluates anything any more.

    Args:
        method: a chain, or one stage to begin again and again from the best point.
        rounds: how often; None (default) = as long as the budget lasts.

    Example:
        >>> from hybridopt import method
        >>> str(method("cycle(adam(lr=0.1, steps=50) > cmaes(evaluations=200), rounds=10)"))
        'cycle(adam(lr=0.1, steps=50) > cmaes(evaluations=200), rounds=10)'
    """

    name: ClassVar[str] = "cycle"

    method: Method
    rounds: Count | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", read_method(self.method))
        check_options(self)
        object.__setattr__(self, "_stages", Chain((self.method,)).stages)
        gather(self, self._stages)

    _stages: ClassVar[tuple[Stage, ...]]

    @property
    def endless(self) -> bool:  # type: ignore[override]
        """Whether no number of rounds was given."""
        return self.rounds is None

    @property
    def period(self) -> int:  # type: ignore[override]
        """Stages in a round."""
        return len(self._stages)

    def stage(self, index: int) -> Stage | None:
        """See `Sequence.stage`."""
        if self.rounds is not None and index >= self.rounds * self.period:
            return None
        return self._stages[index % self.period]

    def call(self, limits: Mapping[str, Any] = MappingProxyType({})) -> str:
        """See `Method.call`."""
        rounds = {} if self.rounds is None else {"rounds": self.rounds}
        return print_call(self.name, {**rounds, **limits}, self.method)


def chain(stages: Iterable[Method]) -> Chain:
    """A chain (reached by name from lower floors)."""
    return Chain(stages)
