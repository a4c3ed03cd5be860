"""The 35 least-squares problems of Moré, Garbow and Hillstrom.

Source: "Testing unconstrained optimization software", ACM TOMS 7(1), 17-41, 1981 (definitions, starts, minima);
in Gulf's residuals (11) the factor m·i that is printed there and that its own minimum contradicts is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hybridopt.problems._problem import Problem, ProblemError

Residuals = Callable[[Tensor], Tensor]


class _Entry(NamedTuple):
    residuals: Residuals
    start: list[float]
    minima: tuple[float, ...]  # of the sum of squares, as in the paper


_SET: dict[int, _Entry] = {}


def mgh(seed: int = 42, *, number: int = 1) -> Problem:
    """A problem of the set of Moré, Garbow and Hillstrom (1981), float64, from its standard start.

    `residuals` takes points of shape (..., n) and returns r, shape (..., m). `loss` is |r|²/2, as least-squares
    methods count it; the paper's f is |r|², so `best_known` and `minima` are half of its values. A run that ends at
    any of `minima` has solved the problem (two of them, of 8 and 15, lie at infinity).

    Args:
        seed: has no effect; the start is the paper's.
        number: 1 to 35, as in the paper. Where it leaves n open: 20 has n = 6, 22 n = 12, 35 n = m = 8, the
            others n = 10; m = 10 in 6 and 12, 99 in 11, 20 in 16 and 32 to 34, 13 in 18.

    Raises:
        ProblemError: there is no such number.

    Example:
        >>> from hybridopt.problems import mgh
        >>> problem = mgh(number=2)
        >>> problem.description
        'freudenstein_roth: 2 weights, 2 residuals (Moré, Garbow, Hillstrom 2)'
        >>> problem.loss(problem.target).item(), problem.best_known, problem.minima
        (200.25, 0.0, (0.0, 24.492126839...))
    """
    if number not in _SET:
        raise ProblemError(f"mgh: expected number to be a whole number from 1 to 35, got {number!r}")
    residuals, start, minima = _SET[number]
    target = torch.tensor(start, dtype=torch.float64)
    m, name = len(residuals(target)), residuals.__name__.strip("_")
    halves = tuple(f / 2 for f in minima)
    return Problem(
        name=f"mgh(number={number})",
        loss=partial(_half_square, residuals=residuals),
        target=target,
        best_known=min(halves),
        minima=halves,
        residuals=residuals,
        description=f"{name}: {len(start)} weights, {m} residuals (Moré, Garbow, Hillstrom {number})",
    )


def _half_square(x: Tensor, *, residuals: Residuals) -> Tensor:
    return (residuals(x) ** 2).sum(-1) / 2


def _problem(number: int, start: list[float], *minima: float) -> Callable[[Residuals], Residuals]:
    def enter(residuals: Residuals) -> Residuals:
        _SET[number] = _Entry(residuals, start, minima)
        return residuals

    return enter


def _tensor(numbers: str) -> Tensor:
    return torch.tensor([float(number) for number in numbers.split()], dtype=torch.float64)


def _range(first: int, last: int) -> Tensor:
    """The whole numbers first, ..., last."""
    return torch.arange(first, last + 1, dtype=torch.float64)


def _columns(x: Tensor) -> list[Tensor]:
    """x_1, ..., x_n, each of shape (..., 1), so that they meet data of shape (m,)."""
    return list(torch.split(x, 1, dim=-1))


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_{i-1} and x_{i+1} for every i, where x_0 = x_{n+1} = 0."""
    wide = torch.nn.functional.pad(x, (1, 1))
    return wide[..., :-2], wide[..., 2:]


# ---- 1 to 19: n is given ----


@_problem(1, [-1.2, 1], 0)
def rosenbrock(x: Tensor) -> Tensor:
    x1, x2 = _columns(x)
    return torch.cat([10 * (x2 - x1**2), 1 - x1], -1)


@_problem(2, [0.5, -2], 0, 48.984253679240013)
def freudenstein_roth(x: Tensor) -> Tensor:
    x1, x2 = _columns(x)
    return torch.cat([-13 + x1 + ((5 - x2) * x2 - 2) * x2, -29 + x1 + ((x2 + 1) * x2 - 14) * x2], -1)


@_problem(3, [0, 1], 0)
def powell_badly_scaled(x: Tensor) -> Tensor:
    x1, x2 = _columns(x)
    return torch.cat([1e4 * x1 * x2 - 1, torch.exp(-x1) + torch.exp(-x2) - 1.0001], -1)


