"""A plan that runs on the CPU, as one numba loop."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridopt.engines import cpu
from hybridopt.optim._flat import gradients_together, padded
from hybridopt.optim._plan import _NOTHING, Ineligible, Kind, Number, Plan, _increment_version, wrong_number

if TYPE_CHECKING:
    from hybridopt.optim._base import FusedStep

PARALLEL_FROM = 1 << 18  # elements a step; below, waking a thread costs more than it saves
CHUNK = 1 << 16  # elements a piece of a parallel step, and of a sum


class CpuPlan(Plan):
    """See `Plan`; the compiled loop gets the address of one block of addresses."""

    engine = "numba"

    def __init__(self, optimizer: FusedStep, index: int, kind: Kind, members: Sequence[bool]) -> None:
        super().__init__(optimizer, index, kind, members)
        width = cpu.width(optimizer.rule, self.variant)
        self.scratch = array("d", [0.0] * max(1, self.size * width))
        arrays = (self.table, self.gradients, self.hyper, self.scratch)
        self.block = array("q", [self.size, *(a.buffer_info()[0] for a in arrays), 0, 0, 0, 0])
        self.block_address = self.block.buffer_info()[0]
        # a weight that is listed twice, or shares memory with another, is stepped twice, one after the other
        alone = _apart(self.params)
        self.pieces: dict[int, tuple[array[int], list[int]]] = {}
        self.parallel = alone and sum(self.numels) >= PARALLEL_FROM
        self.module: Any = None
        if self.size:
            try:
                self.module = cpu.compiled(optimizer.rule, self.variant)
                if optimizer._guarded:
                    cpu.squares(self.variant.gradient)
            except cpu.Untranslatable as error:
                raise Ineligible(str(error)) from error

    def _cut(self, threads: int) -> tuple[array[int], list[int]]:
        """Pieces of (tensor, start, count), sorted by thread, and where in them each thread begins and the last ends.

        A piece goes to the thread that has the fewest elements so far: all work in the same part of the memory.
        """
        if threads not in self.pieces:
            shares, sizes = [array("q") for _ in range(threads)], [0] * threads
            for t, numel in enumerate(self.numels):
                for start in range(0, numel, CHUNK):
                    count, least = min(CHUNK, numel - start), sizes.index(min(sizes))
                    shares[least].extend((t, start, count))
                    sizes[least] += count
            ends = accumulate((len(share) // 3 for share in shares), initial=0)
            self.pieces[threads] = sum(shares, array("q")), list(ends)
        return self.pieces[threads]

    def _moved(self) -> None:
        """The loop reads `gradients` itself; where all is flat, each weight reaches to the next one."""
        if self.layout is not None and self.size:
            flat = gradients_together(self.layout, self.params)
            counts = map(padded, self.params) if flat else self.numels
            self.table[:: len(self.table) // self.size] = array("q", counts)

    def _refuses(self, group: Mapping[str, Any]) -> str:
        return "capturable=True" if group.get("capturable") else wrong_number(group)

    def _take(self, hyper: Sequence[Any]) -> None:
        self.hyper[: self.hypers] = array("d", map(float, hyper))

    def run(self, extras: Mapping[str, Number] = _NOTHING, skip: Tensor | None = None) -> None:
        """See `Plan.run`."""
        if self.module is None:
            return
        if extras:
            for i, name in enumerate(self.extras):
                self.hyper[self.hypers + i] = float(extras[name])
        if self.parallel and (threads := torch.get_num_threads()) > 1:
            self._run_parallel(*self._cut(threads), threads)
        else:
            self.module.run(self.block_address)
        _increment_version(self.params)

    def _run_parallel(self, chunks: array[int], ends: list[int], threads: int) -> None:
        shared = list(self.block[:5])
        begin = array("q", [*shared, 1, 0, 0, 0])
        self.module.run(begin.buffer_info()[0])
        blocks = [array("q", [*shared, 2, chunks.buffer_info()[0], *ends]) for ends in pairwise(ends)]
        pool: Any = cpu.pool(threads - 1)
        others = [pool.submit(self.module.run, block.buffer_info()[0]) for block in blocks[1:]]
        try:
            self.module.run(blocks[0].buffer_info()[0])
        finally:  # nobody may free this memory while a thread writes to it
            wait(others)

    def square_sum(self) -> float:
        """See `Plan.square_sum`. Pieces of fixed size, summed in order: the same bits for any number of threads."""
        if not self.size:
            return 0.0
        pieces, (_, count) = self._cut(1)
        out = array("d", [0.0] * max(1, count))
        addresses = (self.gradients, pieces, out)
        block = array("q", [count, *(a.buffer_info()[0] for a in addresses)])
        cpu.squares(self.variant.gradient).run(block.buffer_info()[0])
        return sum(out)


def _apart(tensors: Sequence[Tensor]) -> bool:
    """Whether none begins where another has not ended."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    return all(end <= begin for (_, end), (begin, _) in pairwise(spans))
