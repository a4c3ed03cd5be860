"""Some rows of a weight stepped where they stand, by a compiled loop over the rows that a sparse gradient names."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from operator import is_

import torch
from torch import Tensor

from hybridopt.engines import cpu
from hybridopt.engines._variant import Variant
from hybridopt.optim._cpu_plan import PARALLEL_FROM
from hybridopt.optim._extras import Extras
from hybridopt.optim._flat import dense
from hybridopt.optim._kind import NAMES, Ineligible, plain
from hybridopt.optim._plan import increment_version
from hybridopt.optim._watch import Memory, readable
from hybridopt.rules import Rule

_BATCH = 64  # rows that a thread takes at once


class RowLoop:
    """One step after the other of slices of one weight, each time of others.

    Args:
        rule: that counts steps, and has no other number a weight.
        flags: of the rule.
        p: the weight.
        states: the rule's active ones, then `kahan_comp` if there is one.
        gradient: dtype of the gradients.
        dims: a slice is `p` at an index into each of its first `dims` dimensions.
        extras: how numbers are stored.
        number: what makes the weight's noise its own.

    Raises:
        Ineligible: the loop cannot go over such slices.
    """

    def __init__(
        self,
        rule: Rule,
        flags: Mapping[str, bool],
        p: Tensor,
        states: Sequence[Tensor],
        gradient: torch.dtype,
        dims: int,
        extras: Extras,
        number: int,
    ) -> None:
        variant = _variant(flags, p, states, gradient, dims, extras)
        try:
            self.compiled = cpu.compiled(rule, variant)
            self.enter = cpu.native().methods["enter"]
        except cpu.Untranslatable as error:
            raise Ineligible(str(error)) from error
        self.known = (dict(flags), gradient, dims, number)
        self.p, self.states = p, list(states)
        self.memory = Memory([p], self.states) if readable([p, *states]) else None
        self.size = p[(0,) * dims].numel()
        self.counter = array("d", [0.0])
        seed = [float(extras.seed)] if variant.stochastic else []
        self.numbers = array("d", [*[0.0] * len(rule.hyper), *seed])
        room = self.room = array("d", [0.0] * cpu.width(rule, variant))
        table = self.table = array("q", [self.size, self.counter.buffer_info()[0], p.data_ptr()])
        table.extend(s.data_ptr() for s in states)
        if variant.stochastic:
            table.append(number)
        there = [one.buffer_info()[0] for one in (table, self.numbers, room)]
        self.block = array("q", [0, 0, _BATCH, 0, self.size, gradient.itemsize, *there, self.compiled])
        self.block.extend([0, 0, 0, dims, *p.stride()[:dims], *p.shape[:dims]])

    def fits(
        self, flags: Mapping[str, bool], states: Sequence[Tensor], g: Tensor, dims: int, number: int
    ) -> bool:
        """Whether the weight and its states are where they were, and the gradient is one of those it was made for."""
        return (
            self.known == (flags, g.dtype, dims, number)
            and len(self.states) == len(states)
            and all(map(is_, self.states, states))
            and self.memory is not None
            and self.memory.look() == 0
        )

    def step(self, hyper: Sequence[float], g: Tensor, indices: Tensor, count: int) -> None:
        """One step of the slices at `indices`, shape (dims, k), int64, none of which may be named twice.

        Args:
            hyper: the rule's hyperparameters.
            g: gradients of the slices, shape (k, *shape of a slice).
            indices: into the weight.
            count: of the step, from 1.

        Raises:
            Ineligible, IndexError: nothing was changed.
        """
        k = len(g)
        if not g.is_contiguous() or not plain(g):
            raise Ineligible("the rows of a gradient do not stand in one piece")
        self.numbers[: len(hyper)] = array("d", hyper)
        self.counter[0] = count - 1.0  # the loop counts
        across, along = indices.stride() if len(indices) else (0, 0)
        block = self.block
        block[1], block[3] = k, g.data_ptr()
        block[10], block[11], block[12] = indices.data_ptr(), across, along
        if not self.enter(block.buffer_info()[0]):
            raise IndexError(
                f"SparseAdam: expected indices into a weight of shape {tuple(self.p.shape)}, got a gradient with some "
                f"outside ({indices.tolist() if indices.numel() < 20 else f'{k} rows'})"
            )
        cpu.together("rows", block, torch.get_num_threads() if k * self.size >= PARALLEL_FROM else 1)
        increment_version([self.p])


def _variant(
    flags: Mapping[str, bool],
    p: Tensor,
    states: Sequence[Tensor],
    gradient: torch.dtype,
    dims: int,
    extras: Extras,
) -> Variant:
    """What has to be compiled.

    Raises:
        Ineligible: the loop cannot go over such slices.
    """
    if p.device.type != "cpu":
        raise Ineligible(f"a weight is on {p.device}")
    if why := cpu.available():
        raise Ineligible(why)
    if not all(plain(t) and t.dtype in NAMES and not t.is_complex() for t in (p, *states)):
        raise Ineligible("a weight or a state is no plain tensor of real numbers")
    if gradient is not p.dtype and (gradient not in NAMES or torch.float64 in (gradient, p.dtype)):
        raise Ineligible(f"a weight is {p.dtype} and its gradient {gradient}")
    if not dense(p) or any(s.stride() != p.stride() or s.shape != p.shape for s in states):
        raise Ineligible("a weight has gaps, or a state is laid out unlike its weight")
    if not p[(0,) * dims].is_contiguous():
        raise Ineligible("a row of a weight does not stand in one piece")
    kahan = extras.kahan_for(p.dtype)
    if kahan and states[-1].dtype is not p.dtype:
        raise Ineligible(f"the state 'kahan_comp' is {states[-1].dtype}, its weight {p.dtype}")
    return Variant(
        tuple(flags.items()),
        NAMES[p.dtype],
        NAMES[gradient],
        tuple(NAMES[s.dtype] for s in states[: len(states) - kahan]),
        scalar="float64",
        number="float64",
        stochastic=extras.stochastic_rounding,
        kahan=kahan,
    )
