"""Random bits for stochastic rounding, as a function of where and when: the same on every device, layout and engine.

An integer hash (two multiply-xorshift rounds with the constants of C. Wellons' `lowbias32`, 2018) of a key and the
element's index; the key comes from seed, step, tensor and column. Chosen over Philox because a step is bound by
memory, rounding needs 16 bits only, and 32-bit multiplications are cheap on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST, SECOND, GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9
_MASK = 0xFFFFFFFF


def mix(x: int) -> int:
    """A bijection of 32-bit numbers that scatters neighbours."""
    x = ((x ^ (x >> 16)) * FIRST) & _MASK
    x = ((x ^ (x >> 15)) * SECOND) & _MASK
    return x ^ (x >> 16)


def key(seed: int, step: int, tensor: int, column: int) -> int:
    """The stream of one column (0 the weight, then the states) of one tensor at one step."""
    return mix((mix((mix((mix(seed & _MASK) + step) & _MASK) + tensor) & _MASK) + column) & _MASK)


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * FIRST) & _MASK
    x = ((x ^ (x >> 15)) * SECOND) & _MASK
    return x ^ (x >> 16)


def rounded(x: Tensor, stream: int) -> Tensor:
    """float32 `x` as bfloat16, up with the probability that makes it right on average; in memory order."""
    index = torch.arange(x.numel(), device=x.device)
    noise = _mix(_mix(index & _MASK) ^ stream ^ ((index >> 32) * GOLDEN & _MASK)) & 0xFFFF
    flat = torch.as_strided(x, (x.numel(),), (1,)).contiguous()
    bits = flat.view(torch.int32).to(torch.int64) & _MASK
    up = (bits + noise) & 0xFFFF0000
    special = (bits & 0x7F800000) == 0x7F800000  # inf and nan have no neighbours to choose from
    told = torch.where(special, flat, _float(up))
    out = torch.empty_like(x, dtype=torch.bfloat16)
    torch.as_strided(out, (x.numel(),), (1,)).copy_(told)
    return out


def _float(bits: Tensor) -> Tensor:
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    return signed.to(torch.int32).view(torch.float32)
