"""Bounds and scales as users write them -> one number per weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridopt.errors import BoundsError
from hybridopt.selection import spread_patterns

Slices = Mapping[str, slice]


class Bounds(NamedTuple):
    """Arrays of shape (n,), float64; -inf and inf where there is no bound."""

    lower: npt.NDArray[np.float64]
    upper: npt.NDArray[np.float64]


def read_bounds(
    bounds: Any,
    slices: Slices,
    tensors: Sequence[Tensor],
    x0: npt.NDArray[np.float64],
    aliases: Mapping[str, str],
    integer: npt.NDArray[np.bool_] | None = None,
) -> Bounds:
    """Check and spread `bounds` over the weights; tightened to numbers that each weight's dtype can hold.

    Those of `integer` weights, shape (n,), are tightened to whole numbers first.
    """
    n = len(x0)
    rows = np.empty((n, 2))
    rows[:, 0], rows[:, 1] = -np.inf, np.inf
    if isinstance(bounds, Mapping):
        for name, pattern in spread_patterns(bounds, list(slices), aliases, "bounds").items():
            part = slices[name]
            rows[part] = _pairs(bounds[pattern], part.stop - part.start, f"bounds[{pattern!r}]")
    elif bounds is not None:
        rows[:] = _pairs(bounds, n, "bounds")
    for (name, part), tensor in zip(slices.items(), tensors, strict=True):
        low, high = rows[part, 0], rows[part, 1]
        if not (low < high).all():
            i = int(np.argmin(low < high))
            raise BoundsError(
                f"bounds: expected low < high, got ({low[i]:g}, {high[i]:g}) for {name!r}[{i}]; "
                "to hold a weight fixed leave it out with select="
            )
        kind = str(tensor.dtype)
        if integer is not None:
            low, high = (
                np.where(integer[part], np.ceil(low), low),
                np.where(integer[part], np.floor(high), high),
            )
            kind = f"whole {kind}" if integer[part].any() else kind
        rows[part, 0], rows[part, 1] = _tighten(low, tensor.dtype, +1), _tighten(high, tensor.dtype, -1)
        if not (rows[part, 0] < rows[part, 1]).all():
            raise BoundsError(
                f"bounds: no two {kind} numbers lie within the bounds of {name!r}; widen them or use a "
                "wider dtype"
            )
        outside = (x0[part] < rows[part, 0]) | (x0[part] > rows[part, 1])
        if outside.any():
            i = int(np.argmax(outside))
            raise BoundsError(
                f"bounds: the start lies outside for {name!r}: value {x0[part][i]:g} at flat index {i} is not in "
                f"({low[i]:g}, {high[i]:g}); widen the bounds, or clamp the weights first"
            )
    return Bounds(np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1]))


def _pairs(value: Any, n: int, what: str) -> npt.NDArray[np.float64]:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(())
    if array.shape not in {(2,), (n, 2)}:
        shape = f"shape {array.shape}" if array.shape else repr(value)
        raise BoundsError(
            f"{what}: expected one pair (low, high), or shape ({n}, 2) with one (low, high) row per weight, got {shape}"
        )
    if np.isnan(array).any():
        # None, too, has become nan
        absent = [end is None for end in np.asarray(value, dtype=object).flat]
        array = np.where(np.reshape(absent, array.shape), (-np.inf, np.inf), array)
    if np.isnan(array).any():
        raise BoundsError(f"{what}: expected numbers, got nan; write -inf or inf where there is no bound")
    return np.broadcast_to(array, (n, 2))


def _tighten(values: npt.NDArray[np.float64], dtype: torch.dtype, side: int) -> npt.NDArray[np.float64]:
    """The nearest numbers of `dtype` that lie inside: upwards for lower bounds (side=1), downwards for upper ones."""
    if dtype == torch.float64:
        return values
    rounded = torch.from_numpy(values.copy()).to(dtype)
    back = rounded.to(torch.float64).numpy()
    wrong = back < values if side > 0 else back > values
    target = torch.full_like(rounded, torch.inf if side > 0 else -torch.inf)
    moved = (
        torch.nextafter(rounded.float(), target.float()) if dtype == torch.float32 else _next(rounded, side)
    )
    inner = moved.to(torch.float64).numpy()
    return np.where(wrong & np.isfinite(values), inner, np.where(np.isfinite(values), back, values))


def _next(values: Tensor, side: int) -> Tensor:
    """The next number of a 16-bit dtype: torch.nextafter lacks float16 on some devices, so by its bit pattern."""
    bits = values.view(torch.int16).to(torch.int32)
    ordered = torch.where(bits < 0, -(bits & 0x7FFF), bits)
    ordered = ordered + side
    bits = torch.where(ordered < 0, (-ordered) - 0x8000, ordered)
    return bits.to(torch.int16).view(values.dtype)


def read_scale(
    scale: Any, slices: Slices, x0: npt.NDArray[np.float64], aliases: Mapping[str, str]
) -> npt.NDArray[np.float64] | None:
    """Check and spread `scale` over the weights; None stays None."""
    if scale is None:
        return None
    n = len(x0)
    result = np.ones(n)
    if isinstance(scale, str):
        if scale != "start":
            raise BoundsError(
                f'scale: expected None, "start", a number, shape ({n},) or a mapping, got {scale!r}'
            )
        for part in slices.values():
            if part.stop > part.start:
                rms = float(np.sqrt(np.mean(x0[part] ** 2)))
                result[part] = np.maximum(np.maximum(np.abs(x0[part]), rms), 1e-3)
    elif isinstance(scale, Mapping):
        for name, pattern in spread_patterns(scale, list(slices), aliases, "scale").items():
            part = slices[name]
            result[part] = _numbers(scale[pattern], part.stop - part.start, f"scale[{pattern!r}]")
    else:
        result[:] = _numbers(scale, n, "scale")
    if not (np.isfinite(result) & (result > 0)).all():
        raise BoundsError("scale: expected positive finite numbers; a scale is the typical size of a weight")
    return result


def require_positive(
    log: npt.NDArray[np.bool_], slices: Slices, x0: npt.NDArray[np.float64], lower: npt.NDArray[np.float64]
) -> None:
    """Raise `BoundsError` where a weight whose logarithm is searched is not positive, or its lower bound is not."""
    for what, wrong in (("weights", x0 <= 0), ("lower bounds (or none)", np.isfinite(lower) & (lower <= 0))):
        bad = np.flatnonzero(log & wrong)
        if len(bad):
            name = next(name for name, part in slices.items() if part.start <= bad[0] < part.stop)
            value = (x0 if what == "weights" else lower)[bad[0]]
            raise BoundsError(
                f"log: expected positive {what}, got {value:g} for {name!r}[{bad[0] - slices[name].start}]; a "
                "logarithm is searched only where every weight and its bounds are above 0"
            )


def _numbers(value: Any, n: int, what: str) -> npt.NDArray[np.float64]:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise BoundsError(f"{what}: expected one number or shape ({n},), got {value!r}") from None
    if array.shape not in {(), (n,)}:
        raise BoundsError(
            f"{what}: expected one number or shape ({n},), one number per weight, got shape {array.shape}"
        )
    return array
