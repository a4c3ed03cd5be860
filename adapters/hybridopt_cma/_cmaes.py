"""CMA-ES (Hansen, "The CMA Evolution Strategy: A Tutorial", 2016), package `cma`."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hybridopt import filters
from hybridopt.errors import MethodError
from hybridopt.initial import read_points, with_points
from hybridopt.ledger import Reason
from hybridopt.optimizer import HandOver, Need, Optimizer
from hybridopt.options import check_options
from hybridopt.randomness import derive_seed
from hybridopt.solver import Ask, BlockingMethod, Ending, Start
from hybridopt.vector import ParameterVector

FloatArray: TypeAlias = npt.NDArray[np.float64]

# public since NumPy 1.24, but missing from its type stubs
_get_bit_generator = np.random.get_bit_generator  # type: ignore[attr-defined]
_set_bit_generator = np.random.set_bit_generator  # type: ignore[attr-defined]

# Options of pycma that are given elsewhere, and where.
_ELSEWHERE = {
    "CMA_active": "active=",
    "CMA_diagonal": "diagonal=",
    "CMA_stds": "the scale of the weights, or what a predecessor hands over",
    "bounds": "the bounds of the weights",
    "fixed_variables": "select=",
    "ftarget": "the target of the budget",
    "integer_variables": "integer= of the weights",
    "is_feasible": "nonfinite=",
    "maxfevals": "the budget",
    "maxiter": "maxiter=",
    "popsize": "popsize=",
    "randn": "seed=",
    "scaling_of_variables": "scale= of the weights",
    "seed": "seed=",
    "termination_callback": "callbacks=",
    "timeout": "the budget",
    "tolfun": "tolfun=",
    "tolx": "tolx=",
    "transformation": "the loss",
    "typical_x": "the start",
}
# Options for classes of pycma, and which plain values they take besides.
_CLASSES: dict[str, tuple[bool | None, ...]] = {
    "AdaptSigma": (True, False, None),
    "BoundaryHandler": (None,),
    "CMA_sampler": (None,),
}
_SILENT = (
    "verb",
    "vv",
    "signals_filename",
    "eval_final_mean",
)  # its printing, files, and what only its own loop reads
_LEAST = 0.2  # the standard deviation that pycma keeps for whole numbers
_FAILED = {
    "tolflatfitness",
    "tolfacupx",
    "noeffectaxis",
    "noeffectcoord",
    "conditioncov",
    "tolstagnation",
    "maxiter",
}


@dataclass(frozen=True)
class CMAES(BlockingMethod):
    """Samples generations from a normal distribution whose mean, step size and covariance it learns.

    The first choice without gradients for 2 to a few hundred weights with interacting effects. O(n²) memory and
    time a generation. Weights that are `integer` are told to it as `integer_variables`; points handed over by a
    predecessor, and those of `initial`, are injected into the first generation, up to half of it.

    Args:
        sigma: initial standard deviation in solver coordinates, shared by all weights; None = 0.3 × the range of
            each bounded weight, 0.5 for unbounded ones (0.5 × scale in weights).
        popsize: points a generation; None = 4 + 3 ln n.
        maxiter: generations; None = pycma's default.
        diagonal: True = learn variances only: O(n) memory and time. A number >= 2 = do so for that many generations
            of each run, then learn the whole covariance (pycma's `CMA_diagonal`).
        tolfun, tolx: stop when losses, or points, of late generations differ by less.
        active: learn from the worse half of a generation too.
        restarts: "ipop": start again with twice the popsize when the search has ended (Auger & Hansen 2005); "bipop":
            take turns with small searches of small sigma, so that both spend alike (Hansen 2009). A restart begins
            at a random point: uniform in the box, normal about the start where there is none.
        max_restarts: after so many restarts the next end is the end.
        extra: any other option of `cma.CMAOptions` by name, as in `extra={"CMA_mu": 3}` (in text
            `extra=((CMA_mu, 3),)`); values are numbers, text, True, False, None, or tuples of these. `AdaptSigma`
            takes True or False; `BoundaryHandler`, `CMA_sampler` and other values of `AdaptSigma` are classes of
            pycma, which neither text nor a saved state can hold, and are refused.
        initial: points to inject into the first generation, shape (k, n), in the weights' own units and order; they do
            not move the mean, which begins where the weights stand.

    Raises:
        MethodError: an option that pycma does not know, or that is given elsewhere; initial points of another number of
            weights, or more than half a generation of them.
        BoundsError: an initial point lies outside the bounds.
        MemoryLimit: its matrices of n² doubles do not fit.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.adapters import CMAES
        >>> f = lambda x: float(((x - 1) ** 2).sum())
        >>> r = hybridopt.minimize(f, np.zeros(3), CMAES(sigma=0.5), budget=1000, seed=1)
        >>> r.best_loss < 1e-8
        True
        >>> known = ((1.0, 1.0, 1.1), (0.9, 1.0, 1.0))
        >>> r = hybridopt.minimize(f, np.zeros(3), CMAES(initial=known), budget=7, seed=1)
        >>> r.best_loss < 0.011
        True
    """

    name: ClassVar[str] = "cma.cmaes"
    uses: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS, Need.POPULATION})
    takes: ClassVar[frozenset[str]] = frozenset({"sigma", "covariance", "points"})
    libraries: ClassVar[tuple[str, ...]] = ("cma",)
    memory_advice: ClassVar[str] = "use diagonal=True, or select fewer weights (select=...)"

    sigma: float | None = None
    popsize: int | None = None
    maxiter: int | None = None
    diagonal: bool | int = False
    tolfun: float = 1e-11
    tolx: float = 1e-11
    active: bool = True
    restarts: Literal["none", "ipop", "bipop"] = "none"
    max_restarts: int = 9
    extra: Any = ()
    initial: Any = ()

    def __post_init__(self) -> None:
        check_options(self)
        if self.sigma is not None and not self.sigma > 0:
            raise MethodError(f"{self.name}: expected sigma > 0, got {self.sigma!r}")
        if self.popsize is not None and not self.popsize >= 2:
            raise MethodError(f"{self.name}: expected popsize >= 2, got {self.popsize!r}")
        if not isinstance(self.diagonal, bool) and not self.diagonal >= 2:
            raise MethodError(
                f"{self.name}: expected diagonal to be True, False or a number of generations >= 2, "
                f"got {self.diagonal!r}"
            )
        if not self.max_restarts >= 0:
            raise MethodError(f"{self.name}: expected max_restarts >= 0, got {self.max_restarts!r}")
        object.__setattr__(self, "extra", self._read_extra())
        object.__setattr__(self, "initial", read_points(self.name, self.initial))

    def _read_extra(self) -> tuple[tuple[str, Any], ...]:
        """The further options as sorted pairs, which can be hashed and printed."""
        try:
            given = dict(self.extra)
            hash(tuple(given.items()))
        except (TypeError, ValueError):
            raise MethodError(
                f"{self.name}: expected extra to map names of cma.CMAOptions to plain values, got {self.extra!r}"
            ) from None
        if not given:
            return ()
        import cma

        known = sorted(cma.CMAOptions.defaults())
        for name in given:
            if name in _ELSEWHERE:
                raise MethodError(f"{self.name}: {name} is given elsewhere: {_ELSEWHERE[name]}")
            if name not in known or str(name).startswith(_SILENT):
                near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
                raise MethodError(
                    f"{self.name}: extra has no option {name!r}"
                    + (f"; nearest: {', '.join(near)}" if near else "; see cma.CMAOptions")
                )
            if name in _CLASSES and not any(given[name] is value for value in _CLASSES[name]):
                raise MethodError(
                    f"{self.name}: expected {name} in extra to be {' or '.join(map(str, _CLASSES[name]))}, got "
                    f"{given[name]!r}; classes of pycma cannot be given as text"
                )
        if weights := given.get("CMA_recombination_weights"):
            try:
                cma.recombination_weights.RecombinationWeights(weights)
            except (AssertionError, TypeError, ValueError) as error:
                raise MethodError(
                    f"{self.name}: expected CMA_recombination_weights in extra to be one weight for each point of a "
                    "generation, from the best to the worst: falling, the positive ones of sum 1, the last one 0 or "
                    f"less; got {weights!r}"
                ) from error
        return tuple(sorted(given.items()))

    def memory(self, n: int) -> int:
        """Bytes of covariance, its eigenvectors, and their work copies."""
        return 0 if self.diagonal is True else 40 * n * n

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`."""
        return super().start(vector, seed, with_points(self.label, self.initial, vector, warm))

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        random = np.random.RandomState(start.seed)
        sigma, stds = self._spread(start)
        options = self._options(start, random, stds)
        floor = _LEAST if start.n == 1 and options.get("integer_variables") else 0.0
        schedule = _Schedule(self, start, sigma, random)
        draws = self._draws(start)
        best_loss, best_x, spent = math.inf, start.x0, 0
        while True:
            low, high = math.inf, -math.inf  # of this run's losses
            with draws:
                es = self._begin(schedule.x0, schedule.sigma, options | schedule.changes)
                _keep(es, floor)
                if schedule.runs == 0 and start.points is not None:
                    self._inject(es, start.points[: es.popsize // 2])
            while not es.stop():
                with draws:
                    population = np.clip(np.array(es.ask()), start.lower, start.upper)
                losses = ask.values(population)
                spent += len(losses)
                finite = losses[np.isfinite(losses)]
                if finite.size:  # else nothing was learnt: draw again from the same distribution
                    low, high = min(low, float(finite.min())), max(high, float(finite.max()))
                    with draws:
                        _tell(es, population, losses)
                    _keep(es, floor)
            stopped = sorted(es.stop())
            if es.best.f is not None and es.best.f < best_loss:
                best_loss, best_x = float(es.best.f), np.clip(es.best.x, start.lower, start.upper)
            if not schedule.again(es.popsize, spent):
                break
            spent = 0
        message = ", ".join(stopped)
        if low == high:  # which pycma's tolfun takes for convergence
            return Ending(Reason.STALLED, f"flat: every loss was {low:g} ({message})", best_loss, best_x)
        reason = Reason.STALLED if _FAILED & set(stopped) else Reason.CONVERGED
        return Ending(reason, message, best_loss, best_x)

    def _begin(self, x0: FloatArray, sigma: float, options: Mapping[str, Any]) -> Any:
        import cma

        with filters.changed("ignore"):  # pycma warns about options and flat losses; endings say the same
            try:
                return cma.CMAEvolutionStrategy(x0, sigma, dict(options))
            except (AssertionError, AttributeError, RecursionError, TypeError, ValueError) as error:
                if not self.extra:
                    raise
                raise MethodError(
                    f"{self.name}: pycma cannot begin with extra={dict(self.extra)!r}: "
                    f"{type(error).__name__} {error}".rstrip()
                ) from error

    def _inject(self, es: Any, points: FloatArray) -> None:
        """Let the first generation contain these points."""
        if len(self.initial) > len(points):
            raise MethodError(
                f"{self.name}: expected at most {len(points)} initial points, half of popsize={es.popsize}, got "
                f"{len(self.initial)}; give fewer, or raise popsize"
            )
        for x in points:
            es.inject([es.gp.geno(x, from_bounds=es.boundary_handler.inverse)], force=True)

    def _draws(self, start: Start) -> AbstractContextManager[None]:
        """What pycma is to be called within; 0.1 ms, so only where it draws from NumPy's global generator."""
        switches = not isinstance(self.diagonal, bool)
        return _OwnDraws(start.seed) if switches or start.integer is not None else contextlib.nullcontext()

    def _options(self, start: Start, random: Any, stds: FloatArray | None) -> dict[str, Any]:
        """What pycma is told in every run."""
        options: dict[str, Any] = {
            **dict(self.extra),
            "seed": math.nan,  # leaves NumPy's global generator alone; all draws come from randn
            "randn": random.randn,
            "tolfun": self.tolfun,
            "tolx": self.tolx,
            "CMA_diagonal": self.diagonal,
            "CMA_active": self.active,
            "verbose": -9,
            "verb_log": 0,
            "verb_disp": 0,
            "signals_filename": None,
        }
        if self.popsize is not None:
            options["popsize"] = self.popsize
        if self.maxiter is not None:
            options["maxiter"] = self.maxiter
        if stds is not None:
            options["CMA_stds"] = stds
        if start.bounded:
            options["bounds"] = [_sides(start.lower), _sides(start.upper)]
            if start.n == 1 and "maxstd" not in options:  # pycma 4.5 bails where it would limit the only one
                options["maxstd"] = math.inf
        if start.integer is not None:
            whole = start.integer if start.log is None else start.integer & ~start.log
            options["integer_variables"] = np.flatnonzero(whole).tolist()
            if start.n == 1 and whole.any():  # as above; negative = pycma leaves it to us
                options["minstd"] = -1.0
        return options

    def _spread(self, start: Start) -> tuple[float, FloatArray | None]:
        """Initial step size, and multipliers for it where weights differ."""
        if self.sigma is not None:
            return self.sigma, None
        if start.sigma is not None:
            c = start.covariance
            return start.sigma, None if c is None else np.sqrt(c if c.ndim == 1 else np.diag(c))
        width = start.upper - start.lower
        stds = np.where(np.isfinite(width), 0.3 * width, 0.5)
        if np.all(stds == stds[0]):
            return float(stds[0]), None
        return 1.0, stds


class _OwnDraws:
    """Puts a generator of the run's own, a function of its seed, in the place of NumPy's global one.

    Whatever `randn` is, pycma draws from that one to repair whole numbers, and everything once it has switched from
    variances to the whole covariance.
    """

    def __init__(self, seed: int) -> None:
        self._own = np.random.MT19937(derive_seed(seed, "cma"))
        self._found: tuple[Any, Any] = (None, None)

    def __enter__(self) -> None:
        self._found = _get_bit_generator(), np.random.get_state(legacy=False)
        _set_bit_generator(self._own)

    def __exit__(self, *_: object) -> None:
        bit_generator, state = self._found
        _set_bit_generator(bit_generator)
        np.random.set_state(state)  # with its cached normal number, which the line above forgets


class _Schedule:
    """Where, how wide and with how many points each run begins."""

    def __init__(self, method: CMAES, start: Start, sigma: float, random: Any) -> None:
        self._method = method
        self._start = start
        self._sigma = sigma
        self._random = random
        self._first = self._large = 0  # popsizes: of the first run, of the last large one
        self._spent = {"large": 0, "small": 0}
        self._kind: Literal["large", "small"] = "large"
        self.x0 = start.x0
        self.sigma = sigma
        self.changes: dict[str, Any] = {}
        """Options of the next run that differ from the first one's."""
        self.runs = 0

    def again(self, popsize: int, spent: int) -> bool:
        """Set up the next run; False if the one that ended was the last.

        Args:
            popsize: of the run that ended.
            spent: evaluations that it made.
        """
        if self._method.restarts == "none" or self.runs == self._method.max_restarts:
            return False
        if self.runs == 0:
            self._first = self._large = popsize
        else:  # the first run counts for neither (Hansen 2009, section 2)
            self._spent[self._kind] += spent
        self.runs += 1
        start, random = self._start, self._random
        if (np.isfinite(start.lower) & np.isfinite(start.upper)).all():
            self.x0 = start.lower + random.rand(start.n) * (start.upper - start.lower)
        else:
            self.x0 = start.clip(start.x0 + self._sigma * random.randn(start.n))
        small = self._method.restarts == "bipop" and self._spent["small"] < self._spent["large"]
        self._kind = "small" if small else "large"
        if small:
            u, v = random.rand(2)
            popsize = int(self._first * (0.5 * self._large / self._first) ** (u * u))
            self.sigma = self._sigma * 10 ** (-2 * v)
        else:
            self._large *= 2
            popsize, self.sigma = self._large, self._sigma
        self.changes = {"popsize": max(popsize, 2)}
        return True


def _sides(values: FloatArray) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]


def _keep(es: Any, floor: float) -> None:
    """Keep the standard deviation of a single weight from falling below `floor`; nothing is done where that is 0."""
    if floor > 0:
        es.sigma *= max(1.0, floor / float(es.stds[0]))


def _tell(es: Any, population: FloatArray, losses: FloatArray) -> None:
    """Tell pycma, with losses that are not finite ranked last: above the worst finite one of the generation."""
    finite = np.isfinite(losses)
    worst = float(losses[finite].max())
    told = np.where(finite, losses, worst + abs(worst) + 1.0)
    with filters.changed("ignore"):
        es.tell(list(population), told.tolist())
