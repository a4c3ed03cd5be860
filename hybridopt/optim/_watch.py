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
_FIND = "_ZNK3c1010TensorImpl4gradEv"  # c10::TensorImpl::grad() const: not stable, therefore tried before use
_AHEAD = 6  # rows past the last that compiled code reads
_TELL = ("data_ptr", "dim", "sizes", "strides", "dtype", "layout", "device_type", "device_index")


class Contents:
    """The objects that containers held, to be compared with those that they hold now."""

    def __init__(self, containers: Sequence[Collection[Any]]) -> None:
        self.containers = [*containers, END]
        self.known = [*chain.from_iterable(self.containers)]

    def same(self) -> bool:
        """Whether they are the same objects in the same order."""
        return all(map(is_, chain.from_iterable(self.containers), self.known))


class Versions:
    """Whether lists hold the same objects, and dicts were not written to; compiled, where CPython counts versions.

    Answers "no" where it cannot know: `Contents` then tells.
    """

    def __init__(self, lists: Sequence[list[Any]] = (), dicts: Sequence[dict[Any, Any]] = ()) -> None:
        self.kept = lists, dicts, [list(one) for one in lists]
        self.block: array[int] | None = None
        read = all(isinstance(one, list) for one in lists) and all(isinstance(one, dict) for one in dicts)
        if lists and read and counts_versions():
            self.block = array("q", [len(lists)])
            for one in lists:
                self.block.extend([id(one), len(one), *map(id, one)])
            self.block.append(len(dicts))
            for other in dicts:
                self.block.extend([id(other), _number_at(id(other) + 24)])
            self.address = self.block.buffer_info()[0]
            self.compiled: Callable[[int], int] = cpu.native().methods["same"]

    def same(self) -> bool:
        """Whether all is known to be as it was."""
        return self.block is not None and self.compiled(self.address) == 1

    def same_but(self, count: int) -> bool:
        """Whether all but the first `count` dicts is known to be as it was; these are taken as they are now."""
        if self.block is None:
            return False
        dicts = self.kept[1]
        first = len(self.block) - 2 * len(dicts)
        for i, one in enumerate(dicts[:count]):
            self.block[first + 2 * i + 1] = _number_at(id(one) + 24)
        return self.same()


@functools.cache
def counts_versions() -> bool:
    """Whether a dict has a number, where CPython 3.11 has it, that every change of it changes."""
    if not functions():
        return False
    seen, one = set(), {"a": 1}
    for change in (
        lambda: one.update(a=2),
        lambda: one.update(b=3),
        lambda: one.pop("b"),
        one.clear,
        lambda: one.update(a=2),
    ):
        seen.add(_number_at(id(one) + 24))
        change()
    return len(seen | {_number_at(id(one) + 24)}) == 6


