"""What a run has spent, what it may spend, and the best it has seen."""

from __future__ import annotations

import enum
import math
import numbers
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from hybridopt.errors import BudgetError, Stop


class Reason(enum.Enum):
    """Why a run, or a stage of it, ended. The value is the word in files; `sentence` is for people."""

    TARGET = "target"
    CONVERGED = "converged"
    EVALUATIONS = "evaluations"
    FORWARD_EQUIVALENTS = "forward_equivalents"
    SECONDS = "seconds"
    STEPS = "steps"
    SWITCHED = "switched"
    STALLED = "stalled"
    NON_FINITE = "non_finite"
    INTERRUPTED = "interrupted"
    FAILED = "failed"

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        return _SENTENCES[self]


_SENTENCES = {
    Reason.TARGET: "the target loss was reached",
    Reason.CONVERGED: "the method says it has converged",
    Reason.EVALUATIONS: "the budget of evaluations is spent",
    Reason.FORWARD_EQUIVALENTS: "what comes next (an evaluation with its gradient, a check of batches) would pass the "
    "budget of forward-equivalents",
    Reason.SECONDS: "the time is up",
    Reason.STEPS: "the allowed number of steps is done",
    Reason.SWITCHED: "a switch rule was met",
    Reason.STALLED: "the method gave up without converging",
    Reason.NON_FINITE: "no finite loss came any more (or none was ever seen)",
    Reason.INTERRUPTED: "interrupted by the user",
    Reason.FAILED: "an exception ended the run",
}

_UNITS = {"": "evaluations", "evals": "evaluations", "evaluations": "evaluations", "fe": "forward_equivalents",
          "forward_equivalents": "forward_equivalents", "s": "seconds", "seconds": "seconds"}  # fmt: skip


class Share(float):
    """A part of the enclosing budget, in percent: `Share(20)`, in text `20%`.

    It is of the nearest enclosing budget that limits the same quantity; where none does, of every limit that the
    nearest enclosing budget has (so `evaluations=20%` in a run of 1000 forward-equivalents is 200 of those).

    Example:
        >>> from hybridopt import Share
        >>> Share.read("20%"), Share(20).of(137)
        (20%, 27.4)
    """

    def __new__(cls, percent: float) -> Share:
        """A share of so many percent, above 0 and at most 100."""
        if not 0 < percent <= 100:
            raise BudgetError(f"share: expected a percentage above 0 and at most 100, got {percent!r}")
        return super().__new__(cls, percent)

    @classmethod
    def read(cls, value: Any) -> Any:
        """Text such as `"20%"` as a share; anything else as it is."""
        if isinstance(value, str):
            match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%\s*", value)
            if match is None:
                raise BudgetError(f"share: expected a percentage such as '20%', got {value!r}")
            return cls(float(match[1]))
        return value

    def of(self, limit: float) -> float:
        """This part of a limit."""
        return float(self) * limit / 100

    def __repr__(self) -> str:
        return f"{float(self):g}%" if float(f"{float(self):g}") == float(self) else f"{float(self)!r}%"

    __str__ = __repr__