@_problem(4, [1, 1], 0)
def brown_badly_scaled(x: Tensor) -> Tensor:
    x1, x2 = _columns(x)
    return torch.cat([x1 - 1e6, x2 - 2e-6, x1 * x2 - 2], -1)


@_problem(5, [1, 1], 0)
def beale(x: Tensor) -> Tensor:
    x1, x2 = _columns(x)
    return _tensor("1.5 2.25 2.625") - x1 * (1 - torch.cat([x2, x2**2, x2**3], -1))


@_problem(6, [0.3, 0.4], 124.36218235561473)
def jennrich_sampson(x: Tensor) -> Tensor:
    x1, x2 = _columns(x)
    i = _range(1, 10)
    return 2 + 2 * i - (torch.exp(i * x1) + torch.exp(i * x2))


@_problem(7, [-1, 0, 0], 0)
def helical_valley(x: Tensor) -> Tensor:
    x1, x2, x3 = _columns(x)
    turn = torch.atan(x2 / x1) / (2 * torch.pi) + torch.where(x1 < 0, 0.5, 0.0)
    return torch.cat([10 * (x3 - 10 * turn), 10 * (torch.hypot(x1, x2) - 1), x3], -1)


_BARD = _tensor(".14 .18 .22 .25 .29 .32 .35 .39 .37 .58 .73 .96 1.34 2.10 4.39")


@_problem(8, [1, 1, 1], 8.2148773065789700e-3, 17.428693333333333)
def bard(x: Tensor) -> Tensor:
    x1, x2, x3 = _columns(x)
    u = _range(1, 15)
    v = 16 - u
    return _BARD - (x1 + u / (v * x2 + torch.minimum(u, v) * x3))


_GAUSS = _tensor(".0009 .0044 .0175 .0540 .1295 .2420 .3521 .3989 .3521 .2420 .1295 .0540 .0175 .0044 .0009")


@_problem(9, [0.4, 1, 0], 1.1279327696186e-8)
def gaussian(x: Tensor) -> Tensor:
    x1, x2, x3 = _columns(x)
    t = (8 - _range(1, 15)) / 2
    return x1 * torch.exp(-x2 * (t - x3) ** 2 / 2) - _GAUSS


_MEYER = _tensor("34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872")


@_problem(10, [0.02, 4000, 250], 87.945855170395)
def meyer(x: Tensor) -> Tensor:
    x1, x2, x3 = _columns(x)
    t = 45 + 5 * _range(1, 16)
    return x1 * torch.exp(x2 / (t + x3)) - _MEYER


@_problem(11, [5, 2.5, 0.15], 0)
def gulf(x: Tensor) -> Tensor:
    x1, x2, x3 = _columns(x)
    t = _range(1, 99) / 100
    y = 25 + (-50 * torch.log(t)) ** (2 / 3)
    return torch.exp(-((y - x2).abs() ** x3) / x1) - t


@_problem(12, [0, 10, 20], 0)
def box(x: Tensor) -> Tensor:
    x1, x2, x3 = _columns(x)
    t = _range(1, 10) / 10
    return torch.exp(-t * x1) - torch.exp(-t * x2) - x3 * (torch.exp(-t) - torch.exp(-10 * t))


@_problem(13, [3, -1, 0, 1], 0)
def powell_singular(x: Tensor) -> Tensor:
    x1, x2, x3, x4 = _columns(x)
    return torch.cat([x1 + 10 * x2, 5**0.5 * (x3 - x4), (x2 - 2 * x3) ** 2, 10**0.5 * (x1 - x4) ** 2], -1)


@_problem(14, [-3, -1, -3, -1], 0)
def wood(x: Tensor) -> Tensor:
    x1, x2, x3, x4 = _columns(x)
    valleys = [10 * (x2 - x1**2), 1 - x1, 90**0.5 * (x4 - x3**2), 1 - x3]
    return torch.cat([*valleys, 10**0.5 * (x2 + x4 - 2), (x2 - x4) / 10**0.5], -1)


_KOWALIK = _tensor(".1957 .1947 .1735 .1600 .0844 .0627 .0456 .0342 .0323 .0235 .0246")
_KOWALIK_U = _tensor("4 2 1 .5 .25 .167 .125 .1 .0833 .0714 .0625")


