"""Compiled loops for distributions over many weights: normal numbers, and what a generation teaches.

NumPy draws a normal number in about 10 ns, one after another, which for 1e5 weights is most of what a method costs.
Here several are drawn at once: a hash of the place instead of a generator's state, and formulas without branches
instead of a table. Plain arithmetic and square roots only, each rounded alone, so the bits are those of any machine.

Compiled from a copy in the cache folder (`engines._modules`), by `_large.py`; nothing imports this file itself.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

# `lowbias32` of C. Wellons (2018): two rounds of xorshift and multiplication scatter neighbouring numbers
_FIRST, _SECOND = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
_15, _16 = np.uint32(15), np.uint32(16)
_BLOCK = 1024

_compiled: Any = numba.njit(cache=True, nogil=True, error_model="numpy")


@_compiled  # type: ignore[untyped-decorator]
def _hash(first: int, key: int, out: Any) -> None:
    """Bits of the places `first`, `first + 1`, ... in the stream `key`."""
    for i in range(len(out)):
        x = np.uint32(first + i)
        for k in (np.uint32(0), key):
            x = np.uint32(x ^ k)
            x = np.uint32((x ^ (x >> _16)) * _FIRST)
            x = np.uint32((x ^ (x >> _15)) * _SECOND)
            x = np.uint32(x ^ (x >> _16))
        out[i] = x


@_compiled  # type: ignore[untyped-decorator]
def _box_muller(radius: Any, angle: Any, x: Any, y: Any) -> None:
    """Two independent normal numbers from two words of 32 bits (Box and Muller 1958)."""
    for i in range(len(x)):
        # u in (0, 1): the middles of 2^32 cells
        u = np.float64((np.float64(np.int32(radius[i])) + 2147483648.5) * 2.0**-32)
        bits = u.view(np.int64)
        exponent = np.float64(np.int32(bits >> 52) - 1023)
        m = np.int64((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).view(np.float64)  # in [1, 2)
        # log m = log sqrt 2 + 2 atanh s
        s = (m - 1.4142135623730951) / (m + 1.4142135623730951)
        w = s * s
        series = 1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13)))))
        log = (exponent + 0.5) * 0.6931471805599453 + 2 * s * (1 + w * series)
        r = math.sqrt(max(0.0, -2.0 * log))
        # 30 bits say where between -45 and 45 degrees, the other two which quarter
        v = (np.float64(np.int32(angle[i] << np.uint32(2))) + 2.0) * (2.0**-31 * 0.7853981633974483)
        q = v * v
        # Taylor's series; a division by each of their numbers in turn would take most of the time
        odd = 1 / 120 - q * (1 / 5040 - q * (1 / 362880 - q * (1 / 39916800)))
        sin = v * (1 - q * (1 / 6 - q * odd))
        even = 1 / 24 - q * (1 / 720 - q * (1 / 40320 - q * (1 / 3628800)))
        cos = 1 - q * (1 / 2 - q * even)
        r = -r if angle[i] & np.uint32(0x80000000) else r
        turned = angle[i] & np.uint32(0x40000000)
        x[i] = r * (sin if turned else cos)
        y[i] = r * (cos if turned else sin)


@_compiled  # type: ignore[untyped-decorator]
def normal(keys: Any, mean: Any, std: Any, out: Any, first: int, last: int) -> None:
    """Normal numbers into columns of `out`, shape (rows, n), of which each row has two keys, shape (rows, 2).

    `mean` and `std`, shape (n,), are added and multiplied in the same pass; empty = 0 and 1. `first` is a multiple of
    2048.
    """
    radius, angle = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
    rest = np.empty(2 * _BLOCK)
    for k in range(len(out)):
        row = out[k]  # contiguous, which the compiler does not see of out[k, begin:end]
        for begin in range(first, last, 2 * _BLOCK):
            _hash(begin // 2, keys[k, 0], radius)
            _hash(begin // 2, keys[k, 1], angle)
            part = row[begin : min(begin + 2 * _BLOCK, last)]
            whole = part if len(part) == 2 * _BLOCK else rest
            _box_muller(radius, angle, whole[:_BLOCK], whole[_BLOCK:])
            if len(part) < 2 * _BLOCK:
                part[:] = rest[: len(part)]
            if len(mean):
                m, s = mean[begin : begin + 2 * _BLOCK], std[begin : begin + 2 * _BLOCK]
                for i in range(len(part)):
                    part[i] = part[i] * s[i] + m[i]


@_compiled  # type: ignore[untyped-decorator]
def moments(
    x: Any, mu: Any, sigma: Any, weights: Any, sums: Any, squares: Any, first: int, last: int
) -> None:
    """Add to columns of `sums` and `squares`, shape (n,), those of w z and w z² over the rows of `x`.

    z = (x - mu) / sigma.
    """
    for begin in range(first, last, _BLOCK):  # what a block of columns sums up stays in the cache
        end = min(begin + _BLOCK, last)
        m, s = mu[begin:end], sigma[begin:end]
        a, b = sums[begin:end], squares[begin:end]
        for k in range(len(x)):
            row, weight = x[k][begin:end], weights[k]
            for i in range(len(m)):
                z = (row[i] - m[i]) / s[i]
                weighted = z * weight
                a[i] += weighted
                b[i] += weighted * z