@dataclass(frozen=True)
class Budget:
    """Limits of a run or stage; the first one reached ends it. None means no limit of that kind.

    Args:
        evaluations: points whose loss is computed; a population of P counts P, a difference probe counts 1.
        forward_equivalents: forwards + backward_cost × backwards (the currency in which methods compare).
        seconds: wall-clock time since the start, in seconds, checked before every evaluation.
        target: stop as soon as a loss is at or below this.

    Raises:
        BudgetError: a limit is not positive, or not a number. (`Budget.parse` also refuses what limits nothing.)

    Example:
        >>> from hybridopt import Budget
        >>> Budget.parse("1000fe")
        Budget(forward_equivalents=1000.0)
        >>> Budget.parse(137)
        Budget(evaluations=137)
    """

    evaluations: int | None = None
    forward_equivalents: float | None = None
    seconds: float | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        for name in ("evaluations", "forward_equivalents", "seconds"):
            value = getattr(self, name)
            if value is None:
                continue
            if not _is_number(value) or not value > 0:
                raise BudgetError(f"budget: expected {name} > 0, got {value!r}")
            if not math.isfinite(value):
                raise BudgetError(
                    f"budget: expected a finite limit on {name}, got {value!r}; None means no limit"
                )
            if name == "evaluations" and int(value) != value:
                raise BudgetError(f"budget: expected a whole number of evaluations, got {value!r}")
            object.__setattr__(self, name, int(value) if name == "evaluations" else float(value))
        if self.target is not None:
            if not _is_number(self.target) or not math.isfinite(self.target):
                raise BudgetError(f"budget: expected a finite number as target, got {self.target!r}")
            object.__setattr__(self, "target", float(self.target))

    @classmethod
    def parse(cls, value: Budget | int | float | str | Mapping[str, Any] | None) -> Budget:
        """A budget from a number (evaluations), text (`"137"`, `"1000fe"`, `"30s"`), a mapping, or a `Budget`."""
        if isinstance(value, Budget):
            budget = value
        elif isinstance(value, Mapping):
            unknown = set(value) - {f.name for f in fields(cls)}
            if unknown:
                raise BudgetError(
                    f"budget: unknown limit {sorted(unknown)}; known are {[f.name for f in fields(cls)]}"
                )
            budget = cls(**value)
        elif _is_number(value):
            budget = cls(evaluations=value)  # type: ignore[arg-type]
        elif isinstance(value, str):
            budget = cls._from_text(value)
        else:
            raise BudgetError(
                "budget: expected a number of evaluations, text such as '137', '1000fe' or '30s', a mapping or a "
                f"Budget, got {value!r}; a run needs a limit"
            )
        if budget.evaluations is None and budget.forward_equivalents is None and budget.seconds is None:
            raise BudgetError(
                "budget: expected a limit on evaluations, forward_equivalents or seconds (a target alone may never "
                "be reached)"
            )
        return budget

    @classmethod
    def _from_text(cls, text: str) -> Budget:
        limits: dict[str, Any] = {}
        for part in re.split(r"[,\s]+", text.strip()):
            match = re.fullmatch(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)([a-z_]*)", part)
            unit = _UNITS.get(match.group(2)) if match else None
            if match is None or unit is None or unit in limits:
                raise BudgetError(
                    "budget: expected '137' (evaluations), '1000fe' (forward-equivalents) or '30s' (seconds), "
                    f"got {text!r}"
                )
            number = float(match.group(1))
            limits[unit] = int(number) if number.is_integer() else number
        return cls(**limits)

    @property
    def limits(self) -> dict[str, float]:
        """The limits given on what can be spent, by quantity; the target is none of them."""
        spendable = ("evaluations", "forward_equivalents", "seconds")
        return {name: getattr(self, name) for name in spendable if getattr(self, name) is not None}

    def __repr__(self) -> str:
        given = [
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) is not None
        ]
        return f"Budget({', '.join(given)})"


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class Shadow(Protocol):
    """Where the best point of a ledger is copied from (the objective)."""

    def copy_point(self, into: Any) -> Any:
        """The point just evaluated; `into` is an earlier copy that may be overwritten."""


