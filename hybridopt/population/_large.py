"""Normal numbers and their weighted moments: NumPy for few weights, compiled loops for many, torch on a device."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from hybridopt.engines._modules import load
from hybridopt.engines._translate import Untranslatable
from hybridopt.engines.cpu import at_once
from hybridopt.population import _device
from hybridopt.population._base import FloatArray
from hybridopt.rows import DeviceRows, Rows
from hybridopt.start import Start

MANY = 4096
"""From so many weights on it is worth loading a compiler (2 s once a machine, then .3 s a process)."""
PARALLEL_FROM = 1 << 18  # numbers; below, waking a thread costs more than it saves
PIECE = 2048  # columns; of whole pieces a thread draws what one alone would
_NOTHING: FloatArray = np.empty(0)


def fill_normal(
    rng: np.random.Generator,
    out: Rows,
    mean: FloatArray | None = None,
    std: FloatArray | None = None,
) -> None:
    """Independent normal numbers into `out`, shape (rows, n), without gaps: standard ones, or of a mean and spread.

    From `MANY` weights on 3 instead of 10 ns each; `rng` then gives 64 bits for every row.
    """
    if isinstance(out, DeviceRows):
        _device.normal(_keys(rng, len(out)), mean, std, out)
        return
    kernels = _kernels() if out.shape[1] >= MANY else None
    if kernels is None:
        rng.standard_normal(out=out)
        if mean is not None and std is not None:
            out *= std
            out += mean
    else:
        given = (
            _keys(rng, len(out)),
            _NOTHING if mean is None else mean,
            _NOTHING if std is None else std,
            out,
        )
        _in_parts(out, lambda first, last: kernels.normal(*given, first, last))


def _keys(rng: np.random.Generator, rows: int) -> npt.NDArray[np.uint32]:
    return rng.integers(2**32, size=(rows, 2), dtype=np.uint32)


def fill_mirrored(rng: np.random.Generator, x: Rows, mean: FloatArray, std: FloatArray) -> None:
    """Normal numbers of a mean and spread into the first half of the rows, their mirror images into the second."""
    half = len(x) // 2
    fill_normal(rng, x[:half])
    if isinstance(x, DeviceRows):
        _device.mirror(x, mean, std)
        return
    plus, minus = x[:half], x[half:]
    plus *= std
    np.subtract(mean, plus, out=minus)
    plus += mean


def into_bounds(start: Start, x: Rows) -> None:
    """Bring all rows inside the bounds, in place."""
    if not start.bounded:
        return
    if isinstance(x, DeviceRows):
        x.clamp(start.lower, start.upper)
    else:
        np.clip(x, start.lower, start.upper, out=x)


def weighted_moments(
    x: Rows, mu: FloatArray, sigma: FloatArray, weights: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Sums of `w z` and of `w z²` over the rows of `x`, z = (x - mu) / sigma: each of shape (n,).

    No temporary is larger than n. The noise is taken from the points, not kept: a point that was clipped to the bounds
    counts with the noise it really had. Compiled or not, the bits are the same.
    """
    if isinstance(x, DeviceRows):
        return _device.moments(x, mu, sigma, weights)
    first, second = np.zeros_like(mu), np.zeros_like(mu)
    kernels = _kernels() if len(mu) >= MANY else None
    if kernels is not None:
        given = (x, mu, sigma, weights, first, second)
        _in_parts(x, lambda begin, end: kernels.moments(*given, begin, end))
        return first, second
    z, weighted = np.empty_like(mu), np.empty_like(mu)
    for row, weight in zip(x, weights, strict=True):
        np.subtract(row, mu, out=z)
        z /= sigma
        np.multiply(z, weight, out=weighted)
        first += weighted
        weighted *= z
        second += weighted
    return first, second


def _in_parts(x: FloatArray, run: Callable[[int, int], None]) -> None:
    """`run(first, last)` for all columns of `x`, by as many threads as torch uses; the bits do not depend on them."""
    n, threads = x.shape[1], torch.get_num_threads() if x.size >= PARALLEL_FROM else 1
    width = -(-n // (threads * PIECE)) * PIECE
    at_once([functools.partial(run, first, min(first + width, n)) for first in range(0, n, width)])


def drawn_on(start: Start) -> str | None:
    """The device on which generations are drawn: that of the model, if they are large; None = the host."""
    return start.device if start.n >= MANY else None


def empty(device: str | None, rows: int, n: int) -> Rows:
    """A matrix of shape (rows, n), whatever is in it."""
    if device is None:
        return np.empty((rows, n))
    return DeviceRows(torch.empty((rows, n), dtype=torch.float64, device=device))


class Room:
    """Memory of one generation after another: the last one's, unless somebody still holds it.

    Memory fresh from the operating system costs more than the numbers that are written there (1e6 weights, 45 points:
    1 s beside 0.3 s on a virtual machine). On a device, whose memory torch keeps at hand, it is new each time.

    Args:
        start: tells on which device the model lives; many weights are drawn there.
    """

    def __init__(self, start: Start) -> None:
        self._device = drawn_on(start)
        self._last: FloatArray = np.empty((0, 0))

    def take(self, rows: int, n: int) -> Rows:
        """A matrix of shape (rows, n) that nobody else holds, whatever is in it."""
        if self._device is not None:
            return empty(self._device, rows, n)
        if self._last.shape != (rows, n) or sys.getrefcount(self._last) > 2:  # ours, and the argument's
            self._last = np.empty((rows, n))
        return self._last


@functools.cache
def _kernels() -> ModuleType | None:
    import numba  # loads slowly

    source = Path(__file__).with_name("_kernels.py").read_text()
    try:
        return load(source, "cpu", "numba", numba.__version__, np.__version__, kind="normal")
    except Untranslatable as error:
        warnings.warn(f"populations of many weights are drawn by NumPy: {error}", stacklevel=2)
        return None
