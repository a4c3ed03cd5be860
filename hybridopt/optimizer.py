"""The protocol that every optimizer and every composition of optimizers obeys: ask, be told, one step at a time."""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from hybridopt.errors import BoundsError, Stop
from hybridopt.ledger import Budget, Ledger, Reason
from hybridopt.vector import ParameterVector

FloatArray: TypeAlias = npt.NDArray[np.float64]


class Need(enum.Enum):
    """What a method must have (`needs`) or takes when it is there (`uses`)."""

    GRADIENT = "gradient"
    BOUNDS = "bounds"
    POPULATION = "population"


class Kind(enum.Enum):
    """What an optimizer can ask."""

    VALUE = "value"
    """The loss at `x`."""
    GRADIENT = "gradient"
    """The gradient at the point whose value was asked last (its graph was kept): a backward, no forward."""
    VALUE_AND_GRADIENT = "value+gradient"
    """Both at `x`."""
    POPULATION = "population"
    """The losses of all rows of `x`, shape (popsize, n)."""
    RESIDUALS = "residuals"
    """Reserved for least-squares methods: the vector whose half squared norm is the loss."""


class Request(NamedTuple):
    """One question of an optimizer.

    `ask` may be called again before `tell`; it then returns an equal request.
    """

    kind: Kind
    x: FloatArray | None = None
    """Solver coordinates, shape (n,) or (popsize, n), float64. None: "where the weights stand" (in-place methods);
    gradients then stay in the weights' `.grad`."""
    probe: bool = False
    """A question on the way to another one (a difference stencil): counted, but never the method's own point."""
    commit: bool = False
    """An accepted iterate of a gradient method: buffers such as BatchNorm statistics may move."""
    keep_graph: bool = False
    """A `GRADIENT` question about this value may follow."""
    scopes: tuple[Ledger, ...] = ()
    """Ledgers of the enclosing stages, outermost first; the evaluation is booked in each and limited by each."""

    def within(self, scope: Ledger) -> Request:
        """The same question, also booked in (and limited by) an enclosing stage's ledger."""
        return self._replace(scopes=(scope, *self.scopes))


class Answer(NamedTuple):
    """The reply to a `Request`. A loss that is nan or ±inf is told as +inf, its gradient as zeros."""

    loss: float = np.inf
    losses: FloatArray | None = None
    """Shape (popsize,), for `POPULATION`."""
    gradient: FloatArray | None = None
    """Shape (n,), in solver coordinates; None for in-place requests, and where the loss has no gradient at all."""
    finite: bool = True
    """Whether loss and gradient were finite."""
    surrogate: bool = False
    """The gradient is that of a surrogate the user chose: it need not agree with the loss."""
    stop: Stop | None = None
    """A limit of one of the request's own scopes was reached: nothing was evaluated (or not all of a population)."""


class Step(NamedTuple):
    """A bounded piece of work is done: one point, one generation, one difference stencil."""

    loss: float
    """The loss at the step's point, or the lowest of its generation; for a last step without one, the final loss."""
    method: str
    """Name of the method that did it."""
    reason: Reason | None = None
    """Why the optimizer has ended; None while it goes on."""
    message: str = ""
    """The method's own words on its end."""


class Incumbent(NamedTuple):
    """The point a method itself would return now (not a probe), and its loss."""

    loss: float
    x: FloatArray | None
    """Solver coordinates, shape (n,); None = where the weights stand."""


class HandOver(NamedTuple):
    """What one method can tell its successor; plain data in solver coordinates, each part optional."""

    x: FloatArray | None = None
    loss: float = np.inf
    sigma: float | None = None


@dataclasses.dataclass(frozen=True)
class StageReport:
    """What one stage did: spent counters, its own best loss, and why it ended (None: it was still at work)."""

    method: str
    reason: Reason | None
    message: str
    best_loss: float
    spent: Mapping[str, Any]


