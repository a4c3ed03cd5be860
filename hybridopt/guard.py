"""What an evaluation must not change: gradients, modes and buffers of the caller's model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridopt.vector import ParameterVector


class ModelGuard:
    """Holds a model's `.grad`, `requires_grad`, train/eval modes and buffers during a run; gives them back.

    Buffers (BatchNorm statistics) move only at evaluations that are committed; after any other one they are put
    back. Noticing costs one version comparison a buffer; copies are made only when a buffer did change.
    """

    def __init__(self, vector: ParameterVector) -> None:
        self.vector = vector
        self.held = False
        module = vector.module
        self._slots: list[tuple[dict[str, Tensor | None], str]] = []
        if module is not None:
            self._slots = [
                (sub._buffers, name)
                for sub in module.modules()
                for name, b in sub._buffers.items()
                if b is not None
            ]
        self._base: list[Tensor] = []
        self._versions: list[tuple[int, int]] = []

    def open(self) -> None:
        """Take hold: `.grad` is cleared, all chosen weights require gradients."""
        module = self.vector.module
        self._modes = [] if module is None else [(sub, sub.training) for sub in module.modules()]
        self._grads = [t.grad for t in self.vector.tensors]
        self._frozen = [t for t in self.vector.tensors if not t.requires_grad]
        for tensor in self._frozen:
            tensor.requires_grad_(True)
        self.clear_gradients()
        self._rebase()
        self.held = True

    def close(self) -> None:
        """Give back: `.grad`, `requires_grad` and modes as found; weights and buffers as they stand."""
        for tensor, grad in zip(self.vector.tensors, self._grads, strict=True):
            tensor.grad = grad
        for tensor in self._frozen:
            tensor.requires_grad_(False)
        for sub, training in self._modes:
            sub.training = training
        self.held = False

    def clear_gradients(self) -> None:
        """Set every chosen weight's `.grad` to None."""
        for tensor in self.vector.tensors:
            tensor.grad = None

    # -- buffers ------------------------------------------------------------------------------------------------

    def settle_buffers(self, commit: bool) -> None:
        """After an evaluation: keep what moved (`commit`) or put it back."""
        if not self._slots or not self._moved():
            return
        if not commit:
            self.set_buffers(self._base)
        else:
            self._rebase()

    def copy_buffers(self) -> list[Tensor]:
        """Copies of all buffers."""
        return [b.detach().clone() for b in self._buffers()]

    def set_buffers(self, values: Sequence[Tensor]) -> None:
        """Write saved values into the buffers, in place; an empty list changes nothing."""
        if values:
            with torch.no_grad():
                for (slots, name), value in zip(self._slots, values, strict=True):
                    buffer = slots[name]
                    if buffer is None or buffer.shape != value.shape:
                        slots[name] = value.clone()
                    else:
                        buffer.copy_(value)
            self._rebase()

    def _buffers(self) -> list[Tensor]:
        return [b for b in (slots[name] for slots, name in self._slots) if b is not None]

    def _rebase(self) -> None:
        self._base = self.copy_buffers()
        self._versions = [(id(b), b._version) for b in self._buffers()]

    def _moved(self) -> bool:
        return self._versions != [(id(b), b._version) for b in self._buffers()]
