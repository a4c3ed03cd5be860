"""A normal distribution over whole numbers that never settles on one of them for good (CMA-ES with Margin)."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr, ndtri

from hybridopt.coordinates import cells
from hybridopt.population._base import FloatArray
from hybridopt.start import Start


class Margin:
    """Keeps the probability of leaving the present whole number, in each coordinate that is one, above a limit.

    Hamano, Saito, Nomura & Shirakawa, "CMA-ES with Margin", GECCO 2022, section 4, with its limit alpha =
    1 / (n popsize): without it a distribution narrower than a cell draws one and the same number for ever.

    Args:
        start: which coordinates are whole numbers, and the box.
        scale: shape (n,): solver coordinates per search coordinate.
    """

    def __init__(self, start: Start, scale: FloatArray) -> None:
        assert start.integer is not None
        self.at = np.flatnonzero(start.integer)
        self._log = None if start.log is None else start.log[self.at]
        self._scale = scale[self.at]
        self._lower, self._upper = start.lower[self.at], start.upper[self.at]
        with np.errstate(invalid="ignore"):  # halves are rounded to even, perhaps out of the box
            off = 1e-9 * np.maximum(1.0, np.abs([self._lower, self._upper]))
            self._first = np.where(np.isfinite(self._lower), self._lower + off[0], -np.inf)
            self._last = np.where(np.isfinite(self._upper), self._upper - off[1], np.inf)

    def keep(self, mean: FloatArray, stds: FloatArray, popsize: int) -> tuple[FloatArray, FloatArray]:
        """Mean and factors for the standard deviations of the whole numbers, which keep the margin.

        Args:
            mean: shape (n,), in search coordinates.
            stds: shape (n,), standard deviations there.
            popsize: points a generation.

        Returns:
            The mean, shape (n,), and for each of `at` what its standard deviation is to be multiplied with.
        """
        alpha = 1 / (len(mean) * popsize)
        m, s = mean[self.at], stds[self.at]
        low, high = cells(np.clip(m * self._scale, self._first, self._last), self._log)
        first, last = low <= self._first, high >= self._last
        low, high = low / self._scale, high / self._scale

        # the outermost numbers: the mean may be so far from the one threshold that alpha lies beyond it (eq. 12)
        reach = -ndtri(alpha) * s
        near = np.where(first, high, low)
        outer = np.where(first, np.maximum(m, near - reach), np.minimum(m, near + reach))

        # elsewhere: both neighbours get alpha / 2 at least, and the sum stays 1 (eq. 17-20)
        below, above = ndtr((low - m) / s), ndtr((m - high) / s)
        raised = np.maximum([below, above], alpha / 2)
        rest = 1 - below - above
        excess = (1 - raised.sum(0) - rest) / (raised.sum(0) + rest - 1.5 * alpha)
        below, above = raised + excess * (raised - alpha / 2)
        # mean and deviation that have these probabilities (eq. 21-22); never far from a cell
        z_low, z_high = -ndtri(below), -ndtri(above)
        inner = (low * z_high + high * z_low) / (z_low + z_high)
        width = (high - low) / (z_low + z_high)

        short = (raised != ndtr(np.stack([low - m, m - high]) / s)).any(0)
        edge = first | last
        moved = mean.copy()
        moved[self.at] = np.where(edge, outer, np.where(short, inner, m))
        return moved, np.where(~edge & short, width / s, 1.0)
