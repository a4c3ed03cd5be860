"""What an evaluation must not change: gradients, modes and buffers of the caller's model."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hybridopt.vector import ParameterVector


class _Found(NamedTuple):
    grad: Tensor | None
    requires_grad: bool


_TENSORS: dict[int, tuple[int, Tensor, _Found]] = {}  # id -> holders, tensor, as found by the first of them


def _release(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        holders, _, first = _TENSORS.pop(id(tensor))
        if holders > 1:
            _TENSORS[id(tensor)] = (holders - 1, tensor, first)
        else:
            tensor.grad = first.grad
            tensor.requires_grad_(first.requires_grad)


class ModelGuard:
    """Holds a model's `.grad`, `requires_grad`, train/eval modes and buffers during a run; gives them back.

    Buffers (BatchNorm statistics) move only at evaluations that are committed; after any other one they are put
    back. Noticing costs one version comparison a buffer; copies are made only when a buffer did change. What is written
    through `.data` raises no version: where the first evaluation does so, numbers are compared after every one.
    """

    def __init__(self, vector: ParameterVector) -> None:
        self.vector = vector
        self.held = False
        module = vector.module
        self._slots: list[tuple[dict[str, Tensor | None], str]] = []
        if module is not None:
            self._slots = [(sub._buffers, name) for sub in module.modules() for name in sub._buffers]
        chosen = {id(t) for t in vector.tensors}
        self._others = [] if module is None else [p for p in module.parameters() if id(p) not in chosen]
        self._originals: list[Tensor | None] | None = None
        self._base: list[Tensor | None] = []
        self._versions: list[tuple[int, int]] = []
        self._unversioned: bool | None = None
        """Whether numbers change without a version; None = not yet known."""

    def open(self) -> None:
        """Take hold: `.grad` is cleared, all chosen weights require gradients."""
        module = self.vector.module
        self._modes = [] if module is None else [(sub, sub.training) for sub in module.modules()]
        held = [*self.vector.tensors, *self._others]
        for tensor in held:
            found = _Found(tensor.grad, tensor.requires_grad)
            holders, _, first = _TENSORS.get(id(tensor), (0, tensor, found))
            _TENSORS[id(tensor)] = (holders + 1, tensor, first)
        for tensor in self.vector.tensors:
            tensor.requires_grad_(True)
        self.clear_gradients()
        self._rebase()
        self.held = True
        self._release = weakref.finalize(self, _release, held)  # also when it is merely dropped

    def close(self) -> None:
        """Give back: `.grad`, `requires_grad` and modes as found; weights and buffers as they stand.

        Where several hold one weight, the last to close gives it back.
        """
        self._release()
        for sub, training in self._modes:
            sub.training = training
        self.held = False

    def clear_gradients(self) -> None:
        """Set every weight's `.grad` to None, also where the loss's own backward leaves one unasked."""
        for tensor in (*self.vector.tensors, *self._others):
            tensor.grad = None

    # -- buffers ------------------------------------------------------------------------------------------------

    def lend_buffers(self) -> None:
        """Let the module work on copies, so that what its graph keeps stays as it was when they are put back."""
        if self._slots:
            self._originals = self._buffers()
            for (slots, name), copied in zip(self._slots, self.copy_buffers(), strict=True):
                slots[name] = copied

    def return_buffers(self) -> None:
        """Put the module's own buffers back, which nobody has written."""
        if self._originals is not None:
            for (slots, name), buffer in zip(self._slots, self._originals, strict=True):
                slots[name] = buffer
            self._originals = None

    def base_buffers(self) -> list[Tensor | None]:
        """The buffers as last settled: copies that are never written."""
        return self._base

    def settle_buffers(self, commit: bool) -> None:
        """After an evaluation: keep what moved (`commit`) or put it back."""
        if not self._slots or not self._moved():
            return
        if not commit:
            self.set_buffers(self._base)
        else:
            self._rebase()

    def copy_buffers(self) -> list[Tensor | None]:
        """Copies of all buffers, one of what stands in several places; None where there is none (yet)."""
        found = self._buffers()
        copies = {
            id(b): None if b is None else b.detach().clone() for b in {id(b): b for b in found}.values()
        }
        return [copies[id(b)] for b in found]

    def set_buffers(self, values: Sequence[Tensor | None]) -> None:
        """Write saved values into the buffers, in place; an empty list changes nothing."""
        if not values:
            return
        made: dict[int, Tensor] = {}  # one of what stands in several places
        with torch.no_grad():
            for (slots, name), value in zip(self._slots, values, strict=True):
                buffer = slots[name]
                if value is None:
                    slots[name] = None
                elif buffer is None or buffer.shape != value.shape:
                    if id(value) not in made:
                        made[id(value)] = value.clone()
                    slots[name] = made[id(value)]
                else:
                    buffer.copy_(value)
        self._rebase()

    def _buffers(self) -> list[Tensor | None]:
        return [slots[name] for slots, name in self._slots]

    def _rebase(self) -> None:
        self._base = self.copy_buffers()
        self._versions = self._stamps()

    def _stamps(self) -> list[tuple[int, int]]:
        return [(id(b), 0 if b is None else b._version) for b in self._buffers()]

    def _moved(self) -> bool:
        stamps = self._stamps()
        if self._unversioned is None:
            self._unversioned = self._differ(stamps)
        return self._versions != stamps or (self._unversioned and self._differ(stamps))

    def _differ(self, stamps: list[tuple[int, int]]) -> bool:
        """Whether a buffer of the version that was settled holds other numbers than then."""
        return any(
            before == now and a is not None and b is not None and not torch.equal(a, b)
            for before, now, a, b in zip(self._versions, stamps, self._base, self._buffers(), strict=True)
        )