@runtime_checkable
class Optimizer(Protocol):
    """A method at work on one model: asks, is told, and never computes a loss itself."""

    name: str
    needs: frozenset[Need]

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of the work so far: a refused gradient, a restart."""
        ...

    @property
    def reports(self) -> tuple[StageReport, ...]:
        """One report for each stage begun; empty for a single method."""
        ...

    def ask(self) -> Request:
        """What it wants to know next. Asking twice without telling returns an equal request."""
        ...

    def tell(self, answer: Answer) -> Step | None:
        """Take the answer to the last request; a `Step` when a bounded piece of work is done."""
        ...

    @property
    def incumbent(self) -> Incumbent:
        """The method's own present point and loss."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, as tensors, numbers, strings, lists and dicts."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """Go on where the saved optimizer stood.

        Args:
            state: what `state_dict` returned.
            exact: True = bit for bit, or `ReplayMismatch`; False = where that is impossible (another version of
                an outside library, say), start anew from the saved incumbent and note it.
        """
        ...

    def close(self) -> None:
        """Free what the optimizer holds; it cannot be asked afterwards. Closing twice is allowed."""
        ...


class Answers(Protocol):
    """Whoever answers requests (an `Objective`)."""

    def answer(self, request: Request) -> Answer:
        """Evaluate and count; raises `Stop` at the run's limit."""
        ...


def step(optimizer: Optimizer, objective: Answers) -> Step:
    """Do one step of any optimizer: ask and tell until it reports one. The only such loop; nobody overrides it.

    Raises:
        Stop: the run's budget forbids the next evaluation. The question stays open: with a larger budget the
            next call goes on exactly there.
    """
    while True:
        report = optimizer.tell(objective.answer(optimizer.ask()))
        if report is not None:
            return report


class Method(abc.ABC):
    """An optimizer before it meets a model: a frozen value with a name and options; printable, comparable, picklable.

    Subclasses are frozen dataclasses whose fields are the options. `str(method)` is text that
    `hybridopt.method` reads back to an equal value; `a >> b` chains.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    uses: ClassVar[frozenset[Need]] = frozenset()

    @abc.abstractmethod
    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """An optimizer at work on `vector`, starting at `warm.x` if given, else where the weights stand.

        Raises:
            BoundsError: the method needs a box and the vector has none.
            MemoryLimit: the method would need more memory than there is.
        """

    @property
    def label(self) -> str:
        """The name under which the registry knows this method."""
        return self.name

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        found = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if default is dataclasses.MISSING or value != default:
                found[field.name] = value
        return found

    def __str__(self) -> str:
        from hybridopt.text import print_call

        return print_call(self.label, self.options())

    def __rshift__(self, other: Method) -> Method:
        """A chain: this method, then the other from this one's best point."""
        if not isinstance(other, Method):
            return NotImplemented
        from hybridopt.registry import composition

        chained: Method = composition("chain")((self, other))
        return chained

    def limit(self, budget: Any = None, *, steps: int | None = None, **limits: Any) -> Method:
        """This method as a stage that ends after the given budget and/or number of steps.

        Example:
            >>> import hybridopt
            >>> str(hybridopt.method("slsqp").limit(evaluations=50))
            'scipy.slsqp(evaluations=50)'
        """
        from hybridopt.registry import composition

        parsed: Budget | None = None
        if limits:
            parsed = Budget(**limits)  # a stage may have a target alone: its run has a budget
        elif budget is not None:
            parsed = Budget.parse(budget)
        staged: Method = composition("stage")(self, parsed, steps)
        return staged


def require_box(vector: ParameterVector, method: str) -> None:
    """Raise `BoundsError` unless every weight has a finite lower and upper bound; none is ever invented."""
    missing = ~(np.isfinite(vector.lower) & np.isfinite(vector.upper))
    if missing.any():
        first = next(name for name, part in vector.slices.items() if missing[part].any())
        raise BoundsError(
            f"{method}: expected finite bounds for every weight, {int(missing.sum())} of {vector.n} have none "
            f"(first: {first!r}); pass for example bounds=(-1, 1)"
        )