class Ledger:
    """Counters, limits and the best point of one run, stage or member.

    Every evaluation is booked in the ledgers of all enclosing scopes, so a stage's limits hold exactly and
    independently of its run's. Solvers' own counters are never used.

    Attributes:
        evaluations: losses computed for the method (a probe counts; a self-check of an evaluator does not).
        forward, backward: model passes begun and finished.
        recomputed: forwards repeated because a stop or a resume lost their graph; not part of any budget.
        nonfinite: evaluations whose loss was nan or inf.
        best_loss: the lowest finite loss, inf before one was seen. With constraints: of the points that keep them.
        best_violation: by how much the best point breaks the constraints (0 = not at all), inf before one was seen.
        best_point: that point (whatever the objective's `copy_point` returns), None before one was seen.
        last_loss: the last loss that was no probe, nan before one.
        shares: limits given as parts of an enclosing budget, by quantity; empty once they are numbers.
        rivals: whether others go on if its method cannot begin: a start that is not finite is no error of the run then.
    """

    __slots__ = (
        "_clock", "_started", "backward", "backward_cost", "best_evaluation", "best_loss", "best_point",
        "best_violation", "budget", "evaluations", "forward", "label", "last_loss", "max_equivalents",
        "max_evaluations", "nonfinite", "nonfinite_in_a_row", "recomputed", "resolved", "rivals", "seconds_before",
        "shares", "target", "time_limit", "worst_loss",
    )  # fmt: skip

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        shares: Mapping[str, Share] | None = None,
        backward_cost: float = 2.0,
        label: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.label = label
        self.backward_cost = backward_cost
        self._clock = clock
        self._started: float | None = None
        self.seconds_before = 0.0
        self.evaluations = self.forward = self.backward = self.recomputed = 0
        self.nonfinite = self.nonfinite_in_a_row = 0
        self.best_loss = self.best_violation = math.inf
        self.worst_loss = -math.inf
        self.best_point: Any = None
        self.best_evaluation = 0
        self.last_loss = math.nan
        self.shares = dict(shares or {})
        self.resolved: dict[str, float] = {}
        self.rivals = False
        self.budget = Budget()
        self.limit(budget or Budget())

    def resolve(self, outer: Sequence[Ledger]) -> None:
        """Turn `shares` into numbers, once, before the first evaluation.

        Args:
            outer: the enclosing ledgers, outermost first.

        Raises:
            BudgetError: no enclosing budget has a limit to take a share of.
        """
        for quantity, share in self.shares.items():
            same = [ledger for ledger in outer if getattr(ledger.budget, quantity) is not None]
            others = [ledger for ledger in outer if ledger.budget.limits]
            if not (same or others):
                raise BudgetError(
                    f"{self.label}: {quantity}={share} expects an enclosing budget with a limit; there is none"
                )
            found = {quantity: getattr(same[-1].budget, quantity)} if same else others[-1].budget.limits
            for name, limit in found.items():
                self._tighten(name, share.of(limit))
        self.shares = {}

    def _tighten(self, quantity: str, value: float) -> None:
        """Take over a limit that was a share; a lower one stays."""
        if quantity == "evaluations":
            value = max(1, math.floor(value * (1 + 1e-12)))
        given = getattr(self.budget, quantity)
        self.resolved[quantity] = value
        lower: dict[str, Any] = {quantity: value if given is None else min(given, value)}
        self.limit(replace(self.budget, **lower))

    def limit(self, budget: Budget) -> None:
        """Replace the limits, e.g. to go on after a budget was spent; what was spent stays."""
        self.budget = budget
        self.max_evaluations = math.inf if budget.evaluations is None else budget.evaluations
        self.max_equivalents = math.inf if budget.forward_equivalents is None else budget.forward_equivalents
        self.time_limit = budget.seconds
        self.target = -math.inf if budget.target is None else budget.target

    @property
    def forward_equivalents(self) -> float:
        """Forwards + backward_cost × backwards."""
        return self.forward + self.backward_cost * self.backward

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the first evaluation was asked for, summed over resumed runs."""
        return self.seconds_before + (0.0 if self._started is None else self._clock() - self._started)

    def stop_clock(self) -> None:
        """Stop counting seconds until the next check."""
        self.seconds_before = self.seconds
        self._started = None

    def check(self, evaluations: int, forward: int, backward: int) -> None:
        """Raise `Stop` if this much more would pass a limit."""
        if self._started is None:
            self._started = self._clock()
        if self.target_reached:
            raise Stop(self, Reason.TARGET)
        if self.evaluations + evaluations > self.max_evaluations:
            raise Stop(self, Reason.EVALUATIONS)
        if self.forward + forward + self.backward_cost * (self.backward + backward) > self.max_equivalents:
            raise Stop(self, Reason.FORWARD_EQUIVALENTS)
        if self.time_limit is not None and self.seconds >= self.time_limit:
            raise Stop(self, Reason.SECONDS)

    def book(self, loss: float, probe: bool, source: Shadow, violation: float = 0.0) -> None:
        """Count one evaluation with its loss; keep the point if it is the best (`forward`/`backward` are separate).

        The best breaks the constraints least (`violation`, 0 = not at all), and among such has the lowest loss.
        """
        self.evaluations += 1
        if not probe:
            self.last_loss = loss
        if not math.isfinite(loss):
            self.nonfinite += 1
            self.nonfinite_in_a_row += 1
            return
        self.nonfinite_in_a_row = 0
        self.worst_loss = max(self.worst_loss, loss)
        if (violation, loss) < (self.best_violation, self.best_loss):
            self.best_violation, self.best_loss = violation, loss
            self.best_evaluation = self.evaluations
            self.best_point = source.copy_point(self.best_point)

    @property
    def target_reached(self) -> bool:
        """Whether the best loss is at or below the target, at a point that keeps the constraints."""
        return self.best_loss <= self.target and self.best_violation == 0

    _PLAIN = ("evaluations", "forward", "backward", "recomputed", "nonfinite", "nonfinite_in_a_row", "best_loss",
              "best_violation", "worst_loss", "best_evaluation", "last_loss", "backward_cost")  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Counters and seconds as plain numbers; the best point is saved by the objective, which knows its form."""
        plain = {name: getattr(self, name) for name in self._PLAIN}
        return plain | {"seconds": self.seconds, "resolved": None if self.shares else dict(self.resolved)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over counters and seconds; limits stay as they are, so a budget can be raised on resume."""
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.seconds_before = state["seconds"]
        self._started = None
        if state["resolved"] is not None:
            self.shares = {}
            for quantity, value in state["resolved"].items():
                self._tighten(quantity, value)

    def spent(self) -> dict[str, Any]:
        """The counters that users see."""
        return {
            "evaluations": self.evaluations,
            "forward": self.forward,
            "backward": self.backward,
            "forward_equivalents": self.forward_equivalents,
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        return (
            f"Ledger({self.label + ': ' if self.label else ''}{self.evaluations} evaluations, "
            f"{self.forward_equivalents:g} forward-equivalents, best {self.best_loss:g})"
        )
