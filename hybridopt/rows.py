"""Points of a generation where the model lives: rows of a tensor that whoever does not ask for it reads as an array."""

from __future__ import annotations

from typing import Any, TypeAlias, cast, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray: TypeAlias = npt.NDArray[np.float64]


class DeviceRows:
    """A matrix on a device, shape (rows, n), float64, with as much of an array's face as generations need.

    A row, or a list of rows, is a NumPy array on the host; a slice stays on the device, and so does what is added or
    multiplied (a number, or an array of shape (n,)); `np.asarray` gives a copy of the whole. So what knows of it
    (drawing, decoding, the batched forward, moments) moves nothing; what takes rows or the whole need not know; and
    NumPy's arithmetic is an error.
    """

    ndim = 2
    __array_ufunc__ = None  # an array on the left leaves the work to us

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, n = self.tensor.shape
        return rows, n

    def __len__(self) -> int:
        return len(self.tensor)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """A copy on the host."""
        if copy is False:
            raise ValueError("rows of a device: expected that they may be copied, got copy=False")
        return np.asarray(_on_host(self.tensor), dtype=dtype)

    @overload
    def __getitem__(self, index: slice) -> DeviceRows: ...
    @overload
    def __getitem__(self, index: int | np.integer[Any] | list[int]) -> FloatArray: ...
    def __getitem__(self, index: Any) -> DeviceRows | FloatArray:
        if isinstance(index, slice):
            return DeviceRows(self.tensor[index])
        return _on_host(self.tensor[index if isinstance(index, list) else int(index)])

    def __setitem__(self, index: int | slice, value: FloatArray) -> None:
        self.tensor[index] = self.beside(value)

    def __mul__(self, by: float | FloatArray) -> DeviceRows:
        return DeviceRows(self.tensor * (self.beside(by) if isinstance(by, np.ndarray) else by))

    __rmul__ = __mul__

    def __iadd__(self, other: FloatArray | DeviceRows) -> DeviceRows:
        self.tensor += other.tensor if isinstance(other, DeviceRows) else self.beside(other)
        return self

    def copy(self) -> DeviceRows:
        """Of its own memory."""
        return DeviceRows(self.tensor.clone())

    def beside(self, array: FloatArray) -> Tensor:
        """An array as a tensor on the same device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.tensor.device)

    def clamp(self, lower: FloatArray, upper: FloatArray) -> None:
        """Bring all rows inside bounds, shape (n,), in place."""
        torch.clamp(self.tensor, self.beside(lower), self.beside(upper), out=self.tensor)


Rows: TypeAlias = FloatArray | DeviceRows


def _on_host(tensor: Tensor) -> FloatArray:
    """A copy."""
    copied: FloatArray = tensor.to("cpu", copy=True).numpy()
    return copied


def own(rows: FloatArray) -> FloatArray:
    """A copy that nobody writes to; rows of a device, which nobody does, as they are."""
    return rows if isinstance(cast("object", rows), DeviceRows) else rows.copy()


def stacked(above: list[FloatArray], rows: Rows) -> Rows:
    """Points, each of shape (n,), above the rows of a matrix."""
    if not above:
        return rows if isinstance(rows, DeviceRows) else np.ascontiguousarray(rows)
    if isinstance(rows, DeviceRows):
        return DeviceRows(torch.vstack([rows.beside(np.stack(above)), rows.tensor]))
    return np.ascontiguousarray(np.vstack([*above, rows]))


def placed(device: str, rows: Rows) -> DeviceRows:
    """A matrix as one on a device."""
    return rows if isinstance(rows, DeviceRows) else DeviceRows(torch.tensor(rows, device=device))


def combined(weights: FloatArray, rows: Rows) -> FloatArray:
    """The sum of weights, shape (rows,), times rows, shape (n,)."""
    if isinstance(rows, DeviceRows):
        return np.asarray((rows.beside(weights) @ rows.tensor).cpu())
    summed: FloatArray = weights.dot(rows)
    return summed


def squared_lengths(rows: Rows) -> FloatArray:
    """Of each row, shape (rows,)."""
    if isinstance(rows, DeviceRows):
        return np.asarray(torch.linalg.vecdot(rows.tensor, rows.tensor).cpu())
    squares: FloatArray = np.vecdot(rows, rows)
    return squares


def square(rows: Rows) -> None:
    """Each number, in place."""
    if isinstance(rows, DeviceRows):
        rows.tensor.square_()
    else:
        np.square(rows, out=rows)
