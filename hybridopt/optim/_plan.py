"""Parameter groups as compiled steps: what a plan reads, and what it checks before every use."""

from __future__ import annotations

import abc
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from hybridopt.engines import cpu, gpu
from hybridopt.engines._variant import Variant
from hybridopt.optim._kind import (
    ENGINES,
    NAMES,
    NOTHING,
    Broken,
    Ineligible,
    Kind,
    Odd,
    counter_names,
    kind_of,
    mutable,
    objects,
    reals,
    state_names,
)
from hybridopt.optim._watch import PLAIN, Gradients, Memory, readable

if TYPE_CHECKING:
    from hybridopt.optim._base import FusedStep

# private in torch: makes autograd notice a write that it did not do
increment_version: Callable[[Iterable[Tensor]], None] = torch._C._increment_version
_address = Tensor.data_ptr
_gradient = attrgetter("grad")
Number: TypeAlias = float | Tensor


class Part(abc.ABC):
    """Some weights of a parameter group, and what steps them."""

    index: int
    """Of the group."""
    live = False
    """Whether an option may change without being replaced."""

    @abc.abstractmethod
    def refresh(self) -> bool:
        """Read where the gradients are; False if anything but gradients has moved, and the part must be made anew."""

    @abc.abstractmethod
    def read_options(self, optimizer: FusedStep, group: dict[str, Any]) -> bool:
        """Take over changed hyperparameters; False if one is not a number in the compiled variant."""

    @abc.abstractmethod
    def square_sum(self) -> Number:
        """The sum of all squared gradients, in float64: not finite if one of them is not."""

    @abc.abstractmethod
    def run(self, extras: Mapping[str, Number] = NOTHING, skip: Tensor | None = None) -> None:
        """Do the step.

        Args:
            extras: numbers for `Variant.extras` by name.
            skip: do nothing where this is not 0 (on a device; elsewhere the caller decides).
        """


class Plan(Part):
    """Weights of one kind in a parameter group: their addresses, and those of states and gradients.

    Whatever can move is looked at anew at each step: a tensor may be replaced, or given other memory (`p.data = ...`,
    `share_memory_()`), without a word to us. Gradients are not kept alive.

    Args:
        optimizer: whose rule, flags and states are used.
        index: of the parameter group.
        kind: of its weights.
        members: for each weight of the group whether it belongs to this plan.
    """

    engine: str

    def __init__(self, optimizer: FusedStep, index: int, kind: Kind, members: Sequence[bool]) -> None:
        rule, group, extra = optimizer.rule, optimizer.param_groups[index], optimizer._extras
        self.index = index
        self.kind = kind
        self.flags = optimizer._flags_by_name(group)
        self.everything: list[Tensor] = group["params"]
        self.absent = [p for p in self.everything if p.grad is None]
        self.params = list(compress(self.everything, members))
        self.size = len(self.params)
        self.names = state_names(optimizer, self.flags, kind.weight)
        self.counters = len(counter_names(optimizer))
        entries = [optimizer.state.get(p, NOTHING) for p in self.params] if self.names else []
        states = [[entry[name] for name in self.names] for entry in entries]
        self.tensors = [*self.params, *chain.from_iterable(states)]
        self.memory = Memory(self.params, self.tensors[self.size :]) if readable(self.tensors) else None
        self.known = self._now()
        self.there: Gradients | None = None
        self.numels = [reals(p.dtype) * p.numel() for p in self.params]  # as the compiled loop counts them
        self.strides = [None if p.is_contiguous() else p.stride() for p in self.params]
        self.layout = optimizer._layout
        self.gradients = array("q", [-1] * self.size)
        self.variant = Variant(
            tuple(self.flags.items()),
            NAMES[kind.weight],
            NAMES[kind.gradient],
            tuple(NAMES[dtype] for dtype in kind.states),
            NAMES[kind.scalar],
            NAMES[kind.number],
            unscaled=optimizer._unscaling,
            scaled=extra.max_grad_norm is not None,
            stochastic=extra.stochastic_rounding,
            kahan=extra.kahan_for(kind.weight),
        )
        seed = [float(extra.seed & 0xFFFFFFFF)] if extra.stochastic_rounding else []
        self.hypers = len(rule.hyper)
        self.extras = self.variant.extras
        self.hyper = array("d", [*[0.0] * self.hypers, *[1.0] * len(self.extras), *seed] or [0.0])
        self.table = self._table(states, list(compress(optimizer._streams(index), members)))

    def _table(self, states: Sequence[Sequence[Tensor]], streams: Sequence[int]) -> array[int]:
        """Rows (elements, per-tensor numbers, weight, states, [what makes its noise its own])."""
        table, split = array("q"), self.counters
        for t, stream in enumerate(streams):
            there = [*map(_address, states[t])] if states else []
            table.extend([self.numels[t], *there[:split], _address(self.params[t]), *there[split:]])
            if self.variant.stochastic:
                table.append(stream)
        return table

    # -- every step -----------------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """See `Part.refresh`."""
        if self.absent and any(p.grad is not None for p in self.absent):
            return False
        moved = -1 if self.memory is None or self.there is None else self.memory.look(self.there)
        if moved < 0:
            return self._unmoved() and self._take_gradients([*map(_gradient, self.params)])
        if moved:
            self._moved()
        return True

    def _unmoved(self) -> bool:
        """Whether weights and states have the memory that the table says, and weights the layout."""
        if self.memory is not None:
            return self.memory.look() == 0
        try:
            return self._now() == self.known
        except RuntimeError:  # no memory at all
            return False

    def _now(self) -> list[Any]:
        """What `memory` compares, where that cannot be compiled."""
        return [*map(_address, self.tensors), *((p.shape, p.stride()) for p in self.params)]

    def _take_gradients(self, grads: Sequence[Tensor]) -> bool:
        """Gradients that are not plainly as the last ones; False if they do not fit."""
        try:
            addresses = array("q", map(_address, grads))
        except (TypeError, RuntimeError):  # None or sparse; no memory at all
            return False
        if not self._alike(grads):
            return False
        begun = self.there is not None  # compiled code may have put down some of the addresses
        known = self.memory is not None and readable(grads)
        self.there = Gradients(self.params, grads, self.gradients) if known else None
        if begun or addresses != self.gradients:
            self.gradients[:] = addresses
            self._moved()
        return True

    def _alike(self, grads: Sequence[Tensor]) -> bool:
        """Whether gradients lie in memory as their weights do."""
        dtype = self.kind.gradient
        for g, p, stride in zip(grads, self.params, self.strides, strict=True):
            if (
                g.dtype is not dtype
                or g.numel() != p.numel()
                or not (g.is_contiguous() if stride is None else g.stride() == stride)
                or type(g) not in PLAIN
                or g.is_neg()
                or g.is_conj()
            ):
                return False
        return True

    def read_options(self, optimizer: FusedStep, group: dict[str, Any]) -> bool:
        """See `Part.read_options`."""
        if group["params"] is not self.everything:
            return False
        if (
            self.flags != optimizer._flags_by_name(group)
            or group.get("differentiable")
            or self._refuses(group)
        ):
            return False
        self._take(optimizer._hyper(group))
        self.live = any(mutable(value) for _, value in objects(group))
        return True

    @abc.abstractmethod
    def _moved(self) -> None:
        """Gradients have other addresses."""

    @abc.abstractmethod
    def _refuses(self, group: Mapping[str, Any]) -> str:
        """Which option of a group this engine does not serve; empty if none."""

    @abc.abstractmethod
    def _take(self, hyper: Sequence[Any]) -> None:
        """Take the hyperparameters over."""


