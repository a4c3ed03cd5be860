"""Search coordinates without bounds for a method that samples from a normal distribution."""

from __future__ import annotations

import math
from typing import overload

import numpy as np
import torch

from hybridopt.population._base import FloatArray
from hybridopt.rows import DeviceRows, Rows
from hybridopt.start import Start


class Space:
    """Maps a search without bounds onto the box: every point of the search is a point inside.

    Inside the box, further from a bound than a margin, the map is the identity times `scale`. Across a bound it is a
    parabola that touches the bound from within, and it mirrors what lies further out (Hansen's `BoundTransform` in
    pycma works alike, with another margin). A loss that falls towards a bound becomes one with a smooth minimum
    there, so no penalty is needed, and the distribution that is learnt is the one that was sampled.

    A whole number has no mirror: what lies beyond its bound stands for the outermost number, so it is clipped.

    Args:
        start: bounds and dtype limits, in solver coordinates.
        scale: shape (n,), positive: solver coordinates per search coordinate.
    """

    MARGIN = 0.05  # of the range; without a second bound, of 1 + |bound|

    def __init__(self, start: Start, scale: FloatArray) -> None:
        self.start = start
        self.scale = scale
        self.scaled, self.bounded = bool((scale != 1.0).any()), start.bounded
        lower, upper = start.lower, start.upper
        if start.integer is not None:
            lower, upper = np.where(start.integer, -np.inf, lower), np.where(start.integer, np.inf, upper)
        both = np.isfinite(upper - lower)
        self._margin_lower = self.MARGIN * np.where(both, upper - lower, 1 + np.abs(lower))
        self._margin_upper = self.MARGIN * np.where(both, upper - lower, 1 + np.abs(upper))
        with np.errstate(invalid="ignore"):  # inf - inf where there is no bound: never compared as true
            self._first = (
                lower - self._margin_lower
            )  # the search is mirrored here, where the bound is reached
            self._last = upper + self._margin_upper
            self._low = lower + self._margin_lower  # the identity between these
            self._high = upper - self._margin_upper

    @overload
    def inside(self, u: FloatArray) -> FloatArray: ...
    @overload
    def inside(self, u: Rows) -> Rows: ...
    def inside(self, u: Rows) -> Rows:
        """Search coordinates, shape (popsize, n), to solver coordinates within the bounds."""
        x = u * self.scale if self.scaled else u
        if not self.bounded:
            return x
        if isinstance(x, DeviceRows):
            return self._inside_there(x)
        if not self.scaled:
            x = x.copy()
        at = np.nonzero((x < self._first) | (x > self._last))
        if len(at[0]):
            first, last = self._first[at[1]], self._last[at[1]]
            below = np.isfinite(first)  # a side that there is to count from
            period = np.where(below & np.isfinite(last), last - first, np.inf)
            t = np.mod(np.abs(np.where(below, x[at] - first, last - x[at])), 2 * period)
            t = np.minimum(t, 2 * period - t)
            x[at] = np.where(below, first + t, last - t)
        at = np.nonzero(x < self._low)
        if len(at[0]):
            i = at[1]
            x[at] = self.start.lower[i] + (x[at] - self._first[i]) ** 2 / (4 * self._margin_lower[i])
        at = np.nonzero(x > self._high)
        if len(at[0]):
            i = at[1]
            x[at] = self.start.upper[i] - (self._last[i] - x[at]) ** 2 / (4 * self._margin_upper[i])
        # rounding cannot leave the box: a bound, moved inwards by a square
        return x if self.start.integer is None else self.start.clip(x)

    def _inside_there(self, x: DeviceRows) -> DeviceRows:
        """The rest of `inside`, everywhere instead of where it is needed; there are no whole numbers on a device."""
        first, last, low, high = map(x.beside, (self._first, self._last, self._low, self._high))
        margin_lower, margin_upper = x.beside(self._margin_lower), x.beside(self._margin_upper)
        lower, upper = x.beside(self.start.lower), x.beside(self.start.upper)
        below = torch.isfinite(first)
        period = torch.where(below & torch.isfinite(last), last - first, math.inf)
        inside = x.copy()
        for t in inside.tensor:  # a row at a time: it takes some ten times its memory
            far = torch.where(below, t - first, last - t).abs() % (2 * period)
            far = torch.minimum(far, 2 * period - far)
            t[:] = torch.where((t < first) | (t > last), torch.where(below, first + far, last - far), t)
            t[:] = torch.where(t < low, lower + (t - first) ** 2 / (4 * margin_lower), t)
            t[:] = torch.where(t > high, upper - (last - t) ** 2 / (4 * margin_upper), t)
        return inside

    def outside(self, x: FloatArray) -> FloatArray:
        """Search coordinates, shape (n,), of a point within the bounds."""
        u = x.copy()
        i = x < self._low
        u[i] = self._first[i] + np.sqrt(4 * self._margin_lower[i] * (x[i] - self.start.lower[i]))
        i = x > self._high
        u[i] = self._last[i] - np.sqrt(4 * self._margin_upper[i] * (self.start.upper[i] - x[i]))
        return u / self.scale
