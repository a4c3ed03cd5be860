"""Points of a generation where the model lives: rows of a tensor that whoever does not ask for it reads as an array."""

from __future__ import annotations

from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray: TypeAlias = npt.NDArray[np.float64]


class DeviceRows:
    """A matrix on a device, shape (rows, n), float64, with as much of an array's face as generations need.

    A row, or a list of rows, is a NumPy array on the host; a slice stays on the device; NumPy's own functions get a
    copy of the whole. So what knows of it (drawing, decoding, the batched forward, moments) moves nothing, and all else
    is right without knowing.
    """

    ndim = 2

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
        return np.array(self.tensor.cpu().numpy(), dtype=dtype)

    @overload
    def __getitem__(self, index: slice) -> DeviceRows: ...
    @overload
    def __getitem__(self, index: int | np.integer[Any] | list[int]) -> FloatArray: ...
    def __getitem__(self, index: Any) -> DeviceRows | FloatArray:
        if isinstance(index, slice):
            return DeviceRows(self.tensor[index])
        at = index if isinstance(index, list) else int(index)
        return np.array(self.tensor[at].cpu().numpy())

    def __setitem__(self, index: int | slice, value: FloatArray) -> None:
        self.tensor[index] = self.beside(value)

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


def stacked(above: list[FloatArray], rows: Rows) -> Rows:
    """Points, each of shape (n,), above the rows of a matrix."""
    if not above:
        return rows if isinstance(rows, DeviceRows) else np.ascontiguousarray(rows)
    if isinstance(rows, DeviceRows):
        return DeviceRows(torch.vstack([rows.beside(np.stack(above)), rows.tensor]))
    return np.ascontiguousarray(np.vstack([*above, rows]))
