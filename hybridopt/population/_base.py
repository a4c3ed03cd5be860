"""What every native population method shares: the protocol, its generator, rejected losses, saving."""

from __future__ import annotations

import abc
import contextlib
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from hybridopt.errors import BoundsError, ClosedError, StateError
from hybridopt.ledger import Reason
from hybridopt.machine import require_memory
from hybridopt.optimizer import (
    Answer,
    HandOver,
    Incumbent,
    Kind,
    Method,
    Need,
    Optimizer,
    Request,
    StageReport,
    Step,
    require_box,
)
from hybridopt.rows import DeviceRows, Rows, stacked
from hybridopt.start import Ending, Start
from hybridopt.vector import ParameterVector

FloatArray: TypeAlias = npt.NDArray[np.float64]

_AS_IT_IS = contextlib.nullcontext()


class Plain:
    """Dataclasses whose fields are plain data, or `Plain` themselves."""

    def state_dict(self) -> dict[str, Any]:
        """All fields, arrays as tensors."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {k: v.state_dict() if isinstance(v, Plain) else _pack(v) for k, v in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the saved fields over."""
        for f in fields(self):  # type: ignore[arg-type]
            part, value = getattr(self, f.name), state[f.name]
            if isinstance(part, Plain):
                part.load_state_dict(value)
            else:
                setattr(self, f.name, _unpack(value))


class Strategy(Plain, abc.ABC):
    """One algorithm between generations: a dataclass whose every field is plain data.

    Fields (float64, int64 or bool arrays, numbers, strings, None, and lists of these) are what a checkpoint holds.
    What follows from the method's options and `Start` alone belongs in other attributes, made by `begin`.
    """

    @abc.abstractmethod
    def ask(self, rng: np.random.Generator) -> Rows:
        """The next generation, shape (popsize, n), inside the bounds. All randomness comes from `rng`."""

    @abc.abstractmethod
    def tell(self, x: FloatArray, losses: FloatArray, rng: np.random.Generator) -> Ending | None:
        """Learn from the losses, shape (popsize,), of what was asked; an `Ending` when the method is done.

        A rejected loss is +inf, and at least one is finite.
        """

    def favourite(self) -> FloatArray | None:
        """The point it would name where a low loss may be a lucky draw, shape (n,), in bounds; None = has none."""
        return None

    def remembered(self) -> list[FloatArray]:
        """Other points whose losses, kept from earlier generations, may be lucky draws, each of shape (n,), in bounds.

        They are evaluated again with the favourite, beside what is asked next.
        """
        return []

    def correct(self, losses: FloatArray, paired: bool) -> float:
        """Learn from new losses of the favourite and of what is `remembered`, in this order, shape (1 + k,).

        Args:
            losses: a rejected one is +inf.
            paired: whether they drew the same random numbers as the generation that is told next.

        Returns:
            What to take off that generation's losses to compare them with those remembered.
        """
        return 0.0

    def hand_over(self) -> HandOver:
        """What a successor may use besides the best point, in solver coordinates; nothing by default."""
        return HandOver()


