"""Normal numbers and their weighted moments: NumPy for few weights, compiled loops for many."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np

from hybridopt.engines._modules import load
from hybridopt.engines._translate import Untranslatable
from hybridopt.population._base import FloatArray

MANY = 4096
"""From so many weights on it is worth loading a compiler (2 s once a machine, then .3 s a process)."""


def fill_normal(rng: np.random.Generator, out: FloatArray) -> None:
    """Independent standard normal numbers into `out`, shape (rows, n), without gaps.

    From `MANY` weights on 3 instead of 10 ns each; `rng` then gives 64 bits for every row.
    """
    kernels = _kernels() if out.shape[1] >= MANY else None
    if kernels is None:
        rng.standard_normal(out=out)
    else:
        kernels.normal(rng.integers(2**32, size=(len(out), 2), dtype=np.uint32), out)


def weighted_moments(
    x: FloatArray, mu: FloatArray, sigma: FloatArray, weights: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Sums of `w z` and of `w z²` over the rows of `x`, z = (x - mu) / sigma: each of shape (n,).

    No temporary is larger than n. The noise is taken from the points, not kept: a point that was clipped to the bounds
    counts with the noise it really had. Compiled or not, the bits are the same.
    """
    first, second = np.zeros_like(mu), np.zeros_like(mu)
    kernels = _kernels() if len(mu) >= MANY else None
    if kernels is not None:
        kernels.moments(x, mu, sigma, weights, first, second)
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


@functools.cache
def _kernels() -> ModuleType | None:
    import numba  # loads slowly

    source = Path(__file__).with_name("_kernels.py").read_text()
    try:
        return load(source, "cpu", "numba", numba.__version__, np.__version__, kind="normal")
    except Untranslatable as error:
        warnings.warn(f"populations of many weights are drawn by NumPy: {error}", stacklevel=2)
        return None
