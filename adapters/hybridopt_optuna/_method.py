"""Optuna's samplers as methods: the loss is a study's objective, each weight one of its parameters."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from hybridopt import filters
from hybridopt.errors import MethodError
from hybridopt.optimizer import HandOver, Need, Optimizer
from hybridopt.options import check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start
from hybridopt.vector import ParameterVector

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

FloatArray: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OptunaMethod(BlockingMethod):
    """A study in memory, whose sampler proposes the points. The base of `TPE` and `OptunaCMAES`.

    A subclass is a frozen dataclass with a `name` and `sampler`, for instance for a sampler of OptunaHub. The start is
    the first trial, and points handed over by a predecessor are trials that have ended. Weights are uniform in their
    box, or in that of their logarithms if they are `log`; those that are `integer` are whole numbers to the sampler,
    unless they are `log` besides. Losses that are not finite are pruned trials. It never ends by itself. Saved state
    holds the losses; the sampler is revived by proposing its points again.

    Args:
        batch: points asked for before any of them is told, so that their losses can be evaluated together.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})
    uses: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS, Need.POPULATION})
    takes: ClassVar[frozenset[str]] = frozenset({"points"})
    libraries: ClassVar[tuple[str, ...]] = ("optuna",)

    batch: int = 1

    def __post_init__(self) -> None:
        check_options(self)
        if not self.batch >= 1:
            raise MethodError(f"{self.name}: expected batch >= 1, got {self.batch!r}")

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """See `Method.start`.

        Raises:
            MethodError: Optuna is not installed.
        """
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise MethodError(
                f"{self.name}: expected Optuna ({error}); pip install 'torch-hybridopt[optuna]'"
            ) from error
        return super().start(vector, seed, warm)

    @abc.abstractmethod
    def sampler(self, seed: int) -> BaseSampler:
        """A new sampler, all of whose random numbers come from `seed`."""

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        import optuna

        space = _space(start)
        with _quiet():
            study = optuna.create_study(sampler=self.sampler(start.seed))
            study.enqueue_trial(_params(space, start.x0))
            if start.points is not None and start.losses is not None:
                for x, loss in zip(start.points, start.losses.tolist(), strict=True):
                    if math.isfinite(loss):
                        known = _params(space, x)
                        study.add_trial(optuna.create_trial(params=known, distributions=space, value=loss))
        while True:
            with _quiet():
                trials = [study.ask(space) for _ in range(self.batch)]
            x = start.clip(
                np.array([[trial.params[name] for name in space] for trial in trials], dtype=float)
            )
            losses = [ask.value(x[0])] if self.batch == 1 else ask.values(x).tolist()
            with _quiet():
                for trial, loss in zip(trials, losses, strict=True):
                    if math.isfinite(loss):
                        study.tell(trial, loss)
                    else:
                        study.tell(trial, state=optuna.trial.TrialState.PRUNED)


@dataclass(frozen=True)
class TPE(OptunaMethod):
    """Samples where good points are denser than bad ones (Bergstra et al. 2011), `optuna.samplers.TPESampler`.

    For few evaluations of expensive losses, whole numbers among the weights included. The time a point takes grows with
    the points known; with hundreds of evaluations CMA-ES finds more. Saved states
    take as long to revive as they took to make.

    Args:
        startup: random points before the densities are fitted.
        multivariate: fit the weights' densities together, not each on its own; None = as Optuna decides.
        candidates: points drawn from the density of good ones, of which the most promising is tried.
        batch: points asked for before any of them is told, so that their losses can be evaluated together.

    Raises:
        BoundsError: a weight has no finite bounds.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_optuna import TPE
        >>> f = lambda x: float(((x - 1) ** 2).sum())
        >>> r = hybridopt.minimize(f, np.zeros(2), TPE(), budget=60, bounds=(-2, 2), seed=1)
        >>> r.best_loss < 0.1
        True
    """

    name: ClassVar[str] = "optuna.tpe"

    startup: int = 10
    multivariate: bool | None = None
    candidates: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.startup >= 0 and self.candidates >= 1):
            raise MethodError(
                f"{self.name}: expected startup >= 0 and candidates >= 1, got {self.startup} and {self.candidates}"
            )

    def sampler(self, seed: int) -> BaseSampler:
        """See `OptunaMethod.sampler`."""
        import optuna

        return optuna.samplers.TPESampler(
            n_startup_trials=self.startup,
            multivariate=self.multivariate,
            n_ei_candidates=self.candidates,
            seed=seed,
        )


@dataclass(frozen=True)
class OptunaCMAES(OptunaMethod):
    """Optuna's `CmaEsSampler`, by the package `cmaes`; ours is `cmaes`, Hansen's own `cma.cmaes`.

    For comparisons with Optuna. It begins at the middle of the box with a sixth of its width for the step size, and
    it samples a single weight at random.

    Args:
        popsize: points a generation; None = 4 + 3 ln n.
        margin: keep every whole number in reach (CMA-ES with margin, Hamano et al. 2022).
        separable: learn variances only.
        batch: points asked for before any of them is told, so that their losses can be evaluated together.

    Raises:
        BoundsError: a weight has no finite bounds.
        MethodError: margin and separable together.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt_optuna import OptunaCMAES
        >>> f = lambda x: float(((x - 1) ** 2).sum())
        >>> r = hybridopt.minimize(f, np.zeros(3), OptunaCMAES(), budget=300, bounds=(-2, 2), seed=1)
        >>> r.best_loss < 1e-3
        True
    """

    name: ClassVar[str] = "optuna.cmaes"
    libraries: ClassVar[tuple[str, ...]] = ("optuna", "cmaes")

    popsize: int | None = None
    margin: bool = False
    separable: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.popsize is not None and not self.popsize >= 5:
            raise MethodError(f"{self.name}: expected popsize >= 5 or None, got {self.popsize!r}")
        if self.margin and self.separable:
            raise MethodError(f"{self.name}: expected margin or separable, got both")

    def sampler(self, seed: int) -> BaseSampler:
        """See `OptunaMethod.sampler`."""
        import optuna

        return optuna.samplers.CmaEsSampler(
            popsize=self.popsize, with_margin=self.margin, use_separable_cma=self.separable, seed=seed
        )


def _space(start: Start) -> dict[str, BaseDistribution]:
    """One parameter for each coordinate."""
    from optuna.distributions import FloatDistribution, IntDistribution

    whole = np.zeros(start.n, dtype=bool) if start.integer is None else start.integer
    if start.log is not None:
        whole = whole & ~start.log
    space: dict[str, BaseDistribution] = {}
    for i, (low, high) in enumerate(start.pairs()):
        # the outermost whole numbers have half a number of room beyond them
        space[f"x{i}"] = (
            IntDistribution(round(low + 0.5), round(high - 0.5)) if whole[i] else FloatDistribution(low, high)
        )
    return space


def _params(space: Mapping[str, BaseDistribution], x: FloatArray) -> dict[str, Any]:
    """A point as a trial's parameters."""
    from optuna.distributions import IntDistribution

    return {
        name: min(max(round(value), d.low), d.high) if isinstance(d, IntDistribution) else value
        for (name, d), value in zip(space.items(), x.tolist(), strict=True)
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's logging and its warnings about experimental options to itself; never while a loss is computed."""
    import optuna

    with filters.changed("ignore"):
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.CRITICAL)
        try:
            yield
        finally:
            optuna.logging.set_verbosity(level)
