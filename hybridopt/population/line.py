"""Global line searches along the coordinates: for losses that are sums of functions of one weight each, or nearly."""

from __future__ import annotations

import bisect
import heapq
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridopt.errors import MethodError
from hybridopt.ledger import Reason
from hybridopt.optimizer import Need
from hybridopt.options import check_options
from hybridopt.solver import Ask, BlockingMethod, Ending, Start


@dataclass(frozen=True)
class CoordinateSearch(BlockingMethod):
    """STEP along one coordinate after another, the others held at the best point.

    STEP ("select the easiest point", Swarzberg, Seront & Bersini 1994) is a global search of one variable: of all
    intervals between points seen it halves the one in which a parabola through its ends needs the least curvature to
    reach `gain` below the best value. So it looks everywhere, but more often where it is easy to get lower. Every other
    turn goes to the minimum of the parabola through the best point and its neighbours instead, as in Brent-STEP (Baudiš
    & Pošík, GECCO 2015), which closes in on a smooth minimum much faster. It finds the minimum of a separable loss
    with any number of local minima in some 30 to 100 evaluations a weight; where weights interact strongly it is a
    poor coordinate descent: use CMA-ES then. The searches take turns, an evaluation each, so that a small budget
    serves every coordinate; a coordinate is settled when no interval wider than `tolerance` is easy any more. Then all
    begin anew at the new point, until a sweep improves by less than `gain`.

    Args:
        separable: go on only if the loss is a sum of functions of one weight each: n + 1 more evaluations, probes, move
            each weight alone by a tenth of its range and then all of them, and where the changes do not add up (within
            1e-8 of them) the search ends as stalled. Default False.
        tolerance: narrowest interval, relative to the coordinate's range; default 1e-8.
        difficulty: curvature above which an interval is given up, in units of (range of the losses seen on the line) /
            (range of the coordinate)²; default 1e4.
        gain: how much better than the best a point must be to count, relative to the range of the losses seen on the
            line; default 1e-8.

    Raises:
        BoundsError: a weight without a finite lower and upper bound.

    Example:
        >>> import numpy as np, hybridopt
        >>> from hybridopt.population.line import CoordinateSearch
        >>> def loss(x):                             # 100 local minima in ±5, the lowest is 0 at (1.3, 1.3)
        ...     z = x - 1.3
        ...     return float((z**2 - 10 * np.cos(2 * np.pi * z) + 10).sum())
        >>> r = hybridopt.minimize(loss, np.zeros(2), CoordinateSearch(), budget=200, bounds=(-5, 5), seed=0)
        >>> r.best_loss < 1e-3
        True
    """

    name: ClassVar[str] = "coordinate_search"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})
    uses: ClassVar[frozenset[Need]] = frozenset({Need.BOUNDS})

    separable: bool = False
    tolerance: float = 1e-8
    difficulty: float = 1e4
    gain: float = 1e-8

    def __post_init__(self) -> None:
        check_options(self)
        for option in ("tolerance", "difficulty", "gain"):
            if not 0 < getattr(self, option) < math.inf:
                raise MethodError(
                    f"{self.name}: expected a positive finite {option}, got {getattr(self, option)!r}"
                )

    def solve(self, ask: Ask, start: Start) -> Ending:
        """See `BlockingMethod.solve`."""
        x = start.x0.copy()
        best = ask.value(x)
        if self.separable and not self._is_sum(ask, start, best):
            return Ending(Reason.STALLED, "the loss is no sum of functions of one weight", best, x)
        while True:
            before = best
            lines = [_Line(self, x[i], best, start.lower[i], start.upper[i]) for i in range(start.n)]
            while any(not line.settled for line in lines):
                for i, line in enumerate(lines):
                    if line.settled:
                        continue
                    trial = x.copy()
                    trial[i] = line.next()
                    loss = ask.value(trial)
                    shift = (
                        loss - best
                    )  # lines through other points differ by a constant if the loss is separable
                    line.add(trial[i], line.best + shift)
                    if loss < best:
                        x, best = trial, loss
            if not before - best > self.gain * max(line.spread for line in lines):
                return Ending(Reason.CONVERGED, "no coordinate can be improved alone", best, x)

    def _is_sum(self, ask: Ask, start: Start, loss: float) -> bool:
        """Whether what moving each weight alone changes adds up to what moving all of them changes."""
        middle = (start.lower + start.upper) / 2
        moved = start.x0 + np.where(start.x0 < middle, 0.1, -0.1) * (start.upper - start.lower)
        alone = np.where(np.eye(start.n, dtype=bool), moved, start.x0)
        changes = [ask.value(x, probe=True) - loss for x in alone]
        together = ask.value(moved, probe=True) - loss
        return abs(together - sum(changes)) <= 1e-8 * (abs(loss) + sum(map(abs, changes)))


