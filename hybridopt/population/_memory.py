"""Points that a strategy remembers from generation to generation, and what becomes of losses that were lucky draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybridopt.optimizer import HandOver
from hybridopt.population._base import FloatArray, Strategy
from hybridopt.population._common import handed_points

# Mean log10 of the true excess loss after 2000 evaluations, d = 5, standard errors .06 to .3, PSO / DE, noise common to
# a generation. Losses remembered as drawn: constant noise -1.7 / -1.6, proportional to the loss -3.0 / -4.8, Rastrigin
# with both .5 / -.2, minibatches of a regression -.9 / -1.2, noise in the weights -.4 / -.5. As here: -3.0 / -7.1,
# -2.9 / -6.3, .2 / -1.9, -1.2 / -1.2, -.4 / -.3: a gain but where each point has a noise much its own. Luck of all four
# points, chosen ones too: -3.0 / -7.2, -2.8 / -6.6, .5 / -2.3, -1.3 / -1.0, -.3 / -.2; none taken off: -.6 / -.6,
# -2.7 / -5.5, .6 / -.2, -1.1 / -1.3, -.3 / -.2. Three or six points instead of four, or all: no better.
_AGAIN = 4  # remembered points that are evaluated again each generation
_LONG = 20  # evaluations that a remembered loss is the mean of, at most: older ones fade


@dataclass
class Remembering(Strategy):
    """A strategy that compares new points with those it remembers.

    With noisy losses a comparison is won by lucky draws, and a lucky draw that is kept wins all that follow. So four of
    the remembered points are evaluated again beside each generation: the best of those whose loss did not choose
    them, and the lowest of the others. The first loss told again takes the place of the one by which a point was
    chosen; further ones are averaged (the last 20 or so). Where the members of a generation draw the same random
    numbers, what those of the four that were evaluated again before have become higher by, on average, counts as luck
    of the whole generation: it is taken off all its losses. So a noise that is the same for all members is compared
    away, and one that is each member's own is averaged away. What is remembered is then good for comparisons only: the
    lowest losses sink, slowly, below what they really are.

    To spend further draws on those that may be the best is the idea of Bartz-Beielstein, Blum & Branke, "Particle Swarm
    Optimization and Sequential Sampling in Noisy Environments" (Metaheuristics, Springer 2007); here their number is
    fixed. To evaluate all remembered points again, at twice the price, was worse.
    """

    x: FloatArray
    """Remembered points, shape (k, n); without rows before the losses of the first ones are known."""
    losses: FloatArray
    """What is known of their losses, shape (k,); inf = rejected."""
    checks: npt.NDArray[np.int64]
    """How often each was evaluated again, shape (k,); 0 = its loss is the draw that chose it."""

    def favourite(self) -> FloatArray | None:
        """See `Strategy.favourite`: the lowest of those whose loss did not choose them."""
        return self.x[int(self.standing().argmin())] if len(self.x) else None

    def remembered(self) -> list[FloatArray]:
        """See `Strategy.remembered`: the lowest losses of the others."""
        return list(self.x[self._again()[1:]])

    def standing(self) -> FloatArray:
        """What a leader is the lowest of, shape (k,): losses; with noise ranks, in which unchecked losses come last."""
        if not self.checks.any():
            return self.losses
        unsure = (self.checks == 0) | ~np.isfinite(self.losses)
        ranks = np.empty(len(self.losses))
        ranks[np.lexsort((self.losses, unsure))] = np.arange(len(ranks))
        return ranks

    def correct(self, losses: FloatArray, paired: bool) -> float:
        """See `Strategy.correct`. A point that is rejected when told again keeps what is known of it."""
        if not len(self.x):  # all were rejected so far
            return 0.0
        again = self._again()
        before, checks = self.losses[again], self.checks[again]
        told = np.isfinite(losses)
        known = told & np.isfinite(before)
        unchosen = known & (checks > 0)  # of the others the loss grows because it was the lowest
        same = unchosen if unchosen.any() else known
        luck = float((losses[same] - before[same]).mean()) if paired and same.any() else 0.0
        after = np.where(told, losses - luck, before)
        after[known] = before[known] + (after[known] - before[known]) / (np.minimum(checks[known], _LONG) + 1)
        self.losses, self.checks = self.losses.copy(), self.checks.copy()
        self.losses[again], self.checks[again] = after, checks + told
        return luck

    def hand_over(self) -> HandOver:
        """See `Strategy.hand_over`: the remembered points; with noise the confirmed ones first, and no losses."""
        if not self.checks.any():
            return handed_points(self.x, self.losses)
        ranks = np.where(np.isfinite(self.losses), self.standing(), np.inf)
        return handed_points(self.x, ranks)._replace(losses=None)

    def _again(self) -> npt.NDArray[np.intp]:
        """Which are evaluated again: the favourite and then the lowest."""
        favourite = int(self.standing().argmin())
        order = np.argsort(self.losses, kind="stable")
        return np.concatenate([[favourite], order[order != favourite][: _AGAIN - 1]])
