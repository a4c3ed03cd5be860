"""Whether everything is where it was: asked at every step, so of all objects and tensors at once where that can be."""

from __future__ import annotations

import ctypes
import functools
import sys
from array import array
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from hybridopt.engines import cpu

PLAIN = (Tensor, torch.nn.Parameter)
_END = object()
END = (_END,)  # stands between containers: what goes from one to the next does not go unnoticed
# of torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h); each is `int32 f(at::Tensor *, out *)`
_TELL = ("data_ptr", "dim", "sizes", "strides", "dtype", "layout", "device_type", "device_index")


class Contents:
    """The objects that containers held, to be compared with those that they hold now."""

    def __init__(self, containers: Sequence[Collection[Any]]) -> None:
        self.containers = [*containers, END]
        self.known = [*chain.from_iterable(self.containers)]

    def same(self) -> bool:
        """Whether they are the same objects in the same order."""
        return all(map(is_, chain.from_iterable(self.containers), self.known))


class Memory:
    """What compiled code compares tensors with; about 10 ns a tensor, where asking from Python takes 50 to 200.

    Args:
        laid_out: tensors of one dtype and device whose layout must stay, too; at least one.
        others: tensors of which only the address counts.
        addresses: of all their data; `look` puts down there what has changed. None = an own list, never changed.
    """

    def __init__(
        self, laid_out: Sequence[Tensor], others: Sequence[Tensor], addresses: array[int] | None = None
    ) -> None:
        self.tensors = tensors = [*laid_out, *others]
        self.layouts = array("q")
        for t in laid_out:
            self.layouts.extend((t.dim(), *t.shape, *t.stride()))
        self.layouts.extend(-1 for _ in others)
        self.addresses = array("q", map(Tensor.data_ptr, tensors)) if addresses is None else addresses
        known = [a.buffer_info()[0] for a in (self.addresses, self.layouts)]
        self.block = array("q", [len(tensors), id(tensors), *known, 0, *functions()])
        self.block.extend([*_asked(laid_out[0], 4), *map(id, PLAIN), addresses is not None])
        self.address = self.block.buffer_info()[0]
        self.compiled: Callable[[int], int] = cpu.watch().look

    def same(self) -> bool:
        """Whether all are as they were."""
        return self.compiled(self.address) == 0

    def look(self, tensors: list[Any]) -> int:
        """How many of these objects, equally many, have other addresses; -1 if one is of another kind."""
        self.block[1] = id(tensors)
        return self.compiled(self.address)


@functools.cache
def functions() -> tuple[int, ...]:
    """Addresses of torch's functions; empty where they, numba, or CPython's objects as we know them, are missing."""
    if (
        cpu.available()
        or sys.implementation.name != "cpython"
        or object.__basicsize__ != 16
        or list.__basicsize__ != 40
    ):
        return ()
    items = [_END, END]
    if _number_at(_number_at(id(items) + 24) + 8) != id(END) or _number_at(id(items) + 8) != id(list):
        return ()
    try:
        found = [
            ctypes.cast(getattr(_library(), f"aoti_torch_get_{name}"), ctypes.c_void_p) for name in _TELL
        ]
        cpu.watch()
    except (OSError, AttributeError, cpu.Untranslatable):
        return ()
    return tuple(address.value or 0 for address in found)


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(torch._C.__file__)


def readable(tensors: Sequence[Tensor]) -> bool:
    """Whether `Memory` can be made of tensors."""
    return bool(tensors) and bool(functions()) and all(map(_is_behind_its_header, tensors))


def _is_behind_its_header(t: Tensor) -> bool:
    """Whether 16 bytes behind a tensor's address is its `at::Tensor`, as torch's own way to one has it."""
    handle = _pointer(torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(t), None)
    try:
        return _number_at(id(t) + 16) == _number_at(handle)
    finally:
        _library().aoti_torch_delete_tensor_object(ctypes.c_void_p(handle))


def _asked(t: Tensor, first: int) -> list[int]:
    """What torch's functions from number `first` on say of a tensor."""
    told = ctypes.c_int32()
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
    answers = []
    for function in functions()[first:]:
        kind(function)(id(t) + 16, ctypes.addressof(told))
        answers.append(told.value & 0xFFFFFFFF)
    return answers


def _number_at(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
