"""Parameter groups as compiled steps: what a plan reads, what it checks before every use, and when it is refused."""

from __future__ import annotations

import abc
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hybridopt.engines import cpu, gpu
from hybridopt.engines._variant import SIZES, Variant
from hybridopt.optim._flat import dense
from hybridopt.optim._watch import PLAIN, Gradients, Memory, readable

if TYPE_CHECKING:
    from hybridopt.optim._base import FusedStep

# private in torch: makes autograd notice a write that it did not do
_increment_version: Callable[[Iterable[Tensor]], None] = torch._C._increment_version
_address = Tensor.data_ptr
_gradient = attrgetter("grad")
_NAMES: dict[torch.dtype, str] = {getattr(torch, name): name for name in SIZES}
_SCALARS = (torch.float32, torch.float64)
_SIMPLE = {float, int, bool, str, type(None)}
_NOTHING: dict[str, Any] = {}
Number: TypeAlias = float | Tensor
ENGINES = {"cpu": "llvm", "cuda": "triton"}
"""What compiles a step on a type of device."""


class Ineligible(Exception):
    """Why a step cannot be compiled now (said in `repr`, and by a warning if `fused` was asked for)."""


class Broken(Ineligible):
    """A compiler is missing, or fails at what it should be able to: said by a warning, asked for or not."""


class FirstStep(Ineligible):
    """A state does not exist yet: this step is not compiled, the next one will be."""


class Kind(NamedTuple):
    """What the weights of one plan have in common."""

    device: torch.device
    weight: torch.dtype
    gradient: torch.dtype
    states: tuple[torch.dtype, ...]
    scalar: torch.dtype
    number: torch.dtype