class _Line:
    """One coordinate's points, sorted, and its intervals by difficulty."""

    def __init__(self, method: CoordinateSearch, x: float, loss: float, lower: float, upper: float) -> None:
        self.method = method
        self.lower, self.width = lower, upper - lower
        self.x = [x]
        self.losses = [loss]
        self.best = loss
        self._bent = False  # whether the last point was a parabola's minimum
        self._ends = [end for end in (lower, upper) if end != x]
        self._heap: list[tuple[float, float, float]] = []
        self.spread = 0.0
        """Range of the losses seen."""

    @property
    def settled(self) -> bool:
        """Whether no interval is worth another point."""
        return not self._ends and not self._heap

    def next(self) -> float:
        """Where to look: first the ends, then in turn the middle of the easiest interval and a parabola's minimum."""
        if self._ends:
            return self._ends[0]
        lowest = None if self._bent else self._parabola()
        if lowest is not None:
            return lowest
        _, left, right = self._heap[0]
        return (left + right) / 2

    def _parabola(self) -> float | None:
        """The minimum of the parabola through the lowest point and its neighbours, unless it is too near to one."""
        k = int(np.argmin(self.losses))
        if not 0 < k < len(self.x) - 1:
            return None
        (a, b, c), (p, q, r) = self.x[k - 1 : k + 2], self.losses[k - 1 : k + 2]
        right, left = (b - a) * (q - r), (b - c) * (q - p)
        if not (math.isfinite(right) and math.isfinite(left) and right != left):
            return None
        at = b - ((b - a) * right - (b - c) * left) / (2 * (right - left))
        apart = min(abs(at - x) for x in (a, b, c))
        return at if a < at < c and apart > self.method.tolerance * self.width else None

    def add(self, x: float, loss: float) -> None:
        """Learn the loss of the point that `next` named."""
        at = bisect.bisect(self.x, x)
        if self._ends:
            self._ends.pop(0)
        else:
            self._bent = not self._bent and x != (self._heap[0][1] + self._heap[0][2]) / 2
            self._heap = [interval for interval in self._heap if interval[1] != self.x[at - 1]]
            heapq.heapify(self._heap)
        self.x.insert(at, x)
        self.losses.insert(at, loss)
        best, spread = min(self.best, loss), max(self.spread, self._height(loss))
        if self._ends:
            self.best, self.spread = best, spread
        elif (best, spread) != (self.best, self.spread) or len(self.x) <= 3:
            self.best, self.spread, self._heap = best, spread, []
            for left in range(len(self.x) - 1):
                self._offer(left)
        else:
            self._offer(at - 1)
            self._offer(at)

    def _height(self, loss: float) -> float:
        """The range of the losses seen, `loss` included."""
        finite = [value for value in (*self.losses, loss) if math.isfinite(value)]
        return max(finite) - min(finite) if finite else 0.0

    def _offer(self, left: int) -> None:
        """The interval right of a point, if it is wide and easy enough."""
        a, b = self.x[left], self.x[left + 1]
        if b - a > self.method.tolerance * self.width:
            difficulty = self._difficulty(b - a, self.losses[left], self.losses[left + 1])
            if difficulty <= self.method.difficulty:
                heapq.heappush(self._heap, (difficulty, a, b))

    def _difficulty(self, width: float, a: float, b: float) -> float:
        """Curvature of the parabola through both ends that just reaches the goal, in units of the whole line.

        With p, q the heights of the ends above the goal it is (sqrt(p) + sqrt(q))² / width².
        """
        spread = self.spread or 1.0
        goal = self.best - self.method.gain * spread
        worst = (1 + self.method.gain) * spread  # a loss that is not finite counts as the highest seen
        p, q = (min(v - goal, worst) for v in (a, b))
        return float((math.sqrt(p / spread) + math.sqrt(q / spread)) ** 2 * (self.width / width) ** 2)
