"""One parameter group's compiled step: what it reads, what it checks before every use, and when it is refused."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import wait
from itertools import chain, compress, pairwise
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridopt.engines import cpu

if TYPE_CHECKING:
    from hybridopt.optim._base import FusedStep

# private in torch: makes autograd notice a write that it did not do
_increment_version: Callable[[Iterable[Tensor]], None] = torch._C._increment_version
_address = Tensor.data_ptr
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_PLAIN = (Tensor, torch.nn.Parameter)
PARALLEL_FROM = 1 << 18  # elements a step; below, waking a thread costs more than it saves
CHUNK = 1 << 16  # elements a piece of a parallel step
_NOTHING: dict[str, Any] = {}


class Ineligible(Exception):
    """Why a step cannot be compiled now (said in `repr`, and by a warning if `fused` was asked for)."""


class FirstStep(Ineligible):
    """A state does not exist yet: this step is not compiled, the next one will be."""


class Plan:
    """One parameter group's compiled step: addresses of weights, states and gradients, compared before every use.

    Whatever can move is read from the group and the states anew at each step (44 ns an address; AMD EPYC, 2026-11):
    a tensor may be replaced, or given other memory (`p.data = ...`, `share_memory_()`), without a word to us.
    Gradients are not kept alive.
    """

    def __init__(self, optimizer: FusedStep, group: dict[str, Any]) -> None:
        rule = optimizer.rule
        why = _group_ineligible(group)
        if why:
            raise Ineligible(why)
        flags = dict(zip(rule.flags, map(bool, optimizer._flags(group)), strict=True))
        active = rule.active(flags)
        self.flags = tuple(flags.values())
        self.scalar_names = (*(("step",) if rule.counts else ()), *rule.scalar_state)
        self.names = (*self.scalar_names, *active)
        members: list[Tensor] = group["params"]
        self.has_grad = [p.grad is not None for p in members]
        self.absent = [not present for present in self.has_grad] if not all(self.has_grad) else None
        self.params = list(compress(members, self.has_grad))
        self.entries = [optimizer.state.get(p, _NOTHING) for p in self.params] if self.names else []
        scalars: set[torch.dtype] = set()
        for i, p in enumerate(self.params):
            scalars |= self._check_weight(p, self.entries[i] if self.names else _NOTHING)
        if len({p.dtype for p in self.params}) > 1 or len(scalars) > 1:
            raise Ineligible("the weights of a group, or their counters, have different dtypes")
        self.get_states: Callable[[Mapping[str, Any]], Any] = itemgetter(*self.names) if self.names else len
        self.numels = [p.numel() for p in self.params]
        self.strides = [None if p.is_contiguous() else p.stride() for p in self.params]
        self.dtype = self.params[0].dtype if self.params else torch.float32
        self.options: tuple[Any, ...] = ()
        self.live = False
        self.size = len(self.params)
        self.split = self.size * (1 + len(self.names))
        self.addresses: list[int] = [*map(_address, self.params), *map(_address, self._states())]
        self.gradients = array("q", [0] * self.size)
        self.references: list[weakref.ref[Tensor]] = []
        self.table = self._table()
        self.hyper = array("d", [0.0] * max(1, len(rule.hyper)))
        self.scratch = array("d", [0.0] * max(1, self.size * len(rule.coefficients)))
        arrays = (self.table, self.gradients, self.hyper, self.scratch)
        self.block = array("q", [self.size, *(a.buffer_info()[0] for a in arrays), 0, 0, 0, 0])
        self.block_address = self.block.buffer_info()[0]
        self.chunks = self._cut() if sum(self.numels) >= PARALLEL_FROM else None
        self.module: Any = None
        if self.size:
            scalar = scalars.pop() if scalars else torch.float32
            try:
                self.module = cpu.compiled(rule, tuple(flags.items()), _DTYPES[self.dtype], _DTYPES[scalar])
            except cpu.Untranslatable as error:
                raise Ineligible(str(error)) from error

    def _check_weight(self, p: Tensor, entry: Mapping[str, Any]) -> set[torch.dtype]:
        """The dtypes of its per-tensor numbers; Ineligible if anything about it is not plain."""
        if type(p) not in _PLAIN or p.device.type != "cpu" or p.layout is not torch.strided:
            raise Ineligible(f"a weight is a {type(p).__name__} with layout {p.layout} on {p.device}")
        g = p.grad
        assert g is not None
        if p.dtype not in _DTYPES or g.dtype != p.dtype:
            raise Ineligible(f"a weight is {p.dtype} and its gradient {g.dtype}")
        if type(g) not in _PLAIN or g.device != p.device or g.layout is not torch.strided or g.is_neg():
            raise Ineligible(
                f"a gradient is a {type(g).__name__} with layout {g.layout} on {g.device}, or a view"
            )
        if p.is_neg() or not _dense(p) or not _alike(g, p):
            raise Ineligible("a gradient is laid out unlike its weight, or the weight has gaps")
        scalars: set[torch.dtype] = set()
        for name in self.names:
            tensor = entry.get(name)
            if tensor is None:
                raise FirstStep("first step, which creates the state")
            if (
                type(tensor) not in _PLAIN
                or tensor.device.type != "cpu"
                or tensor.layout is not torch.strided
            ):
                raise Ineligible(f"the state {name!r} is not a plain tensor on the CPU")
            if name in self.scalar_names:
                if tensor.numel() != 1 or tensor.dtype not in _DTYPES:
                    raise Ineligible(f"the state {name!r} is not one real number")
                scalars.add(tensor.dtype)
            elif tensor.dtype != p.dtype or tensor.is_neg() or not _alike(tensor, p):
                raise Ineligible(f"the state {name!r} is {tensor.dtype} or laid out unlike its weight")
        return scalars

    def _states(self) -> Iterable[Tensor]:
        found = map(self.get_states, self.entries)
        return chain.from_iterable(found) if len(self.names) > 1 else found

    def _table(self) -> array[int]:
        """Rows (elements, scalar states, weight, states) for the compiled loop."""
        table, width, split = array("q"), len(self.names), len(self.scalar_names)
        for t in range(self.size):
            states = self.addresses[self.size + t * width : self.size + (t + 1) * width]
            table.extend([self.numels[t], *states[:split], self.addresses[t], *states[split:]])
        return table

    def _cut(self) -> tuple[array[int], int]:
        """Pieces of (tensor, start, count) for several threads; a tensor without elements needs none."""
        pieces = array("q")
        for t, numel in enumerate(self.numels):
            for start in range(0, numel, CHUNK):
                pieces.extend((t, start, min(CHUNK, numel - start)))
        return pieces, len(pieces) // 3

    # -- every step -----------------------------------------------------------------------------------------------

    def refresh(self, optimizer: FusedStep, group: dict[str, Any]) -> bool:
        """Read what may have moved; False if anything but gradients and numbers has, and the plan must be rebuilt."""
        options = group.values()
        if self.live or len(options) != len(self.options) or not all(map(is_, options, self.options)):
            if not self._read_hyper(optimizer, group):
                return False
        params = group["params"]
        grads = [p.grad for p in params]
        if self.absent is not None:
            if len(grads) != len(self.absent) or any(g is not None for g in compress(grads, self.absent)):
                return False
            params, grads = list(compress(params, self.has_grad)), list(compress(grads, self.has_grad))
        try:
            addresses = [*map(_address, params), *map(_address, self._states()), *map(_address, grads)]
        except (
            KeyError,
            TypeError,
            RuntimeError,
        ):  # a state is gone or no tensor; None or sparse; no memory at all
            return False
        moved = addresses != self.addresses
        if moved and (len(grads) != self.size or addresses[: self.split] != self.addresses[: self.split]):
            return False
        if moved or not all(map(is_, grads, [reference() for reference in self.references])):
            if not self._alike(grads):
                return False
            self.references = [weakref.ref(g) for g in grads]
            self.gradients[:] = array("q", addresses[self.split :])
            self.addresses = addresses
        return True

    def _alike(self, grads: Sequence[Tensor]) -> bool:
        """Whether gradients lie in memory as their weights do."""
        dtype = self.dtype
        for g, numel, stride in zip(grads, self.numels, self.strides, strict=True):
            if (
                g.dtype is not dtype
                or g.numel() != numel
                or not (g.is_contiguous() if stride is None else g.stride() == stride)
                or type(g) not in _PLAIN
                or g.is_neg()
            ):
                return False
        return True

    def _read_hyper(self, optimizer: FusedStep, group: dict[str, Any]) -> bool:
        """Take over changed hyperparameters; False if one is not a number in the compiled variant."""
        if self.flags != tuple(map(bool, optimizer._flags(group))) or _group_ineligible(group):
            return False
        self.hyper[:] = array("d", map(float, optimizer._hyper(group) or (0.0,)))
        self.options = tuple(group.values())
        self.live = any(
            _mutable(value) for key, value in group.items() if key not in ("params", "param_names")
        )
        return True

    def run(self) -> None:
        """Do the step."""
        if self.module is None:
            return
        threads = 1 if self.chunks is None else torch.get_num_threads()
        if threads == 1 or self.chunks is None:
            self.module.run(self.block_address)
        else:
            self._run_parallel(*self.chunks, threads)
        _increment_version(self.params)

    def _run_parallel(self, chunks: array[int], count: int, threads: int) -> None:
        shared = list(self.block[:5])
        begin = array("q", [*shared, 1, 0, 0, 0])
        self.module.run(begin.buffer_info()[0])
        ends = [count * i // threads for i in range(threads + 1)]
        blocks = [array("q", [*shared, 2, chunks.buffer_info()[0], *ends]) for ends in pairwise(ends)]
        pool: Any = cpu.pool(threads - 1)
        others = [pool.submit(self.module.run, block.buffer_info()[0]) for block in blocks[1:]]
        try:
            self.module.run(blocks[0].buffer_info()[0])
        finally:  # nobody may free this memory while a thread writes to it
            wait(others)


def _group_ineligible(group: Mapping[str, Any]) -> str:
    """Which option of a group only torch's own code serves; empty if none."""
    for option in ("differentiable", "capturable"):
        if group.get(option):
            return f"{option}=True"
    for key, value in group.items():
        if key not in ("params", "param_names"):
            if isinstance(value, Tensor) and (value.requires_grad or value.device.type != "cpu"):
                return f"{key} is a tensor on a device or requires a gradient"
            if isinstance(value, Tensor) and any(
                p.dtype.itemsize > value.dtype.itemsize for p in group["params"]
            ):
                return f"{key} is a tensor of less precision than a weight (torch then computes with that)"
            if isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
                return f"{key} holds a tensor (torch then corrects biases in that tensor's precision)"
    return ""


def _mutable(value: Any) -> bool:
    """Whether an option may change without being replaced."""
    if isinstance(value, tuple):
        return any(_mutable(part) for part in value)
    return not (value is None or isinstance(value, float | int | str))


def _alike(a: Tensor, p: Tensor) -> bool:
    """Whether element i in memory is the same element of both."""
    return a.shape == p.shape and (a.stride() == p.stride() or (a.is_contiguous() and p.is_contiguous()))


def _dense(p: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in some order of dimensions."""
    if p.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
