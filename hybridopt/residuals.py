"""Losses that are half the squared norm of a vector of residuals, robust ones included."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridopt.errors import ObjectiveError
from hybridopt.forms import Loss
from hybridopt.vector import FloatArray

# r -> r̃ with ½ r̃² = ½ rho(r²), rho as in Triggs et al. (2000) and `scipy.optimize.least_squares`. Written as a factor
# of r that is smooth at 0, so that its derivative is right there too. z = r².
_FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": torch.ones_like,
    # rho = 2 (√(1 + z) - 1)
    "soft_l1": lambda z: (2 / (1 + (1 + z).sqrt())).sqrt(),
    # rho = z up to 1, then 2 √z - 1
    "huber": lambda z: ((2 * z.clamp(min=1).sqrt() - 1) / z.clamp(min=1)).sqrt(),
    # rho = ln(1 + z)
    "cauchy": lambda z: _over(torch.log1p, z, 1 / 2).sqrt(),
    # rho = arctan z
    "arctan": lambda z: _over(torch.arctan, z, 0.0).sqrt(),
}


# r̃ for a large r, both in units of the scale
_GROWTH: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": torch.clone,
    "soft_l1": lambda u: 2**0.5 * u.sqrt(),
    "huber": lambda u: 2**0.5 * u.sqrt(),
    "cauchy": lambda u: (2 * u.log()).sqrt(),
    "arctan": lambda u: torch.full_like(u, (math.pi / 2) ** 0.5),
}


def _over(function: Callable[[Tensor], Tensor], z: Tensor, slope: float) -> Tensor:
    """function(z) / z, near 0 by its first terms 1 - slope · z."""
    small = z < 1e-8
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, 1 - slope * z, function(safe) / safe)


class Residuals:
    """A vector-valued function as a loss: half its squared norm.

    Args:
        bound: the function, bound to the weights.
        choice: `residuals` of `Objective`.

    Raises:
        ObjectiveError: the choice is none, or the function is a closure.
    """

    def __init__(self, bound: Loss, choice: Any) -> None:
        name, scale = choice if isinstance(choice, tuple) and len(choice) == 2 else (choice, 1.0)
        name = "linear" if name is True else name
        if name not in _FACTORS or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise ObjectiveError(
                f"residuals: expected True, one of {', '.join(sorted(_FACTORS))}, or such a name with the size of a "
                f"residual from which it counts less, as in ('soft_l1', 0.1); got {choice!r}"
            )
        self._factor, self._growth = _FACTORS[name], _GROWTH[name]
        self._linear = name == "linear"
        self._scale = float(scale)
        self.last: Tensor | None = None
        """The residuals of the last call, shape (m,), with their graph if they have one."""
        self.count = 0
        """How many there are; 0 before the first call."""
        call, functional = bound.call, bound.functional
        pure = None
        if functional is not None:
            at = functional

            def pure(weights: Mapping[str, Tensor]) -> Tensor:
                return self._half(self.vector(at(weights))[0])

        self.loss = Loss(bound.form, lambda: self._called(call()), pure)
        self.functional = None if functional is None else self._pure(functional)

    def _pure(self, functional: Callable[[Mapping[str, Tensor]], Any]) -> Callable[..., Tensor]:
        return lambda weights: self.vector(functional(weights))[0]

    def vector(self, told: Any) -> tuple[Tensor, Any]:
        """What the function returned as residuals, shape (m,), robust if asked, and what came along with them.

        Raises:
            ObjectiveError: it is no array of real numbers, or one of another size than before.
        """
        told, aux = told if isinstance(told, tuple) and len(told) == 2 else (told, None)
        if not isinstance(told, Tensor):
            try:
                told = torch.as_tensor(np.asarray(told, dtype=np.float64))
            except (TypeError, ValueError):
                raise ObjectiveError(
                    f"residuals: expected a tensor or array of numbers, got {type(told).__name__}"
                ) from None
        if told.is_complex() or told.numel() == 0:
            raise ObjectiveError(
                f"residuals: expected real numbers, got a tensor of shape {tuple(told.shape)} and {told.dtype}"
            )
        r = told.reshape(-1)
        if self.count and len(r) != self.count:
            raise ObjectiveError(f"residuals: expected {self.count} of them at every call, got {len(r)}")
        if not self._linear:
            r = self._robust(r if r.device.type == "mps" else r.double()).to(r.dtype)
        return r, aux

    def _robust(self, r: Tensor) -> Tensor:
        """r̃ of r; where its square is too large a number, as far out as that, by what r̃ grows like."""
        u = (r / self._scale).abs()
        far = u > torch.finfo(r.dtype).max ** 0.4
        near = torch.where(far, torch.ones_like(r), r)
        grown = self._scale * self._growth(torch.where(far, u, torch.full_like(u, 2.0))) * r.sign()
        return torch.where(far, grown, near * self._factor((near / self._scale) ** 2))

    def told(self, finite: bool) -> FloatArray:
        """The residuals of the last call as a solver is told them: all inf where their loss was not finite."""
        assert self.last is not None
        if not finite:
            return np.full(self.count, np.inf)
        told: FloatArray = self.last.detach().to("cpu", torch.float64).numpy().copy()
        return told

    def _called(self, told: Any) -> Any:
        self.last, aux = self.vector(told)
        self.count = len(self.last)
        loss = self._half(self.last)
        return loss if aux is None else (loss, aux)

    @staticmethod
    def _half(r: Tensor) -> Tensor:
        return 0.5 * (r * r).sum()
