"""Points that a strategy remembers from generation to generation, and what becomes of losses that were lucky draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybridopt.population._base import FloatArray, Strategy

# True loss of the point named, as a share of what it is with losses remembered as drawn; geometric means over noisy
# sphere, Rosenbrock and Rastrigin functions and logistic regression, d = 5 and 10, 15 seeds, for PSO / PSO in a ring /
# DE: after 200 d evaluations .69 / .89 / .39, after 1000 d .05 / .27 / .0008. The latter by kinds of noise: constant,
# each draw its own .97 / 1.02 / 1.23; proportional to the loss, each its own .002 / .28 / .0003; minibatches in common
# .6 / 1.0 / .9. Three, four or six points: no difference beyond the errors. All points instead (d = 5, 6 seeds): PSO
# 1.2, DE .01, where four give .1 and .002.
_AGAIN = 4  # remembered points that are evaluated again each generation
_LONG = 20  # evaluations that a remembered loss is the mean of, at most: older ones fade


@dataclass
class Remembering(Strategy):
    """A strategy that compares new points with those it remembers.

    With noisy losses a comparison is won by lucky draws, and a lucky draw that is kept wins all that follow. So four of
    the remembered points are evaluated again beside each generation: the best of those whose loss did not choose
    them, and the lowest of the others. The first loss told again takes the place of the one by which a point was
    chosen; further ones are averaged (the last 20 or so). Where the members of a generation draw the same random
    numbers, what the four have become higher by, on average, is luck of the whole generation: it is taken off
    all its losses. So a noise that is the same for all members is compared away, and one that is each member's own
    is averaged away.

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
        """See `Strategy.correct`."""
        again = self._again()
        before, checks = self.losses[again], self.checks[again]
        known = np.isfinite(before) & np.isfinite(losses)
        luck = float((losses[known] - before[known]).mean()) if paired and known.any() else 0.0
        after = losses - luck
        after[known] = before[known] + (after[known] - before[known]) / (np.minimum(checks[known], _LONG) + 1)
        self.losses, self.checks = self.losses.copy(), self.checks.copy()
        self.losses[again], self.checks[again] = after, checks + 1
        return luck

    def _again(self) -> npt.NDArray[np.intp]:
        """Which are evaluated again: the favourite and then the lowest."""
        favourite = int(self.standing().argmin())
        order = np.argsort(self.losses, kind="stable")
        return np.concatenate([[favourite], order[order != favourite][: _AGAIN - 1]])
