"""The questions a solver asked (as digests) and the answers it was told: enough to revive it bit for bit."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hybridopt.optimizer import Answer, Kind, Request

# Never renumber: they are in saved files.
_KINDS = {
    Kind.VALUE: 0,
    Kind.GRADIENT: 1,
    Kind.VALUE_AND_GRADIENT: 2,
    Kind.POPULATION: 3,
    Kind.RESIDUALS: 4,
    Kind.JACOBIAN: 5,
    Kind.LIMITS: 6,
    Kind.CONSTRAINTS: 7,
    Kind.CONSTRAINT_JACOBIAN: 8,
    Kind.HESSIAN: 9,
    Kind.HESSIAN_VECTOR: 10,
}
_KIND, _FINITE, _HAS_GRADIENT, _SURROGATE, _BROKEN = 15, 16, 32, 64, 128


def digest(request: Request) -> int:
    """64 bits of a question: its kind and its exact point."""
    code = bytes([_KINDS[request.kind]])
    point = b"" if request.x is None else request.x.tobytes()
    if request.direction is not None:
        point += request.direction.tobytes()
    return int.from_bytes(hashlib.blake2b(code + point, digest_size=8).digest(), "little")


class Journal:
    """Answers in the order given: 17 bytes a question, and 8 a number told (losses, gradients, Jacobians)."""

    def __init__(self) -> None:
        self._flags = bytearray()
        self._digests = array("Q")
        self._ends = array("Q")  # of each entry in `_numbers`
        self._numbers = array("d")
        self._shapes: dict[int, tuple[int, ...]] = {}  # of the arrays told, by entry
        self._read = 0

    def __len__(self) -> int:
        return len(self._flags)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 17 * len(self._flags) + 8 * len(self._numbers)

    def append(self, request: Request, answer: Answer) -> None:
        """Record one question and what was told (copied: solvers write into what they are given).

        An interrupt in here leaves the journal without the entry, never with half of it.
        """
        entries = len(self._flags)
        del self._digests[entries:], self._ends[entries:], self._numbers[self._end(entries) :]
        self._shapes.pop(entries, None)
        flags = _KINDS[request.kind] | (_FINITE if answer.finite else 0)
        self._numbers.append(answer.loss)
        if answer.violation:
            flags |= _BROKEN
            self._numbers.append(answer.violation)
        if answer.gradient is not None:
            flags |= _HAS_GRADIENT
        for told in (answer.losses, answer.gradient, answer.array):
            if told is not None:
                self._numbers.frombytes(np.ascontiguousarray(told, dtype=np.float64).tobytes())
        if answer.array is not None:
            self._shapes[entries] = answer.array.shape
        if answer.surrogate:
            flags |= _SURROGATE
        self._digests.append(digest(request))
        self._ends.append(len(self._numbers))
        self._flags.append(flags)  # from here on it counts

    def _end(self, entries: int) -> int:
        return self._ends[entries - 1] if entries else 0

    def rewind(self) -> None:
        """Begin to read from the first entry."""
        self._read = 0

    def matches(self, request: Request) -> bool:
        """Whether the next entry answers this question."""
        return self._digests[self._read] == digest(request)

    def next(self) -> Answer:
        """The next entry's answer, as new arrays."""
        flags = self._flags[self._read]
        numbers = np.array(self._numbers[self._end(self._read) : self._end(self._read + 1)])
        shape = self._shapes.get(self._read)
        self._read += 1
        broken = bool(flags & _BROKEN)
        rest = numbers[1 + broken :]
        population = (flags & _KIND) == _KINDS[Kind.POPULATION]
        return Answer(
            float(numbers[0]),
            rest.copy() if population else None,
            rest.copy() if flags & _HAS_GRADIENT else None,
            bool(flags & _FINITE),
            bool(flags & _SURROGATE),
            array=None if shape is None else rest.reshape(shape).copy(),
            violation=float(numbers[1]) if broken else 0.0,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Five flat tensors."""
        return {
            "flags": torch.tensor(np.frombuffer(bytes(self._flags), dtype=np.uint8)),
            "digests": torch.tensor(np.array(self._digests, dtype=np.uint64).view(np.int64)),
            "ends": torch.tensor(np.array(self._ends, dtype=np.int64)),
            "numbers": torch.tensor(np.array(self._numbers, dtype=np.float64)),
            # entry, rows (-1: no rows but one vector), columns
            "shapes": torch.tensor([[i, *(-1,) * (2 - len(s)), *s] for i, s in self._shapes.items()]).reshape(
                -1, 3
            ),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the contents."""
        self._flags = bytearray(state["flags"].numpy().tobytes())
        self._digests = array("Q", state["digests"].numpy().tobytes())
        self._ends = array("Q", state["ends"].numpy().tobytes())
        self._numbers = array("d", state["numbers"].numpy().tobytes())
        self._shapes = {
            int(i): (int(columns),) if rows < 0 else (int(rows), int(columns))
            for i, rows, columns in state["shapes"].tolist()
        }
        self.rewind()
