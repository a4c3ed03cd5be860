"""Losses in every form, each with a meter of its own, and questions about them."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hybridopt.objective import Objective
from hybridopt.optimizer import Kind, Request
from hybridopt.vector import FloatArray

CENTRE = np.array([1.0, -2.0, 0.5])


def bowl(x: FloatArray) -> float:
    return float(((x - CENTRE) ** 2).sum())


def slope(x: FloatArray) -> FloatArray:
    return np.asarray(2 * (x - CENTRE))


def at(kind: Kind, x: Any = None, **rest: Any) -> Request:
    return Request(kind, None if x is None else np.asarray(x, dtype=np.float64), **rest)


def saved(objective: Objective) -> Any:
    """Its state after a way through a file that runs no code."""
    buffer = io.BytesIO()
    torch.save(objective.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Meter:
    """Counts the forward and backward passes that really happen."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def __call__(self, value: Any) -> Any:
        self.forward += 1
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(self._passed)
        return value

    def _passed(self, gradient: Tensor) -> None:
        self.backward += 1


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))


def bowl_of(*parts: Tensor) -> Tensor:
    x = torch.cat([p.reshape(-1) for p in parts])
    if x[0] > 100:  # a region without a loss
        return x.sum() * math.nan
    return ((x - torch.from_numpy(CENTRE)) ** 2).sum()


def module_form(meter: Meter) -> tuple[Any, Any]:
    return lambda m: meter(bowl_of(m.weight, m.bias)), Three()


def tensor_form(meter: Meter) -> tuple[Any, Any]:
    return lambda x: meter(bowl_of(x)), torch.zeros(3, dtype=torch.float64)


def mapping_form(meter: Meter) -> tuple[Any, Any]:
    return lambda d: meter(bowl_of(d["a"], d["b"])), {
        "a": torch.zeros(1, dtype=torch.float64),
        "b": torch.zeros(2, dtype=torch.float64),
    }


def array_form(meter: Meter) -> tuple[Any, Any]:
    return lambda x: meter(math.nan if x[0] > 100 else bowl(x)), np.zeros(3)


def aux_form(meter: Meter) -> tuple[Any, Any]:
    loss, target = tensor_form(meter)
    return lambda x: (loss(x), {"seen": x.detach().tolist()}), target


def closure_form(meter: Meter) -> tuple[Any, Any]:
    model = Three()
    return lambda: meter(bowl_of(model.weight, model.bias)), model


def backward_form(meter: Meter) -> tuple[Any, Any]:
    params = [torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]

    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss = meter(bowl_of(*params))
        loss.backward()
        return loss

    return closure, params


FORMS = {
    "module": module_form,
    "tensor": tensor_form,
    "mapping": mapping_form,
    "array": array_form,
    "aux": aux_form,
    "closure": closure_form,
    "closure with backward": backward_form,
}
SMOOTH = [name for name in FORMS if name != "array"]


def made(form: str, budget: Any = None, **rest: Any) -> tuple[Objective, Meter]:
    """The meter counts calls, so populations are looped over."""
    meter = Meter()
    loss, target = FORMS[form](meter)
    return Objective(loss, target, budget, batch="loop", **rest), meter


X = [3.0, 4.0, 5.0]