class Plan(abc.ABC):
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
        entries = [optimizer.state.get(p, _NOTHING) for p in self.params] if self.names else []
        states = [[entry[name] for name in self.names] for entry in entries]
        self.tensors = [*self.params, *chain.from_iterable(states)]
        self.memory = Memory(self.params, self.tensors[self.size :]) if readable(self.tensors) else None
        self.known = self._now()
        self.there: Gradients | None = None
        self.numels = [p.numel() for p in self.params]
        self.strides = [None if p.is_contiguous() else p.stride() for p in self.params]
        self.live = False
        self.layout = optimizer._layout
        self.gradients = array("q", [-1] * self.size)
        self.variant = Variant(
            tuple(self.flags.items()),
            _NAMES[kind.weight],
            _NAMES[kind.gradient],
            tuple(_NAMES[dtype] for dtype in kind.states),
            _NAMES[kind.scalar],
            _NAMES[kind.number],
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
        """Read where the gradients are; False if anything but gradients has moved, and the plan must be rebuilt."""
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
        for g, numel, stride in zip(grads, self.numels, self.strides, strict=True):
            if (
                g.dtype is not dtype
                or g.numel() != numel
                or not (g.is_contiguous() if stride is None else g.stride() == stride)
                or type(g) not in PLAIN
                or g.is_neg()
            ):
                return False
        return True

    def read_options(self, optimizer: FusedStep, group: dict[str, Any]) -> bool:
        """Take over changed hyperparameters; False if one is not a number in the compiled variant."""
        if group["params"] is not self.everything:
            return False
        if (
            self.flags != optimizer._flags_by_name(group)
            or group.get("differentiable")
            or self._refuses(group)
        ):
            return False
        self._take(optimizer._hyper(group))
        self.live = any(_mutable(value) for _, value in _objects(group))
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

    @abc.abstractmethod
    def square_sum(self) -> Number:
        """The sum of all squared gradients, in float64: not finite if one of them is not."""

    @abc.abstractmethod
    def run(self, extras: Mapping[str, Number] = _NOTHING, skip: Tensor | None = None) -> None:
        """Do the step.

        Args:
            extras: numbers for `Variant.extras` by name.
            skip: do nothing where this is not 0 (on a device; elsewhere the caller decides).
        """


def counter_names(optimizer: FusedStep) -> tuple[str, ...]:
    """The per-tensor numbers that a step reads and writes."""
    counts = optimizer.rule.counts or optimizer._extras.stochastic_rounding
    return (*(("step",) if counts else ()), *optimizer.rule.scalar_state)


def state_names(optimizer: FusedStep, flags: dict[str, bool], weight: torch.dtype) -> tuple[str, ...]:
    """All states that a step reads and writes, per-tensor numbers first."""
    compensation = ("kahan_comp",) if optimizer._extras.kahan_for(weight) else ()
    return (*counter_names(optimizer), *optimizer.rule.active(flags), *compensation)


def kind_of(optimizer: FusedStep, p: Tensor, flags: dict[str, bool]) -> Kind:
    """The kind of a weight that has a gradient.

    Raises:
        Ineligible: something about it is not plain, or its state does not exist yet (`FirstStep`).
    """
    if type(p) not in PLAIN or p.layout is not torch.strided or p.is_neg():
        raise Ineligible(f"a weight is a {type(p).__name__} with layout {p.layout} on {p.device}, or a view")
    g = p.grad
    assert g is not None
    if p.dtype not in _NAMES or g.dtype not in _NAMES:
        raise Ineligible(f"a weight is {p.dtype} and its gradient {g.dtype}")
    if type(g) not in PLAIN or g.device != p.device or g.layout is not torch.strided or g.is_neg():
        raise Ineligible(
            f"a gradient is a {type(g).__name__} with layout {g.layout} on {g.device}, or a view"
        )
    if g.dtype is not p.dtype and torch.float64 in (g.dtype, p.dtype):
        raise Ineligible(f"a weight is {p.dtype} and its gradient {g.dtype}")
    if not dense(p) or not _alike(g, p):
        raise Ineligible("a gradient is laid out unlike its weight, or the weight has gaps")
    entry = optimizer.state.get(p, _NOTHING)
    counters = counter_names(optimizer)
    states: list[torch.dtype] = []
    step = torch.float32
    numbers: set[torch.dtype] = set()
    for name in state_names(optimizer, flags, p.dtype):
        tensor = entry.get(name)
        if tensor is None:
            raise FirstStep("first step, which creates the state")
        if type(tensor) not in PLAIN or tensor.layout is not torch.strided:
            raise Ineligible(f"the state {name!r} is not a plain tensor")
        if tensor.device != p.device and name in counters and ENGINES.get(p.device.type) == "triton":
            tensor = entry[name] = tensor.to(p.device)  # where torch's own fused step keeps it too
        if tensor.device != p.device:
            raise Ineligible(f"the state {name!r} is on {tensor.device}, its weight on {p.device}")
        if name in counters:
            if tensor.numel() != 1 or tensor.dtype not in _SCALARS:
                raise Ineligible(f"the state {name!r} is not one real number")
            if name == "step":
                step = tensor.dtype
            else:
                numbers.add(tensor.dtype)
        elif tensor.dtype not in _NAMES or tensor.is_neg() or not _alike(tensor, p):
            raise Ineligible(f"the state {name!r} is {tensor.dtype} or laid out unlike its weight")
        elif name != "kahan_comp":
            states.append(tensor.dtype)
        elif tensor.dtype is not p.dtype:
            raise Ineligible(f"the state {name!r} is {tensor.dtype}, its weight {p.dtype}")
    if len(numbers) > 1:
        raise Ineligible("the counters of a weight have different dtypes")
    return Kind(p.device, p.dtype, g.dtype, tuple(states), step, numbers.pop() if numbers else step)


def plans_for(optimizer: FusedStep, index: int) -> list[Plan]:
    """The plans of a parameter group, one for each kind of weight.

    Raises:
        Ineligible: torch's own code, or the rule in Python, has to do this group's step.
    """
    group = optimizer.param_groups[index]
    if group.get("differentiable"):
        raise Ineligible("differentiable=True")
    flags = optimizer._flags_by_name(group)
    params: list[Tensor] = group["params"]
    for device in dict.fromkeys(p.device.type for p in params if p.grad is not None):
        _engine(device)
    kinds = [None if p.grad is None else kind_of(optimizer, p, flags) for p in params]
    found = list(dict.fromkeys(kind for kind in kinds if kind is not None))
    if not found:  # a plan of no weights, which notices when one gets a gradient
        place = params[0].device if params else torch.device("cpu")
        found = [Kind(place, torch.float32, torch.float32, (), torch.float32, torch.float32)]
    plans: list[Plan] = []
    for kind in found:
        plan = _engine(kind.device.type)(optimizer, index, kind, [k == kind for k in kinds])
        why = plan._refuses(group)
        if why:
            raise Ineligible(why)
        plan.read_options(optimizer, group)
        plans.append(plan)
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


def wrong_number(group: Mapping[str, Any], weight: torch.dtype) -> str:
    """Which hyperparameter is a tensor that only torch's own code takes for such weights; empty if none."""
    for key, value in _objects(group):
        if isinstance(value, Tensor) and (value.requires_grad or value.device.type != "cpu"):
            return f"{key} is a tensor on a device or requires a gradient"
        if isinstance(value, Tensor) and weight.itemsize > value.dtype.itemsize:
            return f"{key} is a tensor of less precision than a weight (torch then computes with that)"
        if isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
            return f"{key} holds a tensor (torch then corrects biases in that tensor's precision)"
    return ""


def _objects(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Options that are not simply a number, a word or nothing."""
    return [
        (key, value)
        for key, value in group.items()
        if type(value) not in _SIMPLE and key not in ("params", "param_names")
    ]


def _mutable(value: Any) -> bool:
    """Whether an option may change without being replaced."""
    if isinstance(value, tuple):
        return any(_mutable(part) for part in value)
    return not (value is None or isinstance(value, float | int | str))


def _alike(a: Tensor, p: Tensor) -> bool:
    """Whether element i in memory is the same element of both."""
    return a.shape == p.shape and (a.stride() == p.stride() or (a.is_contiguous() and p.is_contiguous()))
