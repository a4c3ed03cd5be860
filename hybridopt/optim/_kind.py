"""Which weights a compiled step can take, what those of one plan have in common, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hybridopt.engines._variant import SIZES
from hybridopt.optim._flat import dense
from hybridopt.optim._watch import PLAIN

if TYPE_CHECKING:
    from hybridopt.optim._base import FusedStep

NAMES: dict[torch.dtype, str] = {
    **{getattr(torch, name): name for name in SIZES},
    torch.complex64: "float32",  # a complex weight is stepped as twice as many real numbers, as torch does
    torch.complex128: "float64",
}
"""What an engine calls the numbers of a weight."""
_SCALARS = (torch.float32, torch.float64)
_SIMPLE = {float, int, bool, str, type(None)}
NOTHING: dict[str, Any] = {}
ENGINES = {"cpu": "llvm", "cuda": "triton"}
"""What compiles a step on a type of device."""


class Ineligible(Exception):
    """Why a step cannot be compiled now (said in `repr`, and by a warning if `fused` was asked for)."""


class Broken(Ineligible):
    """A compiler is missing, or fails at what it should be able to: said by a warning, asked for or not."""


class Odd(Ineligible):
    """A weight that no engine can step, whatever the others are: said by a warning, as it is slow."""


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
        Odd: something about it is not plain.
        FirstStep: its state does not exist yet.
    """
    _require_plain(p, "a weight")
    g = p.grad
    assert g is not None
    if p.dtype not in NAMES or g.dtype not in NAMES or (p.is_complex() and not optimizer._takes_complex):
        raise Odd(f"a weight is {p.dtype} and its gradient {g.dtype}")
    _require_plain(g, "a gradient")
    if g.device != p.device:
        raise Odd(f"a weight is on {p.device}, its gradient on {g.device}")
    if g.dtype is not p.dtype and (torch.float64 in (g.dtype, p.dtype) or g.is_complex() or p.is_complex()):
        raise Odd(f"a weight is {p.dtype} and its gradient {g.dtype}")
    if not dense(p) or not _alike(g, p):
        raise Odd("a gradient is laid out unlike its weight, or the weight has gaps")
    entry = optimizer.state.get(p, NOTHING)
    counters = counter_names(optimizer)
    states: list[torch.dtype] = []
    step = torch.float32
    numbers: set[torch.dtype] = set()
    for name in state_names(optimizer, flags, p.dtype):
        tensor = entry.get(name)
        if tensor is None:
            raise FirstStep("first step, which creates the state")
        if not plain(tensor):
            raise Odd(f"the state {name!r} is not a plain tensor")
        if tensor.device != p.device and name in counters and ENGINES.get(p.device.type) == "triton":
            tensor = entry[name] = tensor.to(p.device)  # where torch's own fused step keeps it too
        if tensor.device != p.device:
            raise Odd(f"the state {name!r} is on {tensor.device}, its weight on {p.device}")
        if name in counters:
            if tensor.numel() != 1 or tensor.dtype not in _SCALARS:
                raise Odd(f"the state {name!r} is not one real number")
            if name == "step":
                step = tensor.dtype
            else:
                numbers.add(tensor.dtype)
        elif tensor.dtype not in NAMES or tensor.is_complex() is not p.is_complex() or not _alike(tensor, p):
            raise Odd(f"the state {name!r} is {tensor.dtype} or laid out unlike its weight")
        elif name != "kahan_comp":
            states.append(tensor.dtype)
        elif tensor.dtype is not p.dtype:
            raise Odd(f"the state {name!r} is {tensor.dtype}, its weight {p.dtype}")
    if len(numbers) > 1:
        raise Odd("the counters of a weight have different dtypes")
    return Kind(p.device, p.dtype, g.dtype, tuple(states), step, numbers.pop() if numbers else step)


def wrong_number(group: Mapping[str, Any], weight: torch.dtype) -> str:
    """Which hyperparameter is a tensor that only torch's own code takes for such weights; empty if none."""
    for key, value in objects(group):
        if isinstance(value, Tensor) and (value.requires_grad or value.device.type != "cpu"):
            return f"{key} is a tensor on a device or requires a gradient"
        if isinstance(value, Tensor) and weight.itemsize // reals(weight) > value.dtype.itemsize:
            return f"{key} is a tensor of less precision than a weight (torch then computes with that)"
        if isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
            return f"{key} holds a tensor (torch then corrects biases in that tensor's precision)"
    return ""


def objects(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Options that are not simply a number, a word or nothing."""
    return [
        (key, value)
        for key, value in group.items()
        if type(value) not in _SIMPLE and key not in ("params", "param_names")
    ]


def mutable(value: Any) -> bool:
    """Whether an option may change without being replaced."""
    if isinstance(value, tuple):
        return any(mutable(part) for part in value)
    return not (value is None or isinstance(value, float | int | str))


def reals(dtype: torch.dtype) -> int:
    """Real numbers an element."""
    return 2 if dtype.is_complex else 1


def plain(t: Tensor) -> bool:
    """Whether its memory holds its numbers as they are."""
    return type(t) in PLAIN and t.layout is torch.strided and not t.is_neg() and not t.is_conj()


def _require_plain(t: Tensor, what: str) -> None:
    if not plain(t):
        view = (
            " that is a negated or conjugated view" if type(t) in PLAIN and t.layout is torch.strided else ""
        )
        raise Odd(f"{what} is a {type(t).__name__} with layout {t.layout}{view}")


def _alike(a: Tensor, p: Tensor) -> bool:
    """Whether element i in memory is the same element of both."""
    return a.shape == p.shape and (a.stride() == p.stride() or (a.is_contiguous() and p.is_contiguous()))
