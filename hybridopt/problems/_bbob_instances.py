"""What is random about a BBOB function: optimum, offset, rotations and peaks of instance 1, 2, 3, ...

The benchmark fixes its own generator of random numbers, so that every implementation draws the same instances:
Hansen, Finck, Ros, Auger, "Real-parameter black-box optimization benchmarking 2009: noiseless functions
definitions", INRIA RR-6829 (2009), and the legacy part of the COCO platform. `tests/problems/test_bbob.py` holds
the outcome to the package ioh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hybridopt.vector import FloatArray

_MODULUS = 2**31 - 1
_GLOBAL_PEAK = {21: (101, 1000**0.5, 10.0), 22: (21, 1000.0, 9.8)}
"""Of f21 and f22: how many peaks, how stretched the highest is, and the width of the cube they are drawn from."""


def uniform(n: int, seed: int) -> FloatArray:
    """Shape (n,), in (0, 1): a congruential generator whose output a table of 32 shuffles (Bays-Durham)."""
    state = max(abs(seed), 1)
    warm = []
    for _ in range(40):
        state = 16807 * state % _MODULUS
        warm.append(state)
    table = warm[:7:-1]  # the last 32, the latest first
    drawn, numbers = table[0], np.empty(n)
    for i in range(n):
        state = 16807 * state % _MODULUS
        slot = drawn // 67108865
        drawn, table[slot] = table[slot], state
        numbers[i] = drawn / _MODULUS or 1e-99
    return numbers


def normal(n: int, seed: int) -> FloatArray:
    """Shape (n,): standard normal numbers (Box-Muller, the cosine only)."""
    u = uniform(2 * n, seed)
    g: FloatArray = np.sqrt(-2 * np.log(u[:n])) * np.cos(2 * np.pi * u[n:])
    g[g == 0] = 1e-99
    return g


def rotation(d: int, seed: int) -> FloatArray:
    """An orthogonal matrix, shape (d, d): normal numbers, their columns orthonormalised one after the other.

    Sums run from the first number to the last, as in COCO, so that the matrix has the same bits.
    """
    columns = normal(d * d, seed).reshape(d, d)  # row i is column i of the result
    for i in range(d):
        for j in range(i):
            columns[i] -= np.cumsum(columns[i] * columns[j])[-1] * columns[j]
        columns[i] /= np.sqrt(np.cumsum(columns[i] ** 2)[-1])
    return columns.T.copy()


def offset(seed: int) -> float:
    """f_opt: a quotient of two normal numbers (Cauchy), two decimals, within ±1000."""
    quotient = normal(1, seed)[0] / normal(1, seed + 1)[0]
    return float(np.clip(np.floor(1e4 * quotient + 0.5) / 100, -1000, 1000))


@dataclass(frozen=True)
class Instance:
    """One instance of function `f` in `d` dimensions; tensors are float64 on the CPU."""

    f: int
    d: int
    instance: int

    @property
    def seed(self) -> int:
        """f4 and f18 share the draws of f3 and f17."""
        return {4: 3, 18: 17}.get(self.f, self.f) + 10000 * self.instance

    @cached_property
    def f_opt(self) -> float:
        """The lowest value."""
        return offset(self.seed)

    @cached_property
    def R(self) -> Tensor:  # noqa: N802 - the report's letter
        """The rotation drawn first; the draws tell the letters, which the report swaps for some functions."""
        return torch.from_numpy(rotation(self.d, self.seed + 1_000_000))

    @cached_property
    def Q(self) -> Tensor:  # noqa: N802
        """The rotation drawn second."""
        return torch.from_numpy(rotation(self.d, self.seed))

    @cached_property
    def zoom(self) -> float:
        """max(1, √d/8), which Rosenbrock's valley is stretched by."""
        return max(1.0, math.sqrt(self.d) / 8)

    @cached_property
    def x_opt(self) -> Tensor:
        """Where the lowest value is, shape (d,)."""
        if self.f in (9, 19):
            return self.Q.T @ torch.full((self.d,), 0.5, dtype=torch.float64) / self.zoom
        if self.f in _GLOBAL_PEAK:
            return self.peaks[2][0]
        if self.f == 20:
            return 4.2096874637 / 2 * torch.from_numpy(np.where(uniform(self.d, self.seed) < 0.5, -1.0, 1.0))
        if self.f == 24:
            return 1.25 * torch.from_numpy(np.sign(normal(self.d, self.seed)))
        x = 8 * np.floor(1e4 * uniform(self.d, self.seed + 1_000_000 * (self.f == 12))) / 1e4 - 4
        x[x == 0] = -1e-5
        if self.f == 4:
            x[::2] = abs(x[::2])
        elif self.f == 5:
            x = 5 * np.sign(x)
        elif self.f == 8:
            x *= 0.75
        return torch.from_numpy(x)

    @cached_property
    def peaks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of f21 and f22: heights, shape (m,), diagonals of the C_i, and places y_i, both shape (m, d)."""
        m, stretch, width = _GLOBAL_PEAK[self.f]
        heights = np.r_[10.0, 1.1 + 8 * np.arange(m - 1) / (m - 2)]
        order = np.argsort(uniform(m - 1, self.seed), kind="stable")
        conditions = np.r_[stretch, 1000 ** (order / (m - 2))]
        exponents = [
            np.argsort(uniform(self.d, self.seed + 1000 * i), kind="stable") / (self.d - 1) - 0.5
            for i in range(m)
        ]
        places = width * (uniform(m * self.d, self.seed).reshape(m, self.d) - 0.5)
        places[0] *= 0.8
        diagonals = conditions[:, None] ** np.array(exponents)
        return torch.from_numpy(heights), torch.from_numpy(diagonals), torch.from_numpy(places)
