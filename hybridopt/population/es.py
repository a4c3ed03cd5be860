"""Evolution strategies that estimate a gradient for any gradient optimizer: OpenAI-ES and PGPE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch

from hybridopt.errors import MethodError
from hybridopt.ledger import Reason
from hybridopt.optimizer import Answer, HandOver, Method
from hybridopt.options import check_options
from hybridopt.population._base import FloatArray, PopulationMethod, Strategy
from hybridopt.population._common import (
    end,
    handed,
    require_at_least,
    require_positive,
    share_by_rank,
    spread,
)
from hybridopt.population._large import Room, fill_mirrored, into_bounds, weighted_moments
from hybridopt.rows import Rows
from hybridopt.start import Ending, Start
from hybridopt.text import method as read_method
from hybridopt.vector import ParameterVector

USUAL = "adam(lr=0.05)"  # in units in which the standard deviations are at first ...
UNIT = 0.5  # ... as wide as this, so that steps are a tenth of them


def centered_ranks(popsize: int) -> FloatArray:
    """Weights from -1/2 for the lowest loss to 1/2 for the highest, shape (popsize,), sum 0."""
    return np.linspace(-0.5, 0.5, popsize)


@runtime_checkable
class _Updates(Protocol):
    """A method that works in place, by a torch optimizer."""

    @property
    def closure(self) -> bool:
        """Whether its step asks for several evaluations."""


@dataclass(frozen=True)
class _ES(PopulationMethod):
    """Options and checks that both share."""

    optimizer: str | Method | type | None = None
    sigma: float | None = None
    popsize: int | None = None
    patience: int = 100

    def __post_init__(self) -> None:
        if self.optimizer is not None:
            given = read_method(self.optimizer)
            if not isinstance(given, _Updates) or given.closure:
                raise MethodError(
                    f"{self.name}: expected one torch optimizer whose step takes one gradient, e.g. "
                    f"'adam(lr=0.05)', got {str(given)!r}"
                )
            object.__setattr__(self, "optimizer", str(given))
        check_options(self)
        require_positive(self, "sigma")
        require_at_least(self, popsize=2, patience=1)
        if self.popsize is not None and self.popsize % 2:
            raise MethodError(f"{self.name}: expected an even popsize (mirrored pairs), got {self.popsize!r}")

    def pairs(self, n: int) -> int:
        """Mirrored pairs a generation."""
        return 2 + int(1.5 * math.log(n)) if self.popsize is None else self.popsize // 2

    def memory(self, n: int) -> int:
        """Bytes of one generation, center, spread, units, an optimizer with two moments, and work copies."""
        return 8 * n * (2 * self.pairs(n) + 12)

    def updates(self, shapes: Sequence[tuple[int, ...]]) -> Method:
        """The optimizer of the center.

        Args:
            shapes: of the weights.

        Raises:
            MethodError: it cannot take a step with dense gradients of such weights.
        """
        chosen = read_method(USUAL if self.optimizer is None else self.optimizer)
        small = [torch.zeros([2] * dims, dtype=torch.float64) for dims in sorted(set(map(len, shapes)))]
        try:
            trial = chosen.start(ParameterVector(small), 0)
            for weight in small:
                weight.grad = torch.ones_like(weight)
            trial.tell(Answer(0.0))
        except (RuntimeError, ValueError) as error:
            raise MethodError(
                f"{self.name}: expected an optimizer that takes dense gradients of these weights, e.g. "
                f"'adam(lr=0.05)', got {str(chosen)!r} ({error})"
            ) from error
        return chosen


@dataclass(frozen=True)
class OpenAIES(_ES):
    """Estimates the gradient of the smoothed loss from mirrored pairs and gives it to a gradient optimizer.

    For many weights (thousands to millions) whose loss has no useful gradient: steps, noise, simulators. The loss is
    seen through a normal blur of fixed width `sigma`; for the last digits chain a method that adapts its spread
    (`SNES`, `PGPE`), which this one does not. One step is one generation: all its points can be evaluated at once. If
    the model is on a GPU, generations of 4096 weights or more are drawn and kept there, the same points as on the CPU.

    Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", 2017, Algorithm 1,
    with mirrored pairs and centered ranks in place of losses (its section 2.1), so that only the order of losses
    counts. We differ: equal losses share their ranks; the start is evaluated in the first generation, beside it; a
    point outside the bounds is clipped and counts with the noise it then has. Weight decay is the optimizer's.

    Args:
        optimizer: a gradient method in text (`"adam(lr=0.05)"`, `"sgd(lr=0.1, momentum=0.9)"`), a method, or a
            `torch.optim.Optimizer` class; it updates the center, in float64 and in solver coordinates, tensor by
            tensor as the model has them (norms of LAMB, matrices of Muon). A tenth of `sigma` is a good step for Adam
            and its like. None = Adam with such steps, weight by weight, whatever their ranges: `adam(lr=0.05)` in
            units in which sigma is 0.5.
        sigma: standard deviation in solver coordinates; None = handed over, or 0.3 × the range of each bounded
            weight, 0.5 for unbounded ones.
        popsize: points a generation, even; None = 4 + 2 ⌊1.5 ln n⌋.
        patience: stalled after this many generations in a row whose losses were all equal.

    Raises:
        MethodError: the optimizer is none of torch, needs a closure (LBFGS), sparse gradients (SparseAdam), or
            matrices where weights are none (Muon), or has limits of its own; another option is of the wrong type or
            sign.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.population import OpenAIES
        >>> f = lambda x: float(((x - 1) ** 2).sum())
        >>> r = hybridopt.minimize(f, np.zeros(3), OpenAIES(sigma=0.1), budget=1500, seed=1)
        >>> r.best_loss < 1e-2
        True
    """

    name: ClassVar[str] = "openai_es"

    def begin(self, start: Start, rng: np.random.Generator) -> Strategy:
        """See `PopulationMethod.begin`."""
        return _OpenAI(not math.isfinite(start.loss), 0, spread(start, self.sigma)).serve(self, start)


@dataclass(frozen=True)
class PGPE(_ES):
    """Like `OpenAIES`, but learns a standard deviation for each weight as well.

    For the same problems where the right width of the blur is unknown, differs between weights, or should shrink in
    the end. `SNES` learns the same distribution by natural gradients and has no optimizer to tune; take this one to
    profit from momentum and learning-rate rules.

    Sehnke et al., "Parameter-exploring Policy Gradients", Neural Networks 23, 2010, with symmetric sampling: the
    center's gradient is that of the ranks times sigma² (as the paper chooses its step size), so that steps of SGD
    shrink with sigma. We differ: centered ranks in place of rewards and their baseline; a generation changes a
    standard deviation by at most a fifth; and as in `OpenAIES`.

    Args:
        optimizer: see `OpenAIES`.
        sigma: initial standard deviation in solver coordinates; None = handed over, or 0.3 × the range of each
            bounded weight, 0.5 for unbounded ones.
        popsize: points a generation, even; None = 4 + 2 ⌊1.5 ln n⌋.
        lr_sigma: learning rate of the standard deviations, as a fraction of themselves.
        tolx: converged when the largest standard deviation is down to this, in solver coordinates.
        patience: stalled after this many generations in a row whose losses were all equal.

    Raises:
        MethodError: see `OpenAIES`.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.population import PGPE
        >>> f = lambda x: float(((x - 1) ** 2).sum())
        >>> r = hybridopt.minimize(f, np.zeros(3), PGPE("sgd(lr=5.0)", lr_sigma=0.5), budget=1500, seed=1)
        >>> r.best_loss < 1e-4
        True
    """

    name: ClassVar[str] = "pgpe"

    lr_sigma: float = 0.1
    tolx: float = 1e-11

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "lr_sigma")
        require_at_least(self, tolx=0)

    def begin(self, start: Start, rng: np.random.Generator) -> Strategy:
        """See `PopulationMethod.begin`."""
        return _PGPE(not math.isfinite(start.loss), 0, spread(start, self.sigma)).serve(self, start)


@dataclass
class _OpenAI(Strategy):
    """The fields, and the optimizer's own state beside them: its weights are the center."""

    fresh: bool
    """The start is still to be evaluated, beside the first generation."""
    idle: int
    """Generations in a row whose losses were all equal."""
    sigma: FloatArray
    """Standard deviation of each weight, shape (n,)."""

    def serve(self, method: _ES, start: Start) -> Strategy:
        """Take options and start, and begin the optimizer on a tensor of its own."""
        self.method, self.start, self.room = method, start, Room(start)
        self.unit: FloatArray | None = None  # of the optimizer's coordinates; None = those of the solver
        x0, bounds = start.x0, np.stack([start.lower, start.upper], axis=1)
        if method.optimizer is None and (self.sigma != UNIT).any():
            self.unit = self.sigma / UNIT
            x0, bounds = x0 / self.unit, bounds / self.unit[:, None]
        shapes = start.shapes or ((start.n,),)
        self.weights = [part.clone() for part in _views(torch.from_numpy(x0), shapes)]
        self.optimizer = method.updates(shapes).start(
            ParameterVector(self.weights, bounds=bounds), start.seed
        )
        return self

    @property
    def mu(self) -> FloatArray:
        """The center, shape (n,), in solver coordinates."""
        center: FloatArray = torch.cat([weight.reshape(-1) for weight in self.weights]).numpy()
        return center if self.unit is None else center * self.unit

    def ask(self, rng: np.random.Generator) -> Rows:
        """All mu + sigma z, then all mu - sigma z; before the first of them the start, unless its loss is known."""
        n, pairs = self.start.n, self.method.pairs(self.start.n)
        x = self.room.take(2 * pairs + self.fresh, n)
        if self.fresh:
            x[0] = self.start.x0
        fill_mirrored(rng, x[self.fresh :], self.mu, self.sigma)
        into_bounds(self.start, x)
        return x

    def tell(self, x: Rows, losses: FloatArray, rng: np.random.Generator) -> Ending | None:
        """One step of the optimizer, and see whether the end has come."""
        drawn, told = x[self.fresh :], losses[self.fresh :]
        self.fresh = False
        weights = share_by_rank(told, centered_ranks(len(told))) / len(told)
        first, second = weighted_moments(drawn, self.mu, self.sigma, weights)
        # gradients in the optimizer's units, with sigma in them
        slope = self.gradient(first, self.sigma if self.unit is None else self.sigma / self.unit)
        grads = _views(torch.from_numpy(slope), [weight.shape for weight in self.weights])
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = grad
        self.optimizer.tell(Answer(float(told.min())))
        self.adapt(second)
        self.idle = self.idle + 1 if told.min() == told.max() else 0
        if self.idle >= self.method.patience:
            return end(
                Reason.STALLED, f"all losses of {self.idle} generations in a row were equal", x, losses
            )
        if self.settled():
            return end(Reason.CONVERGED, "the largest standard deviation is down to tolx", x, losses)
        return None

    def favourite(self) -> FloatArray | None:
        """See `Strategy.favourite`: the center."""
        return self.start.clip(self.mu.copy())

    def hand_over(self) -> HandOver:
        """See `Strategy.hand_over`: the width of the blur."""
        return handed(self.sigma**2)

    def gradient(self, first: FloatArray, sigma: FloatArray) -> FloatArray:
        """The center's gradient from the mean of `w z`: of the loss blurred by sigma (section 2)."""
        return first / sigma

    def adapt(self, second: FloatArray) -> None:
        """Learn from the mean of `w z²`: nothing here."""

    def settled(self) -> bool:
        """Whether sigma has become as small as was asked for."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """The fields, and the optimizer with the center as its weights."""
        return super().state_dict() | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take both over."""
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])


def _views(flat: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The tensors of these shapes that follow each other in `flat`."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


@dataclass
class _PGPE(_OpenAI):
    """A center's gradient in the paper's scale, and standard deviations that are learnt."""

    def gradient(self, first: FloatArray, sigma: FloatArray) -> FloatArray:
        """The mean of `w epsilon`, epsilon = sigma z."""
        return first * sigma

    def adapt(self, second: FloatArray) -> None:
        """The mean of `w (z² - 1)`, w summing to 0: wider where wide points were better."""
        method = self.method
        assert isinstance(method, PGPE)
        self.sigma = self.sigma * (1 - np.clip(method.lr_sigma * second, -0.2, 0.2))

    def settled(self) -> bool:
        """See `_OpenAI.settled`."""
        method = self.method
        assert isinstance(method, PGPE)
        return float(self.sigma.max()) <= method.tolx
