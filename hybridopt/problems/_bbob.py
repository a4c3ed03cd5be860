"""The 24 noiseless BBOB functions in torch: differentiable, batched, the same instances as COCO and ioh.

Each is a function of points x, shape (..., d), float64, and of its instance; it returns f(x) − f_opt, shape (...).
Names, numbers and letters (Λ, T_osz, T_asy, f_pen) are those of Hansen, Finck, Ros, Auger, "Real-parameter black-box
optimization benchmarking 2009: noiseless functions definitions", INRIA RR-6829 (2009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import pi, sqrt

import numpy as np
import torch
from torch import Tensor

from hybridopt.problems._bbob_instances import Instance
from hybridopt.problems._problem import Problem, ProblemError
from hybridopt.vector import FloatArray


def bbob(seed: int = 42, *, f: int = 1, d: int = 2, instance: int = 1) -> Problem:
    """One of the 24 noiseless functions of the black-box optimization benchmark, float64.

    The losses are those of COCO's `bbob` suite and of the package ioh, to 1e-9 (relative where they exceed 1; ioh
    0.3.22 lacks the slope of at most 5e-7 on f7's lowest step).
    `loss` takes many points at once, shape (..., d), and works under `torch.func.vmap` and autograd; f7 is
    piecewise constant, and the gradients of others are infinite in places (f13 at its ridge, f17 and f18 at the
    optimum), where 0 is returned. `best_known` is f_opt, `x_opt` in `Instance`.

    Args:
        seed: of the start, uniform in ±4; the function is the same for every seed.
        f: 1 to 24: 1-5 separable, 6-9 moderate conditioning, 10-14 high conditioning and one valley, 15-19 many
            valleys with a global structure, 20-24 with little.
        d: dimensions, 2 to 40.
        instance: the benchmark's are 1 to 15; any number from 1 makes one.

    Raises:
        ProblemError: there is no such function, dimension or instance.

    Example:
        >>> import torch
        >>> from hybridopt.problems import bbob
        >>> problem = bbob(f=8, d=5, instance=3)
        >>> problem.loss(torch.zeros(2, 5, dtype=torch.float64))
        tensor([14584.5304, 14584.5304], dtype=torch.float64)
        >>> problem.best_known
        98.62
    """
    for name, value, low, high in (("f", f, 1, 24), ("d", d, 2, 40), ("instance", instance, 1, 10**5)):
        if not isinstance(value, int) or not low <= value <= high:
            raise ProblemError(
                f"bbob: expected {name} to be a whole number from {low} to {high}, got {value!r}"
            )
    at = Instance(f, d, instance)
    start = np.random.default_rng((seed, f, d, instance)).uniform(-4, 4, d)
    return Problem(
        name=f"bbob(f={f}, d={d}, instance={instance})",
        loss=partial(_loss, function=FUNCTIONS[f - 1], at=at),
        target=torch.from_numpy(start),
        bounds=(-5.0, 5.0),
        best_known=at.f_opt,
        description=f"BBOB function {f} ({FUNCTIONS[f - 1].__name__}), {d} dimensions, instance {instance}",
    )


def bbob_names(
    functions: Iterable[int] = range(1, 25),
    dimensions: Iterable[int] = (2, 5, 10),
    instances: Iterable[int] = range(1, 16),
) -> list[str]:
    """The names of many BBOB problems, as `problems.get` takes them, dimension by dimension.

    Example:
        >>> from hybridopt.problems import bbob_names
        >>> bbob_names([8], [2, 5], [1])
        ['bbob(f=8, d=2, instance=1)', 'bbob(f=8, d=5, instance=1)']
        >>> len(bbob_names())
        1080
    """
    functions, instances = list(functions), list(instances)
    return [
        f"bbob(f={f}, d={d}, instance={instance})"
        for d in dimensions
        for f in functions
        for instance in instances
    ]


def bbob_targets(f_opt: float) -> FloatArray:
    """The 51 losses by which COCO draws runtimes: f_opt + 10^2, 10^1.8, ..., 10^-8, shape (51,)."""
    targets: FloatArray = f_opt + 10 ** np.linspace(2, -8, 51)
    return targets


def _loss(x: Tensor, *, function: Callable[[Tensor, Instance], Tensor], at: Instance) -> Tensor:
    return function(x, at) + at.f_opt


# ---- building blocks (RR-6829, section 0.2) ----


def ramp(d: int) -> Tensor:
    """The exponents 0, 1/(d−1), ..., 1."""
    return torch.linspace(0, 1, d, dtype=torch.float64)


def scale(d: int, condition: float) -> Tensor:
    """The diagonal of Λ^condition, which makes a sphere an ellipsoid of that condition."""
    return torch.tensor(condition, dtype=torch.float64) ** (ramp(d) / 2)


def rotate(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix times every point."""
    turned: Tensor = x @ matrix.T
    return turned