@_problem(15, [0.25, 0.39, 0.415, 0.39], 3.0750560384924e-4, 1.0273430486954e-3)
def kowalik_osborne(x: Tensor) -> Tensor:
    x1, x2, x3, x4 = _columns(x)
    u = _KOWALIK_U
    return _KOWALIK - x1 * (u**2 + u * x2) / (u**2 + u * x3 + x4)


@_problem(16, [25, 5, -5, -1], 85822.20162635)
def brown_dennis(x: Tensor) -> Tensor:
    x1, x2, x3, x4 = _columns(x)
    t = _range(1, 20) / 5
    return (x1 + t * x2 - torch.exp(t)) ** 2 + (x3 + x4 * torch.sin(t) - torch.cos(t)) ** 2


_OSBORNE_1 = _tensor(
    ".844 .908 .932 .936 .925 .908 .881 .850 .818 .784 .751 .718 .685 .658 .628 .603 .580 .558 .538 .522 .506 .490 "
    ".478 .467 .457 .448 .438 .431 .424 .420 .414 .411 .406"
)


@_problem(17, [0.5, 1.5, -1, 0.01, 0.02], 5.46489469748e-5)
def osborne_1(x: Tensor) -> Tensor:
    x1, x2, x3, x4, x5 = _columns(x)
    t = 10 * _range(0, 32)
    return _OSBORNE_1 - (x1 + x2 * torch.exp(-t * x4) + x3 * torch.exp(-t * x5))


@_problem(18, [1, 2, 1, 1, 1, 1], 0, 5.6556499255e-3, 0.30636677262)
def biggs(x: Tensor) -> Tensor:
    x1, x2, x3, x4, x5, x6 = _columns(x)
    t = _range(1, 13) / 10
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x3 * torch.exp(-t * x1) - x4 * torch.exp(-t * x2) + x6 * torch.exp(-t * x5) - y


_OSBORNE_2 = _tensor(
    "1.366 1.191 1.112 1.013 .991 .885 .831 .847 .786 .725 .746 .679 .608 .655 .616 .606 .602 .626 .651 .724 .649 "
    ".649 .694 .644 .624 .661 .612 .558 .533 .495 .500 .423 .395 .375 .372 .391 .396 .405 .428 .429 .523 .562 .607 "
    ".653 .672 .708 .633 .668 .645 .632 .591 .559 .597 .625 .739 .710 .729 .720 .636 .581 .428 .292 .162 .098 .054"
)


@_problem(19, [1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5], 4.01377362935e-2)
def osborne_2(x: Tensor) -> Tensor:
    x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11 = _columns(x)
    t = _range(0, 64) / 10
    bumps = [h * torch.exp(-((t - c) ** 2) * w) for h, w, c in ((x2, x6, x9), (x3, x7, x10), (x4, x8, x11))]
    return _OSBORNE_2 - (x1 * torch.exp(-t * x5) + bumps[0] + bumps[1] + bumps[2])


# ---- 20 to 35: n is chosen ----


@_problem(20, [0] * 6, 2.28767005355e-3)
def watson(x: Tensor) -> Tensor:
    n = x.shape[-1]
    powers = (_range(1, 29) / 29)[:, None] ** _range(0, n - 1)  # t_i^{j-1}
    slopes = x[..., 1:] @ (_range(1, n - 1) * powers[:, :-1]).T
    x1, x2 = x[..., :1], x[..., 1:2]
    return torch.cat([slopes - (x @ powers.T) ** 2 - 1, x1, x2 - x1**2 - 1], -1)


@_problem(21, [-1.2, 1] * 5, 0)
def extended_rosenbrock(x: Tensor) -> Tensor:
    odd, even = x[..., ::2], x[..., 1::2]
    return torch.cat([10 * (even - odd**2), 1 - odd], -1)


@_problem(22, [3, -1, 0, 1] * 3, 0)
def extended_powell_singular(x: Tensor) -> Tensor:
    x1, x2, x3, x4 = (x[..., i::4] for i in range(4))
    return torch.cat([x1 + 10 * x2, 5**0.5 * (x3 - x4), (x2 - 2 * x3) ** 2, 10**0.5 * (x1 - x4) ** 2], -1)


@_problem(23, [float(i) for i in range(1, 11)], 7.08765146709e-5)
def penalty_1(x: Tensor) -> Tensor:
    return torch.cat([1e-5**0.5 * (x - 1), (x**2).sum(-1, keepdim=True) - 0.25], -1)


