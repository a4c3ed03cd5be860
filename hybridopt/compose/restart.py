"""A method begun again and again: from a perturbed best point, from random points, with a growing population."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np

from hybridopt.compose._sequence import Sequence
from hybridopt.compose.stage import Stage, gather
from hybridopt.errors import MethodError
from hybridopt.optimizer import FloatArray, HandOver, Incumbent, Method
from hybridopt.options import Index, NonNegative, Positive, check_options
from hybridopt.randomness import derive_seed
from hybridopt.start import Start
from hybridopt.text import LIMITS, print_call
from hybridopt.text import method as read_method
from hybridopt.vector import ParameterVector

GROWTHS = 9  # restarts after which an option grows no more


@dataclass(frozen=True)
class Restart(Sequence):
    """Begin a method again each time it ends, somewhere else: `restart(slsqp)` is basin hopping with SLSQP.

    Args:
        method: what runs; a stage's limits and rule end it, else its own word does.
        begin_at: where it begins again. `"perturb"` (default): at the best point so far plus a normal step of standard
            deviation `sigma` in each coordinate (mirrored at the bounds). `"uniform"`: anywhere in the box (weights
            without bounds: normal about the first start). `"best"`: at the best point. `"start"`: where the first
            one began, with another seed.
        sigma: in solver coordinates; None (default) = 0.3 × the range of a bounded weight, 0.5 of others.
        temperature: which point `"perturb"` perturbs. 0 (default): the best so far. Above 0, in the unit of the loss:
            the one last accepted; what a run found is accepted if it is no higher than the one accepted before, else
            with probability exp(-rise / temperature) (basin hopping, Wales & Doye 1997). For a best minimum behind a
            barrier of others; about the difference in loss between neighbouring minima.
        grow: name of an option of the method, a number, that is multiplied by `factor` at each restart
            (`grow=popsize` for CMA-ES is IPOP, Auger & Hansen 2005), nine times at most; None (default) = none.
        factor: see `grow`; default 2. Whole numbers stay whole.
        restarts: how many after the first run; None (default) = as long as the budget lasts.

    Only the point is handed over, and to `begin_at=best` whatever else the method takes.

    Example:
        >>> import numpy as np, hybridopt
        >>> def loss(x):                                 # many local minima, the lowest is 0 at the origin
        ...     return float((x**2 - 10 * np.cos(2 * np.pi * x) + 10).sum())
        >>> r = hybridopt.minimize(loss, np.full(2, 2.2), "restart(slsqp, sigma=1)", budget=3000, seed=0)
        >>> round(r.best_loss, 6)
        0.0
    """

    name: ClassVar[str] = "restart"

    method: Method
    begin_at: Literal["perturb", "uniform", "best", "start"] = "perturb"
    sigma: Positive | None = None
    temperature: NonNegative = 0.0
    grow: str | None = None
    factor: Positive = 2.0
    restarts: Index | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", read_method(self.method))
        check_options(self)
        if self.temperature > 0 and self.begin_at != "perturb":
            raise MethodError(
                "restart: expected begin_at=perturb with a temperature, which chooses the point that is perturbed, got "
                f"begin_at={self.begin_at}"
            )
        for index in (1, GROWTHS):  # an option that cannot grow, or not so far, is refused here
            self.stage(index)
        gather(self, (self.method,))

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """Whether it begins at drawn points."""
        return self.begin_at in ("perturb", "uniform")

    @property
    def endless(self) -> bool:  # type: ignore[override]
        """Whether no number of restarts was given."""
        return self.restarts is None

    def stage(self, index: int) -> Stage | None:
        """See `Sequence.stage`."""
        if self.restarts is not None and index > self.restarts:
            return None
        given = self.method if isinstance(self.method, Stage) else Stage(self.method)
        if self.grow is None or index == 0:
            return given
        return dataclasses.replace(given, method=self._grown(given.method, self.grow, index))

    def _grown(self, method: Method, option: str, index: int) -> Method:
        """The method with its option multiplied `index` times."""
        if method.parts:
            raise MethodError(
                f"restart: expected a single method, one option of which can grow={option}, got {method}; restart the "
                f"method that shall grow, e.g. restart({method.parts[0]}, grow={option})"
            )
        value = (
            getattr(method, option, None)
            if dataclasses.is_dataclass(method)
            else method.options().get(option)
        )
        if not isinstance(value, int | float) or isinstance(value, bool):
            read_method(
                method, **{option: value}
            )  # refuses an option that there is not, with the nearest names
            what = f"{option!r} is {value!r}"
            if option in LIMITS:
                what = f"{option!r} is a limit"
            elif value is None:
                what += f"; give it one, e.g. {method.label}({option}=10)"
            raise MethodError(
                f"restart: expected grow to name an option of {method.label} that is a number, {what}"
            )
        grown = value * self.factor ** min(index, GROWTHS)
        return read_method(method, **{option: round(grown) if isinstance(value, int) else grown})

    def accept(self, here: Incumbent, ended: Incumbent, best: Incumbent, seed: int) -> Incumbent:
        """See `Sequence.accept`."""
        if self.temperature == 0 or not math.isfinite(here.loss):
            return best
        rise = ended.loss - here.loss  # inf where the run found no point that counts
        rng = np.random.default_rng(derive_seed(seed, "accept"))
        return ended if rise <= 0 or rng.random() < math.exp(-rise / self.temperature) else here

    def begin(
        self, index: int, best: HandOver, origin: FloatArray, vector: ParameterVector, seed: int
    ) -> HandOver:
        """See `Sequence.begin`."""
        if self.begin_at == "best":
            return best
        if self.begin_at == "start":
            return HandOver(origin)
        from hybridopt.population._common import in_box, mirror, spread  # its package imports SciPy

        start = Start.at(vector, seed, HandOver(origin if self.begin_at == "uniform" else best.x))
        rng = np.random.default_rng(seed)
        steps = spread(start, self.sigma) * rng.standard_normal(start.n)
        x = mirror(start, start.x0 + steps)
        if self.begin_at == "uniform":
            x = in_box(start, rng.random(start.n), x)
        return HandOver(start.clip(x))

    def call(self, limits: Mapping[str, Any] = MappingProxyType({})) -> str:
        """See `Method.call`."""
        options = self.options()
        del options["method"]
        return print_call(self.name, {**options, **limits}, self.method)
