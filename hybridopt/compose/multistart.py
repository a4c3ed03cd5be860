"""Many starts of one method: one after another in turns, or all in one batched program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from hybridopt.accounts import NONFINITE_PATIENCE
from hybridopt.compose._halving import Entry, Halving, Turns
from hybridopt.compose._sequence import load_report, load_scope, save_report, save_scope
from hybridopt.compose.stage import gather
from hybridopt.errors import ClosedError, MethodError, StateError
from hybridopt.ledger import Ledger, Reason
from hybridopt.optimizer import (
    Answer,
    FloatArray,
    HandOver,
    Incumbent,
    Many,
    Method,
    Need,
    Optimizer,
    Request,
    StageReport,
    Step,
)
from hybridopt.options import Count, Part, Positive, check_options
from hybridopt.randomness import derive_seed
from hybridopt.start import Start
from hybridopt.text import method as read_method
from hybridopt.text import print_call
from hybridopt.vector import ParameterVector


@dataclass(frozen=True)
class MultiStart(Method):
    """One method from many starts, of which the hopeless ones are given up: `multistart(adam(lr=0.1), starts=64)`.

    For losses with many basins. Elementwise gradient methods (`adam`, `sgd`, `rprop` and the like, ours or torch's)
    make all starts in one batched program: one forward and backward for all of them wherever the loss can be batched
    (`batch=` of `minimize`), and one update. Other methods, and stages with limits of their own, take turns. Either
    way the starts are culled by successive halving as in `Race`, and what the dropped ones would have spent goes to
    the others.

    Where a new start should learn from the ones before it use `Restart`.

    Args:
        method: what runs.
        starts: how many, at least 1; default 16.
        begin_at: where the others than the first begin; that one has the given start and this method's own seed.
            `"sobol"` (default): scrambled Sobol points of the box; `"uniform"`: independent points of the box;
            weights without two finite bounds are normal about the given start with either. `"normal"`: all weights
            normal about the given start, mirrored at the bounds.
        sigma: standard deviation of what is normal, in solver coordinates; None (default) = as handed over, else
            0.3 × the range of a bounded weight, 0.5 of others.
        keep, rung: as in `Race`; `keep=1` drops nobody.

    Starts that share a program also share the draws of a loss that draws random numbers (but under
    `noise="independent"`), do not move buffers such as BatchNorm's statistics, and treat a weight that the loss does
    not depend on as one of gradient 0. A start whose loss was not finite 30 times in a row is dropped.

    Raises:
        MethodError: an option is of the wrong type or sign; more than 21201 weights for `"sobol"`.

    Example:
        >>> import torch, hybridopt
        >>> def loss(x):                                 # many local minima, the lowest is 0 at the origin
        ...     return (x**2 - 10 * torch.cos(2 * torch.pi * x) + 10).sum()
        >>> x = torch.full((2,), 2.2, dtype=torch.float64)
        >>> r = hybridopt.minimize(loss, x, "multistart(adam(lr=0.03), starts=64, rung=30)", budget=6000,
        ...                        bounds=(-3, 3), seed=0)
        >>> round(r.best_loss, 6), r.evaluations
        (0.0, 6000)
    """

    name: ClassVar[str] = "multistart"

    method: Method
    starts: Count = 16
    begin_at: Literal["sobol", "uniform", "normal"] = "sobol"
    sigma: Positive | None = None
    keep: Part = 0.5
    rung: Positive | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", read_method(self.method))
        check_options(self)
        gather(self, (self.method,))
        object.__setattr__(self, "uses", self.uses | {Need.POPULATION})

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`."""
        halving = Halving.of(self, vector.n)
        points = self._points(vector, seed, warm)
        many = self.method.start_many(vector, points) if self.starts > 1 else None
        if many is not None:
            return Together(self, many, halving)
        entries = (
            Entry(self.method, derive_seed(seed, i), HandOver(points[i]))
            if i
            else Entry(self.method, seed, warm)
            for i in range(self.starts)
        )
        return Turns(self, entries, halving, vector)

    def _points(self, vector: ParameterVector, seed: int, warm: HandOver | None) -> FloatArray:
        """Where they begin, shape (starts, n), in solver coordinates."""
        from scipy.special import ndtri
        from scipy.stats import qmc

        from hybridopt.population._common import in_box, mirror, spread

        start = Start.at(vector, seed, warm)
        rng = np.random.default_rng(derive_seed(seed, "starts"))
        others = self.starts - 1
        if self.begin_at == "sobol":
            if start.n > qmc.Sobol.MAXDIM:
                raise MethodError(
                    f"multistart: expected at most {qmc.Sobol.MAXDIM} weights for begin_at=sobol, got {start.n}; "
                    "use uniform or normal"
                )
            u = qmc.Sobol(start.n, rng=rng).random_base2(others.bit_length())[:others]
        else:
            u = rng.random((others, start.n))
        # away from 0 and 1, whose quantiles are infinite
        normal = ndtri(np.clip(u, 2.0**-53, 1 - 2.0**-53))
        x = mirror(start, start.x0 + spread(start, self.sigma) * normal)
        if self.begin_at != "normal":
            x = in_box(start, u, x)
        return np.concatenate([start.x0[None], start.clip(x)])

    def call(self, limits: Mapping[str, Any] = MappingProxyType({})) -> str:
        """See `Method.call`."""
        options = self.options()
        del options["method"]
        return print_call(self.name, {**options, **limits}, self.method)


class Together:
    """Many starts in one program, at work (an `Optimizer`): culls them, and reports one rung after another.

    Every step costs each start the same, so a rung ends when all of them together have spent their shares.
    """

    def __init__(self, method: MultiStart, many: Many, halving: Halving) -> None:
        self.name = str(method)
        self._method = method
        self._many = many
        self._halving = halving
        self._scope = Ledger(label=str(method.method))
        self._before = self._scope.spent()  # when this rung began
        self._bad = np.zeros(
            method.starts, dtype=np.int64
        )  # losses in a row that were not finite, of each start
        self._rung = 0
        self._done: list[StageReport] = []
        self._ended: Reason | None = None
        self._closed = False

    @property
    def needs(self) -> frozenset[Need]:
        """The method's."""
        return self._many.needs

    @property
    def notes(self) -> list[str]:
        """The method's."""
        return list(self._many.notes)

    # -- the protocol -------------------------------------------------------------------------------------------

    def ask(self) -> Request:
        """See `Optimizer.ask`."""
        if self._closed or self._ended is not None:
            raise ClosedError(f"{self.name}: it has ended or was closed; start it again, or load its state")
        return self._many.ask().within(self._scope)

    def tell(self, answer: Answer) -> Step | None:
        """See `Optimizer.tell`."""
        if answer.stop is not None and answer.stop.ledger is self._scope:
            self._ended = answer.stop.reason
            return Step(self._scope.last_loss, self.name, self._ended)
        step = self._many.tell(answer)
        if step is not None:
            assert answer.losses is not None
            self._bad = np.where(np.isfinite(answer.losses), 0, self._bad + 1)
            self._cull()
        return step

    def _cull(self) -> None:
        """Drop who has no finite losses, and at the end of a rung the worse part."""
        count = len(self._bad)
        kept = [i for i in range(count) if self._bad[i] < NONFINITE_PATIENCE]
        share = (self._scope.forward_equivalents - self._before["forward_equivalents"]) / count
        rung_ends = count > 1 and self._halving.keep < 1 and share >= self._halving.size(self._rung)
        if rung_ends:
            losses = self._many.losses
            kept = [kept[k] for k in self._halving.survivors([losses[i] for i in kept])]
        if kept and len(kept) < count:
            self._many.retain(kept)
            self._bad = self._bad[kept]
        if rung_ends:
            self._done.append(self._report(count, Reason.SWITCHED, f"{len(kept)} of {count} starts go on"))
            self._rung += 1
            self._before = self._scope.spent()

    # -- looking ------------------------------------------------------------------------------------------------

    @property
    def incumbent(self) -> Incumbent:
        """The leading start's own point."""
        return self._many.incumbent

    def hand_over(self) -> HandOver:
        """The best points of the starts still at work."""
        return self._many.hand_over()

    @property
    def reports(self) -> tuple[StageReport, ...]:
        """One a rung: how many starts, and what they spent together."""
        return (*self._done, self._report(len(self._bad), self._ended, ""))

    def _report(self, count: int, reason: Reason | None, message: str) -> StageReport:
        spent = {name: value - self._before[name] for name, value in self._scope.spent().items()}
        method = str(self._method.method) if count == 1 else f"{count} × {self._method.method}"
        return StageReport(method, reason, message, self._scope.best_loss, spent)

    def close(self) -> None:
        """Close the program."""
        self._many.close()
        self._closed = True

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The rung, and the program's own state."""
        return {
            "method": self.name,
            "scope": save_scope(self._scope),
            "before": dict(self._before),
            "bad": torch.tensor(self._bad),
            "rung": self._rung,
            "done": [save_report(report) for report in self._done],
            "ended": None if self._ended is None else self._ended.value,
            "many": self._many.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """See `Optimizer.load_state_dict`."""
        if state["method"] != self.name:
            raise StateError(f"state: it was saved by {state['method']!r}, this is {self.name!r}")
        load_scope(self._scope, state["scope"])
        self._before = dict(state["before"])
        self._bad = state["bad"].numpy().copy()
        self._rung = state["rung"]
        self._done = [load_report(saved) for saved in state["done"]]
        self._ended = None if state["ended"] is None else Reason(state["ended"])
        self._many.load_state_dict(state["many"], exact=exact)
