"""A plan that runs on the CPU, as one compiled loop."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridopt.engines import cpu
from hybridopt.engines._variant import SIZES
from hybridopt.optim._flat import gradients_together, padded
from hybridopt.optim._kind import NOTHING, Ineligible, Kind, reals, wrong_number
from hybridopt.optim._plan import Number, Plan, increment_version
from hybridopt.optim._watch import touching

if TYPE_CHECKING:
    from hybridopt.optim._base import FusedStep

PARALLEL_FROM = 1 << 18  # elements a step; below, waking a thread costs more than it saves
CHUNK = 1 << 16  # elements a piece of a parallel step, and of a sum


class CpuPlan(Plan):
    """See `Plan`; the compiled loop gets the address of one block of addresses."""

    engine = "llvm"

    def __init__(self, optimizer: FusedStep, index: int, kind: Kind, members: Sequence[bool]) -> None:
        super().__init__(optimizer, index, kind, members)
        width = cpu.width(optimizer.rule, self.variant)
        self.scratch = array("d", [0.0] * max(1, self.size * width))
        self.joins = array("q", cpu.joins(optimizer.rule, self.variant))
        arrays = (self.table, self.gradients, self.hyper, self.scratch)
        # next piece, pieces, their address, work, ...; see `STEPS`
        self.block = array("q", [0, 0, 0, 0, self.size, *(a.buffer_info()[0] for a in arrays)])
        self.block.extend([0, cpu.columns(optimizer.rule, self.variant), width, self.joins.buffer_info()[0]])
        # a weight that is listed twice, or shares memory with another, is stepped twice, one after the other
        alone = _apart(self.params)
        self.pieces = array("q")
        self.parallel = alone and sum(self.numels) >= PARALLEL_FROM
        self.touching = touching(self.params)
        self.block.append(0 if self.touching is None else self.touching.buffer_info()[0])
        if self.size:
            try:
                self.block[9] = cpu.compiled(optimizer.rule, self.variant)
                if optimizer._guarded:
                    cpu.squares(self.variant.gradient)
                self.step = cpu.native().methods["run"]
            except cpu.Untranslatable as error:
                raise Ineligible(str(error)) from error
        self.block_address = self.block.buffer_info()[0]

    def _cut(self) -> array[int]:
        """Pieces of (tensor, start, count), in the order of memory as far as the tensors are."""
        if not self.pieces:
            for t, numel in enumerate(self.numels):
                for start in range(0, numel, CHUNK):
                    self.pieces.extend((t, start, min(CHUNK, numel - start)))
        return self.pieces

    def _moved(self) -> None:
        """The loop reads `gradients` itself; where all is flat, each weight reaches to the next one."""
        if self.layout is not None and self.size:
            flat = gradients_together(self.layout, self.params)
            counts = [reals(p.dtype) * padded(p) for p in self.params] if flat else self.numels
            self.table[:: len(self.table) // self.size] = array("q", counts)

    def _refuses(self, group: Mapping[str, Any]) -> str:
        return "capturable=True" if group.get("capturable") else wrong_number(group, self.kind.weight)

    def _take(self, hyper: Sequence[Any]) -> None:
        self.hyper[: self.hypers] = array("d", map(float, hyper))

    def run(self, extras: Mapping[str, Number] = NOTHING, skip: Tensor | None = None) -> None:
        """See `Plan.run`."""
        if not self.size:
            return
        if extras:
            for i, name in enumerate(self.extras):
                self.hyper[self.hypers + i] = float(extras[name])
        if self.parallel and (threads := torch.get_num_threads()) > 1:
            begin = self._block(1)  # held: compiled code reads it
            self.step(begin.buffer_info()[0])
            cpu.together("run", self._block(2), threads)
        else:
            self.step(self.block_address)
            if self.touching is not None:
                return
        increment_version(self.params)

    def _block(self, work: int) -> array[int]:
        """For a parallel step, which claims its pieces from it."""
        pieces = self._cut()
        return array("q", [0, len(pieces) // 3, pieces.buffer_info()[0], work, *self.block[4:]])

    def square_sum(self) -> float:
        """See `Plan.square_sum`. Pieces of fixed size, summed in order: the same bits for any number of threads."""
        pieces = self._cut()
        count = len(pieces) // 3
        if not count:
            return 0.0
        out = array("d", [0.0] * count)
        addresses = [a.buffer_info()[0] for a in (pieces, self.gradients, out)]
        dtype = self.variant.gradient
        block = array("q", [0, count, *addresses, cpu.squares(dtype), SIZES[dtype]])
        parallel = sum(self.numels) >= PARALLEL_FROM
        cpu.together("squares", block, torch.get_num_threads() if parallel else 1)
        return sum(out)


def _apart(tensors: Sequence[Tensor]) -> bool:
    """Whether none begins where another has not ended."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    return all(end <= begin for (_, end), (begin, _) in pairwise(spans))
