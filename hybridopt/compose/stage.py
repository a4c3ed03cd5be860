"""A method with limits and switch rules of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from hybridopt.errors import MethodError, nearest
from hybridopt.ledger import Budget, Share
from hybridopt.optimizer import HandOver, Method, Need, Optimizer
from hybridopt.options import Count, check_options
from hybridopt.text import method as read_method
from hybridopt.text import print_call
from hybridopt.until import AnyOf, Limit, Switch
from hybridopt.vector import ParameterVector


@dataclass(frozen=True)
class Stage(Method):
    """A method that ends when it does, when a limit of its own is reached, or when a switch rule is met.

    Made by `Method.limit` and `Method.until`.

    Args:
        method: what runs.
        budget: its own limits on evaluations, forward-equivalents, seconds, or a target loss; None = none.
        steps: at most this many steps; None = no limit.
        shares: limits that are parts of the enclosing budget, as pairs of quantity and `Share`.
        rule: ends the stage after the step that meets it. What of it is a limit (alone or joined by `|`) becomes one,
            since a limit holds exactly.
        handover: what it takes from its predecessor: `"all"` that it can use (default), or the `"point"` alone.
    """

    name: ClassVar[str] = "stage"

    method: Method
    budget: Budget | None = None
    steps: Count | None = None
    shares: tuple[tuple[str, Share], ...] = ()
    rule: Switch | None = None
    handover: Literal["all", "point"] = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", read_method(self.method))
        if self.rule is not None and not isinstance(self.rule, Switch):
            raise MethodError(f"stage: expected a rule of hybridopt.until, got {self.rule!r}")
        self._absorb_limits()
        self._join()
        check_options(self)
        gather(self, (self.method,))

    def _absorb_limits(self) -> None:
        """Move limits out of the rule; of two on the same quantity the one reached first holds."""
        parts = self.rule.parts if isinstance(self.rule, AnyOf) else (self.rule,)
        steps, shares = self.steps, dict(self.shares)
        limits = {} if self.budget is None else {k: v for k, v in vars(self.budget).items() if v is not None}
        for limit in parts:
            if not isinstance(limit, Limit):
                continue
            quantity, value = limit.quantity, limit.value
            if isinstance(value, Share):
                shares[quantity] = min(value, shares.get(quantity, value))
            elif quantity == "steps":
                steps = value if steps is None else min(value, steps)
            else:
                first = max if quantity == "target" else min
                limits[quantity] = first(value, limits.get(quantity, value))
        rest = tuple(part for part in parts if part is not None and not isinstance(part, Limit))
        rule = (rest[0] if len(rest) == 1 else AnyOf(rest)) if rest else None
        changed = {
            "budget": Budget(**limits) if limits else None,
            "steps": steps,
            "shares": tuple(sorted(shares.items())),
            "rule": rule,
        }
        for name, value in changed.items():
            object.__setattr__(self, name, value)

    def _join(self) -> None:
        """Be one stage with the only one inside where this one adds nothing to it but a rule: it ends by either."""
        from hybridopt.compose.chain import Chain

        if isinstance(self.method, Chain) and len(self.method.stages) == 1:
            (inner,) = self.method.stages
            object.__setattr__(self, "method", inner.method if inner.plain else inner)
        if isinstance(self.method, Stage) and not self.limits():
            inner = self.method
            joined = inner if self.rule is None else inner.until(self.rule)
            for name, value in vars(joined).items():
                object.__setattr__(self, name, value)

    @property
    def plain(self) -> bool:
        """Whether it is the method alone."""
        return self == Stage(self.method)

    @property
    def received(self) -> frozenset[str]:
        """The parts of a hand-over that it takes."""
        return self.takes if self.handover == "all" else frozenset()

    def limits(self) -> dict[str, Any]:
        """What stands in parentheses in the text form."""
        found: dict[str, Any] = {}
        if self.budget is not None:
            found = {k: v for k, v in vars(self.budget).items() if v is not None}
        found |= dict(self.shares)
        if self.steps is not None:
            found["steps"] = self.steps
        if self.handover != "all":
            found["handover"] = self.handover
        return found

    def call(self, limits: Mapping[str, Any] = MappingProxyType({})) -> str:
        """See `Method.call`; with limits around its own, or around a rule, in parentheses."""
        if limits:
            return print_call(f"({self})", limits)
        from hybridopt.compose.chain import Chain

        own = self.limits()
        text = self.method.call(own)
        if self.rule is None:
            return text
        # behind a bare chain the rule would be its last stage's
        bare = not own and isinstance(self.method, Chain)
        return f"({text}) until {self.rule}" if bare else f"{text} until {self.rule}"

    def __repr__(self) -> str:
        return f"Stage({self})"

    def until(self, rule: Switch) -> Method:
        """See `Method.until`; a stage without a rule takes it over, one with a rule ends by either."""
        return replace(self, rule=rule if self.rule is None else self.rule | rule)

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`: a chain of this stage alone."""
        from hybridopt.compose.chain import Chain

        return Chain((self,)).start(vector, seed, warm)


def several(owner: str, given: Any) -> tuple[Method, ...]:
    """The methods inside a composition, each a `Method` or whatever `hybridopt.method` reads."""
    if isinstance(given, str | type | Method) or not isinstance(given, Iterable):
        raise MethodError(f"{owner}: expected several methods, {owner}((a, b, c)), got {given!r}")
    return tuple(map(read_method, given))


def gather(made: Method, parts: Iterable[Method]) -> None:
    """Its parts, and what follows from them: what it needs and uses is what they do. None of these are fields."""
    parts = tuple(parts)
    object.__setattr__(made, "needs", frozenset[Need]().union(*(part.needs for part in parts)))
    uses = frozenset[Need]().union(*(part.uses for part in parts))
    if not all(Need.CONSTRAINTS in part.uses for part in parts):  # kept only if every part keeps them
        uses -= {Need.CONSTRAINTS}
    object.__setattr__(made, "uses", uses)
    object.__setattr__(made, "takes", parts[0].takes)
    object.__setattr__(made, "parts", parts)


def stage(method: Method, budget: Any, given: Mapping[str, Any]) -> Stage:
    """A stage from what `Method.limit` was given (reached by name from lower floors)."""
    known = ("steps", "rule", "handover", "evaluations", "forward_equivalents", "seconds", "target")
    for name in given:
        if name not in known:
            raise MethodError(f"limit: unknown limit {name!r}{nearest(name, known)}")
    read = {
        name: Share.read(value) for name, value in given.items() if name in known[3:] and value is not None
    }
    shares = {name: value for name, value in read.items() if isinstance(value, Share)}
    limits = {name: value for name, value in read.items() if name not in shares}
    if "target" in shares:
        raise MethodError(f"limit: expected a loss as target, got {shares['target']}")
    parsed: Budget | None = None
    if limits:
        parsed = Budget(**limits)  # a stage may have a target alone: its run has a budget
    elif budget is not None:
        parsed = Budget.parse(budget)
    rest = {name: given[name] for name in known[:3] if name in given}
    return Stage(method, parsed, shares=tuple(shares.items()), **rest)
