"""Random bits for stochastic rounding, as a function of where and when: the same on every device, layout and engine.

An integer hash (two multiply-xorshift rounds with the constants of C. Wellons' `lowbias32`, 2018) of a key and the
element's index; the key comes from seed, step, tensor and column. Chosen over Philox because a step is bound by
memory, rounding needs 16 bits only, and 32-bit multiplications are cheap on every device.

Noise is added to the bits below the last one that is kept, which are then cut off. Below a bfloat16's a float32 has 16
bits, below a float16's 13, which get the upper ones of the noise; float16's smallest numbers (`NORMAL`) are a whole
number of spacings of 2**-24, of which 16 more bits are made.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

FIRST, SECOND, GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9
NORMAL, INFINITE = 0x38800000, 0x477FF000
"""Bits of a float32: 2**-14, from which on float16 has exponents; 65520, which float16 rounds to infinity."""
EXPONENTS, LARGEST = 0x38000000, 0x7BFF
"""By how much a float32's exponent is above a float16's, as bits of the float32; bits of 65504, float16's last."""
_MASK = 0xFFFFFFFF
Number = TypeVar("Number", int, Tensor)


def mix(x: Number) -> Number:
    """A bijection of 32-bit numbers (tensors of them are int64) that scatters neighbours."""
    x = ((x ^ (x >> 16)) * FIRST) & _MASK
    x = ((x ^ (x >> 15)) * SECOND) & _MASK
    return x ^ (x >> 16)


def key(seed: int, step: Number, tensor: int, column: int) -> Number:
    """The stream of one column (0 the weight, then the states) of one tensor at one step.

    A step count that is an int64 tensor on a device need not be fetched: the stream is one, too.
    """
    return mix((mix((mix((mix(seed & _MASK) + step) & _MASK) + tensor) & _MASK) + column) & _MASK)


def rounded(x: Tensor, dtype: torch.dtype, stream: int | Tensor, places: Tensor | None = None) -> Tensor:
    """float32 `x` as bfloat16 or float16, away from 0 with the probability that makes it right on average.

    Numbers that `dtype` has stay as they are; what float16 rounds to a finite number stays finite.

    `places`: the number of each element in its tensor; None = `x` is whole, and they follow each other in memory.
    """
    if places is None:
        flat = torch.as_strided(x, (x.numel(),), (1,))
        out = torch.empty_like(x, dtype=dtype)
        told = rounded(flat, dtype, stream, torch.arange(x.numel(), device=x.device))
        torch.as_strided(out, (x.numel(),), (1,)).copy_(told)
        return out
    noise = mix(mix(places & _MASK) ^ stream ^ ((places >> 32) * GOLDEN & _MASK)) & 0xFFFF
    bits = x.contiguous().view(torch.int32).to(torch.int64) & _MASK
    size = bits & 0x7FFFFFFF
    if dtype is torch.bfloat16:
        up = _float((bits + noise) & 0xFFFF0000)
        special = size >= 0x7F800000  # inf and nan have no neighbours to choose from
    else:
        high = ((size - EXPONENTS + (noise >> 3)) >> 13).clamp(max=LARGEST)
        low = ((_float(size) * 2.0**40).to(torch.int64) + noise) >> 16
        up = torch.where(size < NORMAL, low, high) - (bits >> 31 << 15)
        up = up.to(torch.int16).view(torch.float16)
        special = size >= INFINITE
    return torch.where(special, x.to(dtype), up.to(dtype))


def _float(bits: Tensor) -> Tensor:
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    return signed.to(torch.int32).view(torch.float32)
