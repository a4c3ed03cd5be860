"""What `_kernels.py` does, by torch's operations on the device of a model: the same numbers, to the bit.

Each operation rounds alone, as there, and sums are taken in the same order. So a seed gives the same points wherever
the model lives, which no device's own generator does (CUDA's depends on the number of multiprocessors).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridopt.rows import DeviceRows, FloatArray

_BLOCK = 1024
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)  # as int32, which wraps round as uint32 does
_AT_ONCE = 1 << 22  # numbers; what is computed on the way takes some ten times their memory


def normal(
    keys: npt.NDArray[np.uint32], mean: FloatArray | None, std: FloatArray | None, out: DeviceRows
) -> None:
    """Normal numbers into `out`, of which each row has two keys, shape (rows, 2); see `_kernels.normal`."""
    rows, n = out.shape
    blocks = -(-n // (2 * _BLOCK))
    places = torch.arange(blocks * _BLOCK, dtype=torch.int32, device=out.tensor.device)
    streams = out.beside(keys.view(np.int32))
    given = [] if mean is None or std is None else [out.beside(std), out.beside(mean)]
    step = max(1, _AT_ONCE // n)
    for first in range(0, rows, step):
        some = streams[first : first + step]
        pair = _box_muller(_hash(places, some[:, :1]), _hash(places, some[:, 1:]))
        halves = [one.view(len(some), blocks, 1, _BLOCK) for one in pair]
        drawn = torch.cat(halves, dim=2).view(len(some), -1)[:, :n]
        if given:
            drawn = drawn * given[0] + given[1]
        out.tensor[first : first + step] = drawn


def _hash(places: Tensor, key: Tensor) -> Tensor:
    """Bits of the places in the streams `key`, shape (rows, 1): int32, shape (rows, places)."""
    return _scattered(_scattered(places) ^ key)


def _scattered(x: Tensor) -> Tensor:
    """`lowbias32` of C. Wellons (2018)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST  # int32 shifts its sign in
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normal numbers from two words of 32 bits, line by line as in `_kernels._box_muller`."""
    bits = ((radius.double() + 2147483648.5) * 2.0**-32).view(torch.int64)
    exponent = ((bits >> 52) - 1023).double()
    m = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).view(torch.float64)
    s = (m - 1.4142135623730951) / (m + 1.4142135623730951)
    w = s * s
    series = 1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13)))))
    log = (exponent + 0.5) * 0.6931471805599453 + 2 * s * (1 + w * series)
    r = _root((-2.0 * log).clamp_(min=0.0))
    v = ((angle << 2).double() + 2.0) * (2.0**-31 * 0.7853981633974483)
    q = v * v
    odd = 1 / 120 - q * (1 / 5040 - q * (1 / 362880 - q * (1 / 39916800)))
    sin = v * (1 - q * (1 / 6 - q * odd))
    even = 1 / 24 - q * (1 / 720 - q * (1 / 40320 - q * (1 / 3628800)))
    cos = 1 - q * (1 / 2 - q * even)
    r = torch.where(angle < 0, -r, r)
    turned = (angle & 0x40000000) != 0
    return r * torch.where(turned, sin, cos), r * torch.where(turned, cos, sin)


def _root(x: Tensor) -> Tensor:
    """Rounded right, as a GPU's root of float64 is; torch's on the CPU (in 2.13) is one bit off for one in 60."""
    return x.sqrt() if x.is_cuda else torch.from_numpy(np.sqrt(x.numpy()))


def mirror(x: DeviceRows, mean: FloatArray, std: FloatArray) -> None:
    """Points of `std` times the first half of the rows about a mean, in their place; the second half, mirrored."""
    half, middle = len(x) // 2, x.beside(mean)
    plus = x.tensor[:half]
    plus *= x.beside(std)
    torch.sub(middle, plus, out=x.tensor[half:])
    plus += middle


def moments(
    x: DeviceRows, mu: FloatArray, sigma: FloatArray, weights: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Sums of `w z` and of `w z²` over the rows of `x`, each of shape (n,); see `_large.weighted_moments`."""
    m, s = x.beside(mu), x.beside(sigma)
    first, second = torch.zeros_like(m), torch.zeros_like(m)
    for row, weight in zip(x.tensor, weights.tolist(), strict=True):
        z = (row - m) / s
        weighted = z * weight
        first += weighted
        second += weighted * z
    return np.array(first.cpu().numpy()), np.array(second.cpu().numpy())