def parts_of(optimizer: FusedStep, index: int) -> list[Part]:
    """What steps a parameter group: a plan for each kind of weight, torch's own code for those that are of none.

    Raises:
        Ineligible: torch's own code, or the rule in Python, has to do the whole step.
    """
    group = optimizer.param_groups[index]
    if group.get("differentiable"):
        raise Ineligible("differentiable=True")
    flags = optimizer._flags_by_name(group)
    params: list[Tensor] = group["params"]
    for device in dict.fromkeys(p.device.type for p in params if p.grad is not None):
        _engine(device)
    kinds: list[Kind | None] = []
    odd: list[tuple[Tensor, str]] = []
    for p in params:
        kinds.append(None)
        try:
            kinds[-1] = None if p.grad is None else kind_of(optimizer, p, flags)
        except Odd as reason:
            odd.append((p, str(reason)))
    found = list(dict.fromkeys(kind for kind in kinds if kind is not None))
    if not found:  # a plan of no weights, which notices when one gets a gradient
        place = params[0].device if params else torch.device("cpu")
        found = [Kind(place, torch.float32, torch.float32, (), torch.float32, torch.float32)]
    plans: list[Part] = []
    for kind in found:
        plan = _engine(kind.device.type)(optimizer, index, kind, [k == kind for k in kinds])
        why = plan._refuses(group)
        if why:
            raise Ineligible(why)
        plan.read_options(optimizer, group)
        plans.append(plan)
    if odd:
        from hybridopt.optim._aside import Aside

        plans.append(Aside(optimizer, index, odd))
    return plans


def _engine(device: str) -> type[Plan]:
    """What runs on a kind of device.

    Raises:
        Ineligible: nothing of ours does, or its compiler is not installed.
    """
    name = ENGINES.get(device)
    if name == "llvm":
        from hybridopt.optim._cpu_plan import CpuPlan

        why: str = cpu.available()
        plan: type[Plan] = CpuPlan
    elif name == "triton":
        from hybridopt.optim._device_plan import DevicePlan

        why, plan = gpu.available(), DevicePlan
    else:
        raise Ineligible(f"a weight is on {device}")
    if why:
        raise Broken(why)
    return plan
