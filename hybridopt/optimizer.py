"""The protocol that every optimizer and every composition of optimizers obeys: ask, be told, one step at a time."""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from hybridopt.errors import BoundsError, Stop
from hybridopt.ledger import Ledger, Reason
from hybridopt.vector import ParameterVector

FloatArray: TypeAlias = npt.NDArray[np.float64]


class Need(enum.Enum):
    """What a method must have (`needs`) or takes when it is there (`uses`)."""

    GRADIENT = "gradient"
    BOUNDS = "bounds"
    POPULATION = "population"
    CONSTRAINTS = "constraints"
    RESIDUALS = "residuals"
    HESSIAN = "hessian"


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
    VALUES_AND_GRADIENTS = "values+gradients"
    """The losses and gradients of all rows of `x`, shape (k, n): many starts of a gradient method."""
    RESIDUALS = "residuals"
    """The vector, shape (m,), whose half squared norm is the loss at `x`, and that loss."""
    JACOBIAN = "jacobian"
    """Of the residuals just asked at `x`, shape (m, n)."""
    LIMITS = "limits"
    """Of the constraints, shape (3, k): lower, upper, and whether linear in `x` (1 or 0). Costs what `CONSTRAINTS`
    does, since how many there are is known when they were evaluated."""
    CONSTRAINTS = "constraints"
    """All constraint functions at `x`, shape (k,); at all rows of `x`, shape (popsize, k)."""
    CONSTRAINT_JACOBIAN = "constraint jacobian"
    """Of the constraint functions at `x`, shape (k, n)."""
    HESSIAN = "hessian"
    """Second derivatives of the loss at `x`, shape (n, n)."""
    HESSIAN_VECTOR = "hessian product"
    """Their product with `direction`, shape (n,)."""


class Request(NamedTuple):
    """One question of an optimizer.

    `ask` may be called again before `tell`; it then returns an equal request.
    """

    kind: Kind
    x: FloatArray | None = None
    """Solver coordinates, shape (n,) or (popsize, n), float64; a population drawn on a GPU is a `DeviceRows`. None:
    "where the weights stand" (in-place methods); gradients then stay in the weights' `.grad`."""
    probe: bool = False
    """A question on the way to another one (a difference stencil): counted, but never the method's own point."""
    commit: bool = False
    """An accepted iterate of a gradient method: buffers such as BatchNorm statistics may move."""
    keep_graph: bool = False
    """A `GRADIENT` question about this value may follow."""
    scopes: tuple[Ledger, ...] = ()
    """Ledgers of the enclosing stages, outermost first; the evaluation is booked in each and limited by each."""
    direction: FloatArray | None = None
    """Solver coordinates, shape (n,), for `HESSIAN_VECTOR`."""

    def within(self, scope: Ledger) -> Request:
        """The same question, also booked in (and limited by) an enclosing stage's ledger."""
        kind, x, probe, commit, keep_graph, scopes, direction = self
        return Request(kind, x, probe, commit, keep_graph, (scope, *scopes), direction)  # `_replace` takes µs


class Answer(NamedTuple):
    """The reply to a `Request`. A loss that is nan or ±inf is told as +inf, its gradient as zeros."""

    loss: float = np.inf
    losses: FloatArray | None = None
    """Shape (popsize,), for `POPULATION` and `VALUES_AND_GRADIENTS`."""
    gradient: FloatArray | None = None
    """Shape (n,), or (k, n) for `VALUES_AND_GRADIENTS`, in solver coordinates; None for in-place requests, and where
    the loss has no gradient at all."""
    finite: bool = True
    """Whether loss and gradient were finite."""
    surrogate: bool = False
    """The gradient is that of a surrogate the user chose: it need not agree with the loss."""
    keeps_best: bool = True
    """Whether the lowest loss seen is that of the best point; else (it is a lucky draw) the method must name one."""
    paired: bool = False
    """Whether all members of the population drew the same random numbers, and the next one draws others."""
    stop: Stop | None = None
    """A limit of one of the request's own scopes was reached: nothing was evaluated (or not all of a population)."""
    array: FloatArray | None = None
    """What the other kinds ask for, in the shape said there."""
    violation: float = 0.0
    """By how much the point breaks the constraints; 0 = it keeps them all, within their tolerance."""


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
    """The point to start at, shape (n,); None = where the weights stand."""
    loss: float = np.inf
    """The loss at `x`; inf if it is not known."""
    sigma: float | None = None
    """Typical distance, per coordinate, between `x` and the optimum."""
    covariance: FloatArray | None = None
    """The shape of that distance, of variance 1: (n,) = a diagonal, or (n, n); the geometric mean of its diagonal is
    1, so the distance along coordinate i is `sigma * sqrt(diagonal[i])`."""
    points: FloatArray | None = None
    """Good points, shape (k, n), lowest loss first."""
    losses: FloatArray | None = None
    """Their losses, shape (k,)."""
    checked: frozenset[str] = frozenset()
    """Derivatives of autograd that were compared with differences and found right, as `Jacobian` names them."""

    def only(self, parts: Collection[str]) -> HandOver:
        """The point and its loss, and of the other parts those named."""
        points = "points" in parts
        return HandOver(
            self.x,
            self.loss,
            self.sigma if "sigma" in parts else None,
            self.covariance if "covariance" in parts else None,
            self.points if points else None,
            self.losses if points else None,
        )

    def __str__(self) -> str:
        """What it holds, for people: `point, sigma 0.03, 20 points`."""
        said = ["start" if self.x is None else "point"]
        if self.sigma is not None:
            said.append(f"sigma {self.sigma:.3g}")
        if self.covariance is not None:
            said.append("covariance" if self.covariance.ndim == 2 else "variances")
        if self.points is not None:
            said.append(f"{len(self.points)} points")
        return ", ".join(said)