def power(x: Tensor, exponent: Tensor | float) -> Tensor:
    """x^exponent for x ≥ 0, whose gradient at 0 is 0 (an infinite one times 0 would be nan)."""
    inside = x > 0
    return torch.where(inside, torch.where(inside, x, 1.0) ** exponent, 0.0)


def oscillate(x: Tensor) -> Tensor:
    """T_osz: ripples of about 5 %, without a period."""
    log = torch.log(torch.where(x == 0, 1.0, x.abs()))
    above = torch.sin(10 * log) + torch.sin(7.9 * log)
    below = torch.sin(5.5 * log) + torch.sin(3.1 * log)
    return torch.sign(x) * torch.exp(log + 0.049 * torch.where(x > 0, above, below))


def skew(x: Tensor, beta: float) -> Tensor:
    """T_asy^beta: positive coordinates grow faster, later ones more so."""
    positive = torch.where(x > 0, x, 1.0)
    return torch.where(x > 0, positive ** (1 + beta * ramp(x.shape[-1]) * positive.sqrt()), x)


def outside(x: Tensor) -> Tensor:
    """f_pen: the squared distance to the box ±5."""
    return ((x.abs() - 5).clamp(min=0) ** 2).sum(-1)


def rastrigin_of(z: Tensor) -> Tensor:
    return 10 * (z.shape[-1] - torch.cos(2 * pi * z).sum(-1)) + (z**2).sum(-1)


def steps_of(z: Tensor) -> Tensor:
    """Rosenbrock's term of each pair of neighbours."""
    return 100 * (z[..., :-1] ** 2 - z[..., 1:]) ** 2 + (z[..., :-1] - 1) ** 2


# ---- separable ----


def sphere(x: Tensor, at: Instance) -> Tensor:  # f1
    return ((x - at.x_opt) ** 2).sum(-1)


def ellipsoid(x: Tensor, at: Instance) -> Tensor:  # f2
    return (scale(at.d, 1e12) * oscillate(x - at.x_opt) ** 2).sum(-1)


def rastrigin(x: Tensor, at: Instance) -> Tensor:  # f3
    return rastrigin_of(scale(at.d, 10) * skew(oscillate(x - at.x_opt), 0.2))


def bueche_rastrigin(x: Tensor, at: Instance) -> Tensor:  # f4
    z = oscillate(x - at.x_opt)
    odd = torch.arange(at.d) % 2 == 0  # x_1, x_3, ...: ten times as steep on their positive side
    return rastrigin_of(scale(at.d, 10) * torch.where((z > 0) & odd, 10 * z, z)) + 100 * outside(x)


def linear_slope(x: Tensor, at: Instance) -> Tensor:  # f5
    s = torch.sign(at.x_opt) * scale(at.d, 100)
    z = torch.where(at.x_opt * x < 25, x, at.x_opt)
    return (5 * s.abs() - s * z).sum(-1)


# ---- low or moderate conditioning ----


def attractive_sector(x: Tensor, at: Instance) -> Tensor:  # f6
    z = rotate(at.R, scale(at.d, 10) * rotate(at.Q, x - at.x_opt))
    s = torch.where(z * at.x_opt > 0, 100.0, 1.0)
    return power(oscillate(((s * z) ** 2).sum(-1)), 0.9)


def step_ellipsoid(x: Tensor, at: Instance) -> Tensor:  # f7
    hat = scale(at.d, 10) * rotate(at.Q, x - at.x_opt)
    flat = torch.where(hat.abs() > 0.5, torch.floor(0.5 + hat), torch.floor(0.5 + 10 * hat) / 10)
    value = (scale(at.d, 100**2) * rotate(at.R, flat) ** 2).sum(-1)
    return 0.1 * torch.maximum(hat[..., 0].abs() / 1e4, value) + outside(x)


def rosenbrock(x: Tensor, at: Instance) -> Tensor:  # f8
    return steps_of(at.zoom * (x - at.x_opt) + 1).sum(-1)


def rotated_rosenbrock(x: Tensor, at: Instance) -> Tensor:  # f9
    return steps_of(at.zoom * rotate(at.Q, x) + 0.5).sum(-1)


# ---- high conditioning, one valley ----


def rotated_ellipsoid(x: Tensor, at: Instance) -> Tensor:  # f10
    return (scale(at.d, 1e12) * oscillate(rotate(at.R, x - at.x_opt)) ** 2).sum(-1)


def discus(x: Tensor, at: Instance) -> Tensor:  # f11
    z = oscillate(rotate(at.R, x - at.x_opt))
    return 1e6 * z[..., 0] ** 2 + (z[..., 1:] ** 2).sum(-1)


def bent_cigar(x: Tensor, at: Instance) -> Tensor:  # f12
    z = rotate(at.R, skew(rotate(at.R, x - at.x_opt), 0.5))
    return z[..., 0] ** 2 + 1e6 * (z[..., 1:] ** 2).sum(-1)


def sharp_ridge(x: Tensor, at: Instance) -> Tensor:  # f13
    z = rotate(at.R, scale(at.d, 10) * rotate(at.Q, x - at.x_opt))
    return z[..., 0] ** 2 + 100 * power((z[..., 1:] ** 2).sum(-1), 0.5)


