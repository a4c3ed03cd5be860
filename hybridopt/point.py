"""A kept point of the search, in the form in which it was visited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridopt.vector import FloatArray, ParameterVector


class Point(NamedTuple):
    """A flat vector of weights, or copies of the tensors (in-place methods), and the buffers that went with it."""

    x: FloatArray | None
    """Weights, shape (n,), float64."""
    tensors: list[Tensor] | None
    """Copies in the weights' own dtype, device and strides."""
    buffers: list[Tensor | None]
    """Copies of the module's buffers; empty = there are none."""

    def flat(self, vector: ParameterVector) -> FloatArray:
        """The weights of `vector`, shape (n,), float64, as a new array; the point may be one of its whole."""
        if self.x is not None:
            return vector.from_whole(self.x)
        assert self.tensors is not None
        return vector.from_whole(vector.whole.gather(self.tensors))

    def put(self, vector: ParameterVector) -> None:
        """Write the weights into the model (not the buffers)."""
        if self.x is not None:
            vector.write(self.x)
        else:
            assert self.tensors is not None
            vector.claim(None)
            vector.restore(self.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Tensors only."""
        return {
            "x": None if self.x is None else torch.tensor(self.x),
            "tensors": None if self.tensors is None else [t.clone() for t in self.tensors],
            "buffers": [None if b is None else b.clone() for b in self.buffers],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Point:
        """The point that was saved."""
        x, tensors = state["x"], state["tensors"]
        return cls(
            None if x is None else x.numpy().copy(),
            None if tensors is None else [t.clone() for t in tensors],
            list(state["buffers"]),
        )