class Memory:
    """What compiled code compares tensors with; 10 to 30 ns a tensor, where asking from Python takes 50 to 200.

    Args:
        laid_out: tensors of one dtype and device whose layout must stay, too; at least one.
        others: tensors of which only the address counts.
    """

    def __init__(self, laid_out: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self.tensors = [*laid_out, *others]
        self.addresses = array("q", map(Tensor.data_ptr, self.tensors))
        self._watch(laid_out, len(others), (0, 0, 0))

    def _watch(self, laid_out: Sequence[Tensor], others: int, finding: tuple[int, int, int]) -> None:
        self.layouts = array("q")
        for t in laid_out:
            self.layouts.extend((t.dim(), *t.shape, *t.stride()))
        self.layouts.extend(-1 for _ in range(others))
        known = [a.buffer_info()[0] for a in (self.addresses, self.layouts)]
        self.block = array("q", [len(self.tensors), id(self.tensors), *known, 0, *functions()[: len(_TELL)]])
        words, *places = _place_of_words()
        self.rows = array("q", [-1]) * ((len(self.tensors) + _AHEAD) * (words + 4) if words else 0)
        self.block.extend([*_asked(laid_out[0], 4), *map(id, PLAIN), *finding])
        self.block.extend([self.rows.buffer_info()[0] if words else 0, words, *places, 0])
        self.address = self.block.buffer_info()[0]
        self.compiled: Callable[[int], int] = cpu.native().methods["look"]

    def look(self, gradients: Gradients | None = None) -> int:
        """-1 if a tensor here, or a gradient, is not as it was; else how many gradients have other addresses."""
        self.block[-1] = 0 if gradients is None else gradients.address
        return self.compiled(self.address)


class Gradients(Memory):
    """The same for the gradients of weights, which are not kept alive; their new addresses are put down."""

    def __init__(self, weights: list[Tensor], gradients: Sequence[Tensor], addresses: array[int]) -> None:
        self.tensors, self.addresses = weights, addresses
        self._watch(gradients, 0, (functions()[-1], _place_of_keys(), _keys(gradients[0])))


@functools.cache
def functions() -> tuple[int, ...]:
    """Addresses of torch's functions; empty where they, LLVM, or CPython's objects as we know them, are missing."""
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
    names = [*(f"aoti_torch_get_{name}" for name in _TELL), _FIND]
    try:
        found = [ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value or 0 for name in names]
        cpu.native()
        return tuple(found) if _finds_gradients(found[-1]) else ()
    except (
        OSError,
        AttributeError,
        TypeError,
        ValueError,
        cpu.Untranslatable,
    ):  # other names, other meanings
        return ()


def _finds_gradients(function: int) -> bool:
    """Whether torch's function tells the address of a weight's gradient, and dispatch keys are found."""
    p = torch.zeros(1, requires_grad=True)
    p.grad = torch.zeros(1)
    if not _is_behind_its_header(p):  # nothing may be called on what is no tensor
        return False
    find = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(function)
    handle = find(_number_at(id(p) + 16))
    return handle is not None and _number_at(handle) == _number_at(id(p.grad) + 16) and _place_of_keys() > 0


@functools.cache
def _place_of_keys() -> int:
    """Where in a `c10::TensorImpl` its dispatch keys stand, which tell views, layouts and kinds apart; 0 = unknown."""
    plain = torch.zeros(1)
    tensors = [plain, torch._neg_view(plain), plain.double().requires_grad_()]
    return _place([_number_at(id(t) + 16) for t in tensors], [*map(_keys, tensors)], range(8, 192, 8))


@functools.cache
def _place_of_words() -> tuple[int, int, int]:
    """How many words of a `c10::TensorImpl`, from the third on, tell all of a tensor of up to five dimensions.

    Their last are the dispatch keys. And where the address of the storage stands, and in that the address of the data
    with the two words that follow (who frees it, and what else he must know). Zeros where any of this is unknown.
    """
    keys = _place_of_keys()
    with torch.inference_mode(False), torch.no_grad():
        t, *others = (torch.zeros(size, dtype=torch.float32, device="cpu") for size in ((4, 6), (3,), (5, 2)))
        tensors = [t, others[0], others[1][1:]]
        stores = [one.untyped_storage() for one in tensors]
        handles, impls = [store._cdata for store in stores], [_number_at(id(one) + 16) for one in tensors]
        at = _place(impls, handles, range(16, keys, 8))
        data = _place(handles, [store.data_ptr() for store in stores], range(8, 64, 8))
        if not at or not data:
            return 0, 0, 0
        seen = {_words_of(t, keys)}
        changes: list[Callable[[], Any]] = [
            lambda: t.t_(),
            lambda: t.resize_(2, 3, 4),
            lambda: t.resize_(24),
            lambda: t.as_strided_((24,), (0,)),
            lambda: t.as_strided_((2,), (0,), 1),
            lambda: setattr(t, "data", t.view(torch.int32)),
            lambda: setattr(t, "data", torch._neg_view(t)),
        ]
        for change in changes:
            change()
            seen.add(_words_of(t, keys))
    return (keys // 8 - 1, at, data) if len(seen) == 1 + len(changes) else (0, 0, 0)


def _place(addresses: Sequence[int], words: Sequence[int], places: range) -> int:
    """Where behind each address its word stands; 0 = nowhere."""
    pairs = [*zip(addresses, words, strict=True)]
    return next((at for at in places if all(_number_at(a + at) == word for a, word in pairs)), 0)


def _words_of(t: Tensor, keys: int) -> tuple[int, ...]:
    return tuple(_number_at(_number_at(id(t) + 16) + at) for at in range(16, keys + 8, 8))


def touching(tensors: list[Tensor]) -> array[int] | None:
    """A block for `touch`, with which compiled code says that tensors have changed; None where it cannot.

    torch's own function takes 100 ns a tensor for it.
    """
    place, within = _place_of_version()
    if not place or not readable(tensors) or any(t.is_inference() for t in tensors):
        return None
    return array("q", [len(tensors), id(tensors), place, within])


@functools.cache
def _place_of_version() -> tuple[int, int]:
    """Where in a `c10::TensorImpl` the address of its version's counter stands, and where in that the number.

    A tensor shares the counter with what is detached from it, and not with its `data`, which shares all else.
    """
    with torch.inference_mode(False), torch.no_grad():
        tensors = [torch.zeros(n, device="cpu") for n in (1, 2)]
        tensors.append(torch.nn.Parameter(torch.zeros(3, device="cpu")))
        if not readable(tensors):
            return 0, 0
        for t, count in zip(tensors, (3, 7, 12), strict=True):
            for _ in range(count):
                t.add_(1)
    for place in range(8, 96, 8):
        words = [
            [_number_at(_number_at(id(t) + 16) + place) for t in (u, u.detach(), u.data)] for u in tensors
        ]
        if not all(a == b != c and a > 4096 and a % 8 == 0 for a, b, c in words):
            continue
        for within in (8, 16):
            found = [_number_at(a + within) & 0xFFFFFFFF for a, *_ in words]  # what stands above is anything
            if found == [t._version for t in tensors]:
                return place, within
    return 0, 0


def _keys(t: Tensor) -> int:
    keys: int = torch._C._dispatch_keys(t).raw_repr()
    return keys if keys < 1 << 63 else keys - (1 << 64)


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
    for function in functions()[first : len(_TELL)]:
        kind(function)(id(t) + 16, ctypes.addressof(told))
        answers.append(told.value & 0xFFFFFFFF)
    return answers


def _number_at(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
