"""A plan that runs on a GPU, as two Triton kernels over tables that live there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridopt.engines import gpu
from hybridopt.optim._kind import NOTHING, Broken, Ineligible, Kind
from hybridopt.optim._plan import Number, Plan, increment_version

if TYPE_CHECKING:
    from hybridopt.optim._base import FusedStep

# elements a program: 8 for each of 128 threads, so that registers (70 to 90) leave room for others
BLOCK = 1024
_WIDE = 16  # bytes of the widest load


class DevicePlan(Plan):
    """See `Plan`. Steps, coefficients and options live on the device: nothing waits for it, a CUDA graph can record it.

    Tables go to the device when something moved; a gradient's new address is one small copy.
    """

    engine = "triton"

    def __init__(self, optimizer: FusedStep, index: int, kind: Kind, members: Sequence[bool]) -> None:
        super().__init__(optimizer, index, kind, members)
        self.device = kind.device
        self.width = len(self.table) // max(1, self.size)
        self.sent: list[Tensor] = []  # host memory that a recorded graph will read again
        self.tables = self._send(torch.tensor(self.table, dtype=torch.int64))
        coefficients = self.size * gpu.width(optimizer.rule, self.variant)
        self.numbers = torch.zeros(max(1, coefficients), dtype=torch.float64, device=self.device)
        self.told: list[float | None] = []
        self.hypers_there = self._send(torch.tensor(self.hyper, dtype=torch.float64))
        self.hyper_tensors: list[tuple[int, Tensor]] = []
        self.gradients_there = torch.zeros(max(1, self.size), dtype=torch.int64, device=self.device)
        self.never = torch.zeros(1, dtype=torch.float32, device=self.device)
        self.even: list[bool] = []
        self.aligned = self.unaligned = torch.empty(0, 2, dtype=torch.int32)
        self.all = self._blocks(range(self.size))
        self.module: Any = None
        if self.size:
            try:
                self.module = gpu.compiled(optimizer.rule, self.variant)
            except gpu.Untranslatable as error:
                raise Ineligible(str(error)) from error
            self._rehearse(optimizer._guarded)

    def _rehearse(self, guarded: bool) -> None:
        """Launch every kernel once where it changes nothing: what cannot be compiled or launched shows here.

        Raises:
            Broken: whatever Triton or the driver throws, torch's own code can still do the step.
        """
        known: str = getattr(self.module, "failed", "")  # a second try would take as long
        if known:
            raise Broken(known)
        chunk = torch.zeros(1, 2, dtype=torch.int32, device=self.device)
        nothing = torch.zeros(self.width, dtype=torch.int64, device=self.device)  # a row of no elements
        always = torch.ones(1, dtype=torch.float32, device=self.device)
        try:
            self._launch([(chunk, True), (chunk, False)], always)
            if guarded:
                self._sum_squares(nothing, chunk)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            self.module.failed = f"Triton cannot run it ({type(error).__name__}: {first})"
            raise Broken(self.module.failed) from error

    def _send(self, values: Tensor) -> Tensor:
        """A copy on the device that nobody waits for."""
        if self.device.type != "cuda":
            return values.to(self.device)
        pinned = values.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            self.sent.append(pinned)
        return pinned.to(self.device, non_blocking=True)

    def _moved(self) -> None:
        """Send the gradients' addresses; sort tensors by whether 16 bytes can be loaded at once."""
        if not self.size:
            return
        self.gradients_there.copy_(self._send(torch.tensor(self.gradients, dtype=torch.int64)))
        last = -1 if self.variant.stochastic else None
        rows = [self.table[t * self.width : (t + 1) * self.width] for t in range(self.size)]
        even = [
            all(address % _WIDE == 0 for address in (g, *row[1 + self.counters : last]))
            for g, row in zip(self.gradients, rows, strict=True)
        ]
        if even != self.even:
            self.even = even
            self.aligned = self._blocks([t for t, e in enumerate(even) if e])
            self.unaligned = self._blocks([t for t, e in enumerate(even) if not e])

    def _blocks(self, members: Sequence[int]) -> Tensor:
        """(tensor, number of the block) for every block of some tensors."""
        counts = torch.tensor([-(-self.numels[t] // BLOCK) for t in members], dtype=torch.int64)
        tensors = torch.tensor(members, dtype=torch.int64).repeat_interleave(counts)
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        blocks = torch.stack([tensors, torch.arange(len(tensors)) - first], dim=1)
        return self._send(blocks.to(torch.int32))

    def _refuses(self, group: Mapping[str, Any]) -> str:
        for key, value in group.items():
            if key not in ("params", "param_names"):
                for part in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(part, Tensor) and (part.requires_grad or part.numel() != 1):
                        return f"{key} requires a gradient, or is not one number"
        return ""

    def _take(self, hyper: Sequence[Any]) -> None:
        """Numbers are sent when they change; tensors are copied on the device at every step, also by a graph."""
        self.hyper_tensors = [(i, value) for i, value in enumerate(hyper) if isinstance(value, Tensor)]
        values = [None if isinstance(value, Tensor) else float(value) for value in hyper]
        if values != self.told:
            self.told = values
            there = torch.tensor([value or 0.0 for value in values], dtype=torch.float64)
            self.hypers_there[: self.hypers].copy_(self._send(there))

    def run(self, extras: Mapping[str, Number] = NOTHING, skip: Tensor | None = None) -> None:
        """See `Plan.run`."""
        if self.module is None:
            return
        for i, tensor in self.hyper_tensors:
            self.hypers_there[i].copy_(tensor.detach().reshape(()), non_blocking=True)
        for i, name in enumerate(self.extras, start=self.hypers):
            value = extras[name]
            if isinstance(value, Tensor):
                self.hypers_there[i].copy_(value.reshape(()))
            else:
                self.hypers_there[i].fill_(value)
        blocks = ((self.aligned, True), (self.unaligned, False))
        self._launch(blocks, self.never if skip is None else skip)
        increment_version(self.params)

    def _launch(self, blocks: Sequence[tuple[Tensor, bool]], flag: Tensor) -> None:
        """Both kernels; the second for blocks that are aligned, and for those that are not."""
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            begin = (self.tables, self.hypers_there, self.numbers, flag)
            self.module.begin[(self.size,)](*begin, num_warps=1)
            for chunks, aligned in blocks:
                if len(chunks):
                    self.module.apply[(len(chunks),)](
                        self.tables,
                        self.gradients_there,
                        chunks,
                        self.numbers,
                        flag,
                        BLOCK=BLOCK,
                        ALIGNED=aligned,
                        num_warps=4,
                        enable_fp_fusion=False,  # a rule says where it fuses; and the default differs by version
                    )

    def square_sum(self) -> Tensor:
        """See `Plan.square_sum`; stays on the device."""
        if not len(self.all):
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return self._sum_squares(self.tables, self.all).sum()

    def _sum_squares(self, tables: Tensor, chunks: Tensor) -> Tensor:
        out = torch.empty(len(chunks), dtype=torch.float64, device=self.device)
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            kernel = gpu.squares(self.variant.gradient).squares
            kernel[(len(chunks),)](
                tables, self.width, self.gradients_there, chunks, out, BLOCK=BLOCK, num_warps=4
            )
        return out
