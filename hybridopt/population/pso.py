"""Particle swarm optimization with constriction (Clerc & Kennedy, IEEE Trans. Evol. Comp. 6(1), 2002)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from hybridopt.errors import MethodError
from hybridopt.ledger import Reason
from hybridopt.optimizer import Need
from hybridopt.options import check_options
from hybridopt.population._base import FloatArray, PopulationMethod, Strategy
from hybridopt.population._common import agree, end, first_points, require_at_least
from hybridopt.population._memory import Remembering
from hybridopt.start import Ending, Start


@dataclass(frozen=True)
class PSO(PopulationMethod):
    """A swarm in a box: each particle is drawn to the best point it has seen itself and to the best of its neighbours.

    For multimodal losses of up to some dozen weights in a box, and where evaluations are cheap and can be made many at
    once. With smooth losses CMA-ES needs fewer of them. One step is one sweep: all particles move, then all
    are evaluated (a synchronous swarm).

    Kennedy & Eberhart 1995 with the constriction coefficients of Clerc & Kennedy 2002 (chi = 0.7298, phi = 2 × 2.05),
    written as inertia. 40 particles as in the field's standard of 2011 (Clerc, "Standard PSO"). A particle that
    meets a wall stays there and loses its velocity in that weight. We differ: the start is one of the first
    particles; a particle that only saw rejected points follows its neighbours alone.

    With noisy losses (and under `keep="last"`) four of the particles' best points are evaluated again with each sweep,
    which then is that many evaluations more, and their losses corrected, so that no lucky draw is remembered for long;
    a point leads others only when a second draw has confirmed it (see `Remembering` in `population/_memory.py`). A
    lucky draw still counts as an improvement, so `patience` hardly ever ends a noisy run: its budget does.

    Args:
        swarmsize: particles; one step is that many evaluations (4 more with noisy losses).
        omega: inertia, the share of its velocity that a particle keeps.
        phip, phig: largest pull towards a particle's own and its neighbours' best point.
        topology: who is a neighbour: everybody ("global", faster), or the two next particles in a ring ("ring",
            slower to settle: for many minima and many evaluations).
        walls: at a bound a particle's velocity is set to 0 ("absorb") or kept ("keep", as pyswarm does).
        tolfun: converged when the particles' best losses differ by less than this × max(1, |lowest|).
        patience: stalled after this many sweeps in which no particle improved on its own best.

    Raises:
        BoundsError: a weight has no finite bounds.
        MethodError: an option of the wrong type or sign.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.population import PSO
        >>> f = lambda x: float((x**2).sum())
        >>> r = hybridopt.minimize(f, np.ones(2), PSO(), budget=2000, bounds=(-2, 2), seed=0)
        >>> r.best_loss < 1e-6
        True
    """

    name: ClassVar[str] = "pso"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})
    takes: ClassVar[frozenset[str]] = frozenset({"points"})

    swarmsize: int = 40
    omega: float = 0.7298  # chi = 2 / |2 - phi - sqrt(phi² - 4 phi)|, phi = 4.1
    phip: float = 1.49618  # chi × 2.05
    phig: float = 1.49618
    topology: Literal["global", "ring"] = "global"
    walls: Literal["absorb", "keep"] = "absorb"
    tolfun: float = 1e-11
    patience: int = 100

    def __post_init__(self) -> None:
        check_options(self)
        require_at_least(self, swarmsize=2, tolfun=0, patience=1)
        for option in ("omega", "phip", "phig"):
            if not 0 <= (value := getattr(self, option)) < np.inf:
                raise MethodError(f"{self.name}: expected a finite {option} >= 0, got {value!r}")

    def memory(self, n: int) -> int:
        """Bytes of positions, velocities, best points, and work copies."""
        return 64 * self.swarmsize * n

    def begin(self, start: Start, rng: np.random.Generator) -> Strategy:
        """See `PopulationMethod.begin`."""
        none = np.empty((0, start.n))
        return _Swarm(none, np.empty(0), np.empty(0, int), none, none, 0).serve(self, start)


@dataclass
class _Swarm(Remembering):
    """Each particle remembers the best point that it has seen; the loss is inf where all were rejected."""

    at: FloatArray
    """Positions, shape (swarmsize, n); without rows before the first sweep."""
    v: FloatArray
    """Velocities: weights a sweep."""
    idle: int
    """Sweeps since a particle improved."""

    def serve(self, method: PSO, start: Start) -> Strategy:
        """Take the options and the start, from which no state follows."""
        self.method, self.start = method, start
        return self

    def ask(self, rng: np.random.Generator) -> FloatArray:
        """Move the swarm; the first time, place it."""
        method, start = self.method, self.start
        lower, upper = start.lower, start.upper
        shape = (method.swarmsize, start.n)
        if not len(self.losses):
            self.at = first_points(start, method.swarmsize, rng)
            self.v = (lower + rng.random(shape) * (upper - lower) - self.at) / 2  # Clerc's half-difference
            return self.at
        leader = self.x[self._leaders()]
        own = np.where(np.isfinite(self.losses)[:, None], self.x, leader)
        v = (
            method.omega * self.v
            + method.phip * rng.random(shape) * (own - self.at)
            + method.phig * rng.random(shape) * (leader - self.at)
        )
        moved = self.at + v
        # Share of targets reached on the 24 BBOB functions within 50 d / 200 d / 1000 d evaluations, d = 10: absorbed
        # .11 / .16 / .30, kept .10 / .14 / .20, reflected .06 / .11 / .28 (d = 2 and 5: absorbed best or equal).
        self.at = np.clip(moved, lower, upper)
        self.v = np.where(self.at == moved, v, 0.0) if method.walls == "absorb" else v
        return self.at

    def _leaders(self) -> npt.NDArray[np.intp]:
        """Which particle has the best point among each one's neighbours and itself, shape (swarmsize,)."""
        losses = self.standing()
        size = len(losses)
        if self.method.topology == "global":
            return np.full(size, np.argmin(losses))
        ring = np.stack([np.roll(losses, 1), losses, np.roll(losses, -1)])
        leaders: npt.NDArray[np.intp] = (np.arange(size) + ring.argmin(axis=0) - 1) % size
        return leaders

    def tell(self, x: FloatArray, losses: FloatArray, rng: np.random.Generator) -> Ending | None:
        """Remember each particle's best point."""
        if not len(self.losses):
            self.x, self.losses, self.checks = x, losses, np.zeros(len(losses), int)
            return None
        better = losses < self.losses
        self.x = np.where(better[:, None], x, self.x)
        self.losses = np.where(better, losses, self.losses)
        self.checks = np.where(better, 0, self.checks)
        self.idle = 0 if better.any() else self.idle + 1
        if agree(self.losses, self.method.tolfun):
            message = "the best losses of all particles agree within tolfun"
            return end(Reason.CONVERGED, message, self.x, self.losses)
        if self.idle >= self.method.patience:
            message = f"no particle improved in {self.idle} sweeps"
            return end(Reason.STALLED, message, self.x, self.losses)
        return None