@dataclasses.dataclass(frozen=True)
class StageReport:
    """What one stage did.

    Attributes:
        method: as text.
        reason: why it ended; None = it was still at work.
        message: the method's own words, or what ended it; may be empty.
        best_loss: the lowest loss that it evaluated.
        spent: evaluations, forward, backward, forward_equivalents and seconds.
        received: what it was handed by its predecessor (`HandOver` as text); empty for a first stage.
    """

    method: str
    reason: Reason | None
    message: str
    best_loss: float
    spent: Mapping[str, Any]
    received: str = ""


@runtime_checkable
class Optimizer(Protocol):
    """A method at work on one model: asks, is told, and never computes a loss itself."""

    name: str

    @property
    def needs(self) -> frozenset[Need]:
        """What it cannot do without."""
        ...

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

    def hand_over(self) -> HandOver:
        """What a successor may use besides the point: the distance still to go, its shape, good points seen."""
        ...

    def close(self) -> None:
        """Free what the optimizer holds; it cannot be asked afterwards. Closing twice is allowed."""
        ...


class Many(Optimizer, Protocol):
    """Many starts of one method that make every step together."""

    @property
    def losses(self) -> FloatArray:
        """The lowest loss of each start still at work, shape (k,), in the order of the rows that it asks for."""
        ...

    def retain(self, rows: Sequence[int]) -> None:
        """Go on with these starts alone, in this order; between two steps."""
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
    """If it is registered, the registered name: text and saved states name the method by it."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    uses: ClassVar[frozenset[Need]] = frozenset()
    takes: ClassVar[frozenset[str]] = frozenset()
    """The parts of a `HandOver` that it uses besides the point: of sigma, covariance, points."""
    parts: ClassVar[tuple[Method, ...]] = ()
    """The methods that a composition is made of."""

    @abc.abstractmethod
    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """An optimizer at work on `vector`, starting at `warm.x` if given, else where the weights stand.

        Raises:
            BoundsError: the method needs a box and the vector has none.
            MemoryLimit: the method would need more memory than there is.
        """

    def start_many(self, vector: ParameterVector, points: FloatArray) -> Many | None:
        """Many starts of this method at work in one batched program; None (default) where there is no such program.

        Args:
            vector: of the weights; left as it stands.
            points: where they begin, shape (k, n), in solver coordinates, inside the bounds.
        """
        return None

    def fitted(self, objective: Any) -> tuple[Method, list[str]]:
        """What a run starts in this method's place, once the objective is known, and what to tell the user of it.

        Most methods stand for themselves. The choice must follow from the objective alone (nothing is evaluated), so
        that a resumed run makes the same one.
        """
        return self, []

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

    def call(self, limits: Mapping[str, Any] = MappingProxyType({})) -> str:
        """Its text form, with a stage's limits among the options."""
        from hybridopt.text import print_call

        return print_call(self.label, {**self.options(), **limits})

    def __str__(self) -> str:
        return self.call()

    def __rshift__(self, other: Method | str | type) -> Method:
        """A chain: this method, then the other (or what its text says) from this one's best point."""
        if not isinstance(other, Method | str | type):
            return NotImplemented
        from hybridopt.registry import composition

        chained: Method = composition("chain")((self, other))
        return chained

    def limit(self, budget: Any = None, **limits: Any) -> Method:
        """This method as a stage that ends after the given budget and/or number of steps.

        Args:
            budget: anything that `Budget.parse` takes; or the limits by name:
            **limits: evaluations, forward_equivalents, seconds, each a number or a part of the enclosing budget
                (`"20%"`); target; steps; and `handover`: `"all"` (default) or `"point"`, what the stage takes from
                its predecessor.

        Example:
            >>> import hybridopt
            >>> str(hybridopt.method("slsqp").limit(evaluations=50))
            'scipy.slsqp(evaluations=50)'
            >>> str(hybridopt.method("cmaes").limit(evaluations="20%", handover="point"))
            'cmaes(evaluations=20%, handover=point)'
        """
        from hybridopt.registry import composition

        staged: Method = composition("stage")(self, budget, limits)
        return staged

    def until(self, rule: Any) -> Method:
        """This method as a stage that ends when a switch rule is met; see `hybridopt.until`.

        Example:
            >>> import hybridopt
            >>> from hybridopt.until import gradient_norm, plateau
            >>> str(hybridopt.method("adam").until(plateau(50) | gradient_norm(1e-6)))
            'adam until plateau(50) | gradient_norm(1e-06)'
        """
        from hybridopt.registry import composition

        staged: Method = composition("stage")(self, None, {"rule": rule})
        return staged


def leaves(method: Method) -> Iterator[Method]:
    """The methods that a composition is made of, itself included."""
    yield method
    for part in method.parts:
        yield from leaves(part)


def require_box(vector: ParameterVector, method: str) -> None:
    """Raise `BoundsError` unless every weight has a finite lower and upper bound; none is ever invented."""
    missing = ~(np.isfinite(vector.lower) & np.isfinite(vector.upper))
    if missing.any():
        first = next(name for name, part in vector.slices.items() if missing[part].any())
        raise BoundsError(
            f"{method}: expected finite bounds for every weight, {int(missing.sum())} of {vector.n} have none "
            f"(first: {first!r}); pass for example bounds=(-1, 1)"
        )