@_problem(24, [0.5] * 10, 2.93660537456e-4)
def penalty_2(x: Tensor) -> Tensor:
    n = x.shape[-1]
    i = _range(2, n)
    grown, root = torch.exp(x / 10), 1e-5**0.5
    pairs = grown[..., 1:] + grown[..., :-1] - torch.exp(i / 10) - torch.exp((i - 1) / 10)
    last = (_range(1, n).flip(0) * x**2).sum(-1, keepdim=True) - 1
    return torch.cat([x[..., :1] - 0.2, root * pairs, root * (grown[..., 1:] - torch.e**-0.1), last], -1)


@_problem(25, [1 - i / 10 for i in range(1, 11)], 0)
def variably_dimensioned(x: Tensor) -> Tensor:
    total = (_range(1, x.shape[-1]) * (x - 1)).sum(-1, keepdim=True)
    return torch.cat([x - 1, total, total**2], -1)


@_problem(26, [0.1] * 10, 0, 2.795056121879e-5)
def trigonometric(x: Tensor) -> Tensor:
    n = x.shape[-1]
    return n - torch.cos(x).sum(-1, keepdim=True) + _range(1, n) * (1 - torch.cos(x)) - torch.sin(x)


@_problem(27, [0.5] * 10, 0, 1)
def brown_almost_linear(x: Tensor) -> Tensor:
    sums = x[..., :-1] + x.sum(-1, keepdim=True) - (x.shape[-1] + 1)
    return torch.cat([sums, x.prod(-1, keepdim=True) - 1], -1)


_T = _range(1, 10) / 11  # the inner points of a grid on [0, 1]


@_problem(28, (_T * (_T - 1)).tolist(), 0)
def discrete_boundary_value(x: Tensor) -> Tensor:
    before, after = _neighbours(x)
    return 2 * x - before - after + (x + _T + 1) ** 3 / (2 * 11**2)


@_problem(29, (_T * (_T - 1)).tolist(), 0)
def discrete_integral_equation(x: Tensor) -> Tensor:
    kernel = torch.where(_T[:, None] >= _T, (1 - _T[:, None]) * _T, _T[:, None] * (1 - _T))  # (i, j)
    integral: Tensor = (x + _T + 1) ** 3 @ kernel.T
    return x + integral / 22


@_problem(30, [-1] * 10, 0)
def broyden_tridiagonal(x: Tensor) -> Tensor:
    before, after = _neighbours(x)
    return (3 - 2 * x) * x - before - 2 * after + 1


@_problem(31, [-1] * 10, 0)
def broyden_banded(x: Tensor) -> Tensor:
    ones = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.float64)
    band = ones.tril(1).triu(-5) - torch.diag(ones[0])  # j from i-5 to i+1, not i
    coupled: Tensor = (x * (1 + x)) @ band.T
    return x * (2 + 5 * x**2) + 1 - coupled


@_problem(32, [1] * 10, 10)
def linear_full_rank(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 20 - x.shape[-1])) - x.sum(-1, keepdim=True) / 10 - 1


@_problem(33, [1] * 10, 20 * 19 / (2 * 41))
def linear_rank_1(x: Tensor) -> Tensor:
    return _range(1, 20) * (_range(1, x.shape[-1]) * x).sum(-1, keepdim=True) - 1


@_problem(34, [1] * 10, (20**2 + 3 * 20 - 6) / (2 * 37))
def linear_rank_1_with_zeros(x: Tensor) -> Tensor:
    rows = torch.nn.functional.pad(_range(1, 18), (1, 1))
    return rows * (_range(2, x.shape[-1] - 1) * x[..., 1:-1]).sum(-1, keepdim=True) - 1


@_problem(35, [i / 9 for i in range(1, 9)], 3.51687372568e-3)
def chebyquad(x: Tensor) -> Tensor:
    z = 2 * x - 1
    polynomials = [torch.ones_like(z), z]  # T_0, T_1, ... by their recurrence
    for _ in range(x.shape[-1] - 1):
        polynomials.append(2 * z * polynomials[-1] - polynomials[-2])
    i = _range(1, x.shape[-1])
    integrals = torch.where(i % 2 == 0, -1 / (i**2 - 1), 0.0)
    return torch.stack([p.mean(-1) for p in polynomials[1:]], -1) - integrals