def different_powers(x: Tensor, at: Instance) -> Tensor:  # f14
    z = rotate(at.R, x - at.x_opt)
    return power((z.abs() ** (2 + 4 * ramp(at.d))).sum(-1), 0.5)


# ---- many valleys with a global structure ----


def rotated_rastrigin(x: Tensor, at: Instance) -> Tensor:  # f15
    z = skew(oscillate(rotate(at.R, x - at.x_opt)), 0.2)
    return rastrigin_of(rotate(at.R, scale(at.d, 10) * rotate(at.Q, z)))


def weierstrass(x: Tensor, at: Instance) -> Tensor:  # f16
    z = oscillate(rotate(at.R, x - at.x_opt))
    z = rotate(at.R, scale(at.d, 0.01) * rotate(at.Q, z))
    k = torch.arange(12, dtype=torch.float64)
    lowest = (0.5**k * torch.cos(pi * 3**k)).sum()
    waves = (0.5**k * torch.cos(2 * pi * 3**k * (z[..., None] + 0.5))).sum(-1)
    return 10 * (waves.mean(-1) - lowest) ** 3 + 10 / at.d * outside(x)


def schaffers(x: Tensor, at: Instance) -> Tensor:  # f17, f18
    z = rotate(at.Q, skew(rotate(at.R, x - at.x_opt), 0.5))
    z = scale(at.d, 10 if at.f == 17 else 1000) * z
    square = z[..., :-1] ** 2 + z[..., 1:] ** 2  # s_i²
    terms = power(square, 0.25) * (1 + torch.sin(50 * power(square, 0.1)) ** 2)
    return terms.mean(-1) ** 2 + 10 * outside(x)


def griewank_rosenbrock(x: Tensor, at: Instance) -> Tensor:  # f19
    s = steps_of(at.zoom * rotate(at.Q, x) + 0.5)
    return 10 * (s / 4000 - torch.cos(s)).mean(-1) + 10


# ---- many valleys with little global structure ----


def schwefel(x: Tensor, at: Instance) -> Tensor:  # f20
    far = 2 * at.x_opt.abs()
    hat = 2 * torch.sign(at.x_opt) * x
    leaned = hat + 0.25 * torch.nn.functional.pad((hat - far)[..., :-1], (1, 0))
    z = 100 * (scale(at.d, 10) * (leaned - far) + far)
    waves = (z * torch.sin(power(z.abs(), 0.5))).mean(-1)
    return -waves / 100 + 4.189828872724339 + 100 * outside(z / 100)


def gallagher(x: Tensor, at: Instance) -> Tensor:  # f21, f22
    heights, diagonals, places = at.peaks
    z = rotate(at.Q, x)[..., None, :] - rotate(at.Q, places)  # (..., m, d)
    peaks = heights * torch.exp(-0.5 / at.d * (diagonals * z**2).sum(-1))
    return oscillate(10 - peaks.amax(-1)) ** 2 + outside(x)


def katsuura(x: Tensor, at: Instance) -> Tensor:  # f23
    z = rotate(at.R, scale(at.d, 100) * rotate(at.Q, x - at.x_opt))
    two = 2.0 ** torch.arange(1, 33, dtype=torch.float64)
    fine = two * z[..., None]
    rough = ((fine - torch.floor(fine + 0.5)).abs() / two).sum(-1)
    i = torch.arange(1, at.d + 1, dtype=torch.float64)
    product = ((1 + i * rough) ** (10 / at.d**1.2)).prod(-1)
    value: Tensor = 10 / at.d**2 * (product - 1) + outside(x)
    return value


def lunacek_bi_rastrigin(x: Tensor, at: Instance) -> Tensor:  # f24
    near = 2.5  # μ0
    s = 1 - 1 / (2 * sqrt(at.d + 20) - 8.2)
    far = -sqrt((near**2 - 1) / s)  # μ1
    hat = 2 * torch.sign(at.x_opt) * x
    z = rotate(at.R, scale(at.d, 100) * rotate(at.Q, hat - near))
    funnels = torch.minimum(((hat - near) ** 2).sum(-1), at.d + s * ((hat - far) ** 2).sum(-1))
    waves = 10 * (at.d - torch.cos(2 * pi * z).sum(-1))
    value: Tensor = funnels + waves + 1e4 * outside(x)
    return value


FUNCTIONS: tuple[Callable[[Tensor, Instance], Tensor], ...] = (
    sphere,
    ellipsoid,
    rastrigin,
    bueche_rastrigin,
    linear_slope,
    attractive_sector,
    step_ellipsoid,
    rosenbrock,
    rotated_rosenbrock,
    rotated_ellipsoid,
    discus,
    bent_cigar,
    sharp_ridge,
    different_powers,
    rotated_rastrigin,
    weierstrass,
    schaffers,
    schaffers,
    griewank_rosenbrock,
    schwefel,
    gallagher,
    gallagher,
    katsuura,
    lunacek_bi_rastrigin,
)
