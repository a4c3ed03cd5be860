"""The random numbers that a loss draws: the run's own, common to the members of a population, resumable."""

from __future__ import annotations

import hashlib
import os
import random
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch

# public since NumPy 1.24, but missing from its type stubs
_get_bit_generator = np.random.get_bit_generator  # type: ignore[attr-defined]
_set_bit_generator = np.random.set_bit_generator  # type: ignore[attr-defined]

NoisePolicy = Literal["shared", "independent", "fixed"]
NOISE_POLICIES: tuple[NoisePolicy, ...] = ("shared", "independent", "fixed")


def draw_seed() -> int:
    """A seed for who gave none, from the operating system: no generator of the caller's is moved by it."""
    return int.from_bytes(os.urandom(4), "little") & 0x7FFFFFFF


def derive_seed(seed: int, *path: int | str) -> int:
    """A seed for a part of a run: a pure function of the run's seed and the part's place in it."""
    text = "/".join(map(str, (seed, *path))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") & 0x7FFFFFFF


class _Caller:
    """The caller's NumPy and Python generators, kept while any run holds them; runs may end in any order."""

    def __init__(self) -> None:
        self.runs = 0
        self.found: tuple[Any, Any, Any] | None = None

    def take(self) -> None:
        if self.found is None:
            self.found = (_get_bit_generator(), np.random.get_state(legacy=False), random.getstate())
        self.runs += 1

    def give_back(self) -> None:
        self.runs -= 1
        if self.runs == 0 and self.found is not None:
            bit_generator, state, python = self.found
            self.found = None
            _set_bit_generator(bit_generator)
            np.random.set_state(state)
            random.setstate(python)


_CALLER = _Caller()


class Randomness:
    """Lends the run's generator states to the loss and gives the caller's back.

    torch's default generators are swapped around every evaluation (1.3 µs). NumPy's global generator is the
    run's own from `open` to `close`, because swapping it drops its cached normal number; Python's `random` too.
    All are as found after `close`. One evaluation's draws never depend on draws made between evaluations.

    Policies: `"shared"` (default): all questions of one step see the same draws (the members of a generation,
    the probes of a difference, a gradient and its value), the next step sees fresh ones. `"independent"`: every
    evaluation sees fresh draws (many members in one forward: those of torch, each its own). `"fixed"`: every evaluation
    of the run sees the same draws, which makes a sampled loss deterministic (sample average approximation).
    """

    def __init__(
        self, seed: int, devices: Iterable[torch.device] = (), policy: NoisePolicy = "shared"
    ) -> None:
        self.policy = policy
        seed = derive_seed(seed, "noise")
        self._generators = [torch.default_generator]
        for device in sorted({str(d) for d in devices if torch.device(d).type == "cuda"}):
            index = torch.device(device).index or 0
            self._generators.append(torch.cuda.default_generators[index])
        self._torch = [torch.Generator(g.device).manual_seed(seed).get_state() for g in self._generators]
        self._numpy = np.random.MT19937(seed)  # the only kind that np.random.seed and get_state work on
        self._numpy_state = self._numpy.state
        self._python = random.Random(seed).getstate()
        self._mark = self._state()
        self._last = self._state()  # with which the last evaluation began
        self._after: tuple[Any, Any, Any] | None = None  # where to go on after a repeated one
        self._give_back: Any = None  # set while held; also runs when the run is merely dropped
        self._lent: list[torch.Tensor] | None = None
        self.used: bool | None = None
        """Whether the first evaluation drew random numbers; None before it."""
        self._uses_python = self._uses_numpy = False
        self.reseeds = False
        """Whether the first evaluation seeded a generator of torch's itself."""

    @property
    def apart(self) -> bool:
        """Whether each of several evaluations has to see numbers of its own."""
        return self.policy == "independent" and bool(self.used)

    @property
    def torch_alone(self) -> bool:
        """Whether the first evaluation drew numbers from no other generators than torch's."""
        return not self._uses_python and not self._uses_numpy

    # -- session ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the caller's NumPy and Python generators away until `close`."""
        if self._give_back is None:
            _CALLER.take()
            self._give_back = weakref.finalize(self, _CALLER.give_back)
            _set_bit_generator(self._numpy)
            random.setstate(self._python)

    def close(self) -> None:
        """Give the caller's generators back exactly as found."""
        if self._give_back is not None:
            if not self._uses_python:
                self._python = random.getstate()
            self._give_back()
            self._give_back = None

    # -- one evaluation -----------------------------------------------------------------------------------------

    def begin(self, fresh: bool, again: bool = False) -> None:
        """Lend the states to one evaluation.

        Args:
            fresh: False repeats the draws of the last fresh one (under `"shared"`).
            again: the last evaluation is repeated, whatever the policy; later draws are as if it had not been.
        """
        if again:
            self._after = self._state()
            self._set(self._last)
        elif self.policy == "fixed" or (self.policy == "shared" and not fresh):
            self._set(self._mark)
        elif self.policy == "shared" or fresh:
            self._mark = self._state()
        self._last = self._state()
        self._lent = [g.get_state() for g in self._generators]
        for generator, state in zip(self._generators, self._torch, strict=True):
            generator.set_state(state)
        if self.used is None:
            self._seeded = self._seeds()
        _set_bit_generator(self._numpy)  # also forgets a cached normal number
        if self._uses_numpy or self.used is None:  # 25 µs
            self._numpy.state = self._numpy_state
        if self._uses_python or self.used is None:
            random.setstate(self._python)

    def end(self) -> None:
        """Take the states back after one evaluation."""
        if self._lent is None:
            return
        first, (before, numpy_before, python_before) = self.used is None, self._last
        self._torch = [g.get_state() for g in self._generators]
        if first:
            self.reseeds = self._seeds() != self._seeded
        for generator, state in zip(self._generators, self._lent, strict=True):
            generator.set_state(state)
        self._lent = None
        if self._uses_numpy or first:
            self._numpy_state = self._numpy.state
        if self._uses_python or first:
            self._python = random.getstate()
        if first:
            self._uses_numpy = not _same(numpy_before, self._numpy_state)
            self._uses_python = python_before != self._python
            changed = any(not torch.equal(a, b) for a, b in zip(before, self._torch, strict=True))
            self.used = changed or self._uses_numpy or self._uses_python
        if self._after is not None:
            self._set(self._after)
            self._after = None

    def others(self) -> tuple[Any, ...]:
        """Where NumPy's and Python's generators stand; tells whether a lent one was used."""
        inner, (_, words, _) = self._numpy.state["state"], random.getstate()
        return inner["pos"], int(inner["key"][0]), words[0], words[-1]

    def savepoint(self) -> tuple[Any, ...]:
        """Where the draws stand, for `rollback`."""
        return (self._state(), self._mark, self._last, self.used, self._uses_python, self._uses_numpy)

    def rollback(self, point: tuple[Any, ...]) -> None:
        """As if nothing had been drawn since `savepoint`: an evaluation that failed is asked again."""
        state, self._mark, self._last, self.used, self._uses_python, self._uses_numpy = point
        self._set(state)

    def _seeds(self) -> list[int]:
        return [g.initial_seed() for g in self._generators]

    def _state(self) -> tuple[Any, Any, Any]:
        return (self._torch, self._numpy_state, self._python)

    def _set(self, state: tuple[Any, Any, Any]) -> None:
        self._torch, self._numpy_state, self._python = state

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers."""
        if self._give_back is not None and not self._uses_python:
            self._python = random.getstate()
        if not self._uses_numpy:
            self._numpy_state = self._numpy.state
        return {
            "policy": self.policy,
            "now": _pack(self._state()),
            "mark": _pack(self._mark),
            "last": _pack(self._last),
            "used": self.used,
            "uses_python": self._uses_python,
            "uses_numpy": self._uses_numpy,
            "reseeds": self.reseeds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the draws where the saved run stood."""
        self.policy = state["policy"]
        self._set(_unpack(state["now"]))
        self._mark = _unpack(state["mark"])
        self._last = _unpack(state["last"])
        self.used = state["used"]
        self._uses_python = state["uses_python"]
        self._uses_numpy = state["uses_numpy"]
        self.reseeds = state["reseeds"]
        self._numpy.state = self._numpy_state
        if self._give_back is not None:
            random.setstate(self._python)


def _same(a: Any, b: Any) -> bool:
    return a["state"]["pos"] == b["state"]["pos"] and np.array_equal(a["state"]["key"], b["state"]["key"])


def _pack(state: tuple[Any, Any, Any]) -> dict[str, Any]:
    tensors, numpy_state, (version, words, gauss) = state
    inner = numpy_state["state"]
    return {
        "torch": [t.clone() for t in tensors],
        "numpy": [torch.tensor(inner["key"].astype(np.int64)), int(inner["pos"])],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
    }


def _unpack(state: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    key, position = state["numpy"]
    version, words, gauss = state["python"]
    numpy_state = {
        "bit_generator": "MT19937",
        "state": {"key": key.numpy().astype(np.uint32), "pos": position},
    }
    return (list(state["torch"]), numpy_state, (version, tuple(words.tolist()), gauss))