class PopulationMethod(Method):
    """A native method. A subclass is a frozen dataclass of options; `begin` makes its `Strategy`."""

    uses: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS, Need.POPULATION})
    takes: ClassVar[frozenset[str]] = frozenset({"sigma", "covariance"})
    memory_advice: ClassVar[str] = "select fewer weights (select=...)"
    skips_start: ClassVar[bool] = False
    """Whether its generations leave out the start, which then is evaluated beside the first one."""

    @abc.abstractmethod
    def begin(self, start: Start, rng: np.random.Generator) -> Strategy:
        """The algorithm before its first generation."""

    def memory(self, n: int) -> int:
        """Bytes the method is bound to need for n weights (0 = not worth checking)."""
        return 0

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`.

        Raises:
            BoundsError: also where two bounds are so far apart that their distance is no float64 number.
        """
        if Need.BOUNDS in self.needs:
            require_box(vector, self.label)
        require_memory(self.memory(vector.n), self.label, vector.n, self.memory_advice)
        start = Start.at(vector, seed, warm)
        _require_distances(start, self.label)
        return PopulationRun(self, start)


class PopulationRun:
    """A native method at work (an `Optimizer`). One step is one generation.

    A generation in which no loss was finite teaches nothing: the method draws another one.

    Where the lowest loss is a lucky draw (`Answer.keeps_best` is False) each further generation begins with the points
    that the run might name: the strategy's favourite, the mean of its distribution or the best of what it remembers;
    without one, the point named so far and the lowest of the last generation, compared with the same random numbers.
    Their losses are evaluations like all others; a strategy hears of them only where it remembers losses, which it
    corrects by them. So `incumbent` is a point with a loss that did not choose it.
    """

    reports: tuple[StageReport, ...] = ()

    def __init__(self, method: PopulationMethod, start: Start) -> None:
        self.method = method
        self.name = method.label
        self.needs = method.needs
        self.notes: Sequence[str] = []
        self._begin(start)
        self._best = Incumbent(start.loss, start.x0)
        self._pending: Rows | None = None
        self._ending: Ending | None = None
        self._noisy = False
        self._named = Incumbent(math.inf, None)
        self._rival: FloatArray | None = (
            None  # the lowest of the last generation, where there is no favourite
        )
        self._judged = 0  # rows of `_pending` that are points to name
        # whether the first row is the start, which no generation holds: one must not end worse than one began
        self._opening = method.skips_start and not math.isfinite(start.loss)
        self._closed = False

    def _begin(self, start: Start) -> None:
        self.start = start
        self._bits = np.random.PCG64(start.seed)
        self._rng = np.random.Generator(self._bits)
        self.strategy = self.method.begin(start, self._rng)

    # -- the protocol -------------------------------------------------------------------------------------------

    def ask(self) -> Request:
        """See `Optimizer.ask`."""
        self._check_open()
        if self._ending is not None:
            raise ClosedError(f"{self.name}: it has ended ({self._ending.message}); start it again to go on")
        if self._pending is None:
            drawn = self._drawn()
            judged = self._candidates() if self._noisy else []
            self._judged = len(judged)
            self._pending = stacked([self.start.x0] if self._opening else judged, drawn)
        return Request(Kind.POPULATION, cast("FloatArray", self._pending))

    def _drawn(self) -> Rows:
        """The next generation, on the model's device, from the host if there is too little memory there."""
        if self.start.device is None:
            return self.strategy.ask(self._rng)
        before = copy.deepcopy(self._bits.state)
        try:
            return self.strategy.ask(self._rng)
        except torch.OutOfMemoryError:
            state = self.strategy.state_dict()
        self._begin(replace(self.start, device=None))
        self.strategy.load_state_dict(state)
        self._bits.state = before
        self.notes = [
            *self.notes,
            "generations are drawn on the CPU: the weights' device has too little memory",
        ]
        return self.strategy.ask(self._rng)

    def tell(self, answer: Answer) -> Step | None:
        """See `Optimizer.tell`."""
        if answer.stop is not None:
            raise answer.stop
        if self._pending is None:
            self.ask()
        x, losses = cast("FloatArray | None", self._pending), answer.losses
        assert x is not None
        assert losses is not None
        self._noisy |= not answer.keeps_best
        luck = 0.0
        if self._opening:
            self._opening = False
            if losses[0] < self._best.loss:
                self._best = Incumbent(float(losses[0]), x[0].copy())
            x, losses = x[1:], losses[1:]
        if self._judged:
            judged, losses = losses[: self._judged], losses[self._judged :]
            rivals = self._judged > 1 and self.strategy.favourite() is None  # else the favourite is named
            winner = int(judged.argmin()) if rivals else 0
            if math.isfinite(judged[winner]):
                self._named = Incumbent(float(judged[winner]), x[winner].copy())
            x = x[self._judged :]
            luck = self.strategy.correct(judged, answer.paired)
        lowest = losses.argmin()
        loss = float(losses[lowest])
        if loss < self._best.loss:
            self._best = Incumbent(loss, x[lowest].copy())
        if math.isfinite(loss):
            # +inf told for a rejected point: inf - inf (4 µs, a tenth of a generation, so only where there is one)
            rejected = losses[losses.argmax()] == math.inf
            with np.errstate(all="ignore") if rejected else _AS_IT_IS:
                ending = self.strategy.tell(x, losses - luck if luck else losses, self._rng)
            if ending is not None and self._best.x is not None and not ending.loss <= self._best.loss:
                ending = ending._replace(loss=self._best.loss, x=self._best.x)
            self._ending = ending
        if self._noisy:
            self._rival = x[lowest].copy()
        self._pending, self._judged = None, 0
        if self._ending is None:
            return Step(loss, self.name)
        return Step(loss, self.name, self._ending.reason, self._ending.message)

    @property
    def incumbent(self) -> Incumbent:
        """The best point seen, unless the method has ended and names another; with noise the one judged best."""
        if self._named.x is not None:
            return self._named
        if self._ending is not None:
            return Incumbent(self._ending.loss, self._ending.x)
        return self._best

    def _candidates(self) -> list[FloatArray]:
        favourite = self.strategy.favourite()
        if favourite is not None:
            return [favourite, *self.strategy.remembered()]
        return [x for x in (self._named.x, self._rival) if x is not None]

    def hand_over(self) -> HandOver:
        """See `Optimizer.hand_over`: what the strategy knows of the distance still to go."""
        return self.strategy.hand_over()

    def close(self) -> None:
        """Nothing is held; asking is over."""
        self._closed = True

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The algorithm's own numbers: they load anywhere, whatever library versions wrote them."""
        ending = self._ending
        return {
            "method": str(self.method),
            "start": self.start.state_dict(),
            "strategy": self.strategy.state_dict(),
            "generator": copy.deepcopy(dict(self._bits.state)),
            "pending": _pack(self._pending),
            "best": [self._best.loss, _pack(self._best.x)],
            "noisy": self._noisy,
            "named": [self._named.loss, _pack(self._named.x)],
            "rival": _pack(self._rival),
            "judged": self._judged,
            "opening": self._opening,
            "ending": None
            if ending is None
            else [ending.reason.value, ending.message, ending.loss, _pack(ending.x)],
            "notes": list(self.notes),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """See `Optimizer.load_state_dict`; a native method's resume is always exact.

        Raises:
            StateError: the state belongs to a method with other options.
        """
        if state["method"] != str(self.method):
            raise StateError(
                f"state: it was saved by {state['method']!r}, this is {str(self.method)!r}; a method can only go on "
                "with the options it began with"
            )
        self._begin(replace(Start.from_state(state["start"]), device=self.start.device))
        self.strategy.load_state_dict(state["strategy"])
        self._bits.state = copy.deepcopy(state["generator"])
        self._pending = _unpack(state["pending"])
        self._best = Incumbent(state["best"][0], _unpack(state["best"][1]))
        self._noisy, self._judged, self._opening = state["noisy"], state["judged"], state["opening"]
        self._named = Incumbent(state["named"][0], _unpack(state["named"][1]))
        self._rival = _unpack(state["rival"])
        self._ending = None
        if state["ending"] is not None:
            reason, message, loss, x = state["ending"]
            self._ending = Ending(Reason(reason), message, loss, _unpack(x))
        self.notes = list(state["notes"])

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.name}: it was closed; start it again, or load its state into a new one")


def _require_distances(start: Start, method: str) -> None:
    """Raise `BoundsError` where two finite bounds have no finite distance (the largest float64 as "no bound")."""
    with np.errstate(over="ignore"):
        wide = np.isinf(start.upper - start.lower) & np.isfinite(start.upper) & np.isfinite(start.lower)
    if wide.any():
        i = int(wide.argmax())
        raise BoundsError(
            f"{method}: expected bounds whose distance is a float64 number, weight {i} has ({start.lower[i]}, "
            f"{start.upper[i]}); give closer ones, or -inf and inf where there is none"
        )


def _pack(value: Any) -> Any:
    """Arrays as tensors of their own memory, inside lists too."""
    if isinstance(value, np.ndarray | DeviceRows):
        return torch.tensor(np.asarray(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_pack(part) for part in value]
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy().copy()
    if isinstance(value, list):
        return [_unpack(part) for part in value]
    return value
