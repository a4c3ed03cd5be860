"""The forms a loss may come in, each reduced to "call it where the weights stand"."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hybridopt.errors import ObjectiveError
from hybridopt.vector import ParameterVector


class Form(enum.Enum):
    """How the loss takes the weights."""

    MODULE = "loss(model)"
    TENSOR = "f(x), x a torch tensor"
    ARRAY = "f(x), x a NumPy array"
    MAPPING = "f(params), a dict of tensors"
    CLOSURE = "closure()"


class Loss(NamedTuple):
    """A loss bound to a vector's tensors."""

    form: Form
    call: Callable[[], Any]
    """The loss at the weights as they stand."""
    functional: Callable[[Mapping[str, Tensor]], Any] | None
    """The loss at other weights (`ParameterVector.unflatten`), without touching the model; None for closures."""


def _with_weights(loss: Callable[[nn.Module], Any], vector: ParameterVector) -> Callable[..., Any]:
    """`loss(model)` at other weights, which stand in the model's slots for the length of the call.

    Does what `torch.func.functional_call` does, in a third of the time: which slots (several for a tied weight)
    hold which weight is found once.
    """
    model = vector.module
    assert model is not None
    names = {id(tensor): name for name, tensor in zip(vector.names, vector.tensors, strict=True)}
    slots: list[tuple[dict[str, Any], str, str]] = [
        (module._parameters, key, names[id(parameter)])
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if id(parameter) in names
    ]

    def functional(weights: Mapping[str, Tensor]) -> Any:
        own = [parameters[key] for parameters, key, _ in slots]
        try:
            for parameters, key, name in slots:
                parameters[key] = weights[name]
            return loss(model)
        finally:
            for (parameters, key, _), parameter in zip(slots, own, strict=True):
                parameters[key] = parameter

    return functional


def as_vector(target: Any, select: Any = None, **options: Any) -> ParameterVector:
    """`target` itself if it is a vector, else a vector over it (a NumPy array or list of numbers is copied).

    Args:
        target: the vector, or what one is made of.
        select, options: of `ParameterVector`; with a vector all of them None.
    """
    options["select"] = select
    if isinstance(target, ParameterVector):
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ObjectiveError(
                f"{' and '.join(given)} belong to the ParameterVector: pass them there, not again here"
            )
        return target
    if isinstance(target, np.ndarray) or _is_numbers(target):
        array = np.array(target)
        try:
            tensor = torch.from_numpy(array)
        except (TypeError, ValueError):
            raise ObjectiveError(
                "start: expected an array of float16, float32 or float64 in the machine's byte order, got "
                f"{array.dtype}"
            ) from None
        if not tensor.is_floating_point() and not tensor.is_complex():
            raise ObjectiveError(
                f"start: expected floating numbers, e.g. [1.0, 2.0], got {array.dtype}; integer=True keeps weights "
                "whole"
            )
        vector = ParameterVector(tensor, **options)
        vector.source = np.asarray(target)
        return vector
    return ParameterVector(target, **options)


def _is_numbers(target: Any) -> bool:
    return (
        isinstance(target, list | tuple)
        and len(target) > 0
        and all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in target)
    )


def bind_loss(loss: Callable[..., Any], vector: ParameterVector, name: str = "loss") -> Loss:
    """Decide by the vector's source, and by whether `loss` takes an argument, how to call it.

    Args:
        loss: the loss, or another function of the same form.
        vector: of the weights.
        name: of the argument, for errors.
    """
    if not callable(loss):
        raise ObjectiveError(
            f"{name}: expected a function, got {type(loss).__name__}"
            + ("; the loss comes first, then the model" if name == "loss" else "")
        )
    source = vector.source
    if not _takes_argument(loss, name):
        return Loss(Form.CLOSURE, loss, None)
    if isinstance(source, nn.Module):
        return Loss(Form.MODULE, lambda: loss(source), _with_weights(loss, vector))
    if isinstance(source, Tensor):
        return Loss(Form.TENSOR, lambda: loss(source), lambda weights: loss(next(iter(weights.values()))))
    if isinstance(source, np.ndarray):
        (tensor,) = vector.tensors
        view = tensor.detach().numpy()
        return Loss(Form.ARRAY, lambda: loss(view.copy()), None)
    if isinstance(source, Mapping) and vector.groups is None:
        aliases = vector.aliases

        def at(weights: Mapping[str, Tensor]) -> Any:
            tied = {name: weights[first] for name, first in aliases.items()}
            return loss({**source, **weights, **tied})

        return Loss(Form.MAPPING, lambda: loss(dict(source)), at)
    raise ObjectiveError(
        f"{name}: for a {type(source).__name__} of tensors expected a closure() without arguments; "
        "pass a module for loss(model), a tensor or array for f(x), or a dict for f(params)"
    )


def _takes_argument(loss: Callable[..., Any], name: str) -> bool:
    """Whether to call it with one argument (or with none).

    Raises:
        ObjectiveError: it needs more than one.
    """
    if isinstance(loss, nn.Module):
        return True
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):  # built without a signature: assume the usual f(x)
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in (*positional, p.KEYWORD_ONLY)]
    by_position = [p.name for p in parameters if p.default is p.empty and p.kind in positional]
    if len(needed) > 1 or len(needed) > len(by_position):
        raise ObjectiveError(
            f"{name}: expected a function of the model (or weights) alone, or of nothing; it needs "
            f"{', '.join(needed)}. Bind the rest, e.g. with functools.partial or a lambda"
        )
    return bool(by_position) or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def as_scalar(value: Any) -> Tensor:
    """The loss as a tensor without dimensions, under `torch.func` transforms too (`as_number` makes a float).

    Raises:
        ObjectiveError: it is no tensor, or not one real number.
    """
    if isinstance(value, tuple) and len(value) == 2:
        value = value[0]
    if not isinstance(value, Tensor):
        raise ObjectiveError(
            f"the loss returned a {type(value).__name__}, which holds one number, not one each"
        )
    if value.numel() != 1 or value.is_complex():
        raise ObjectiveError(
            f"the loss returned a tensor of shape {tuple(value.shape)} and {value.dtype}, not one real number"
        )
    return value.reshape(())


def as_number(value: Any, name: str = "loss") -> tuple[float, Any]:
    """The loss as a float, and whatever came along with it (`return loss, aux`); `name` is for errors.

    Raises:
        ObjectiveError: the loss is no number and no one-element tensor.
    """
    aux = None
    if isinstance(value, tuple) and len(value) == 2:
        value, aux = value
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return float(value.item()), aux
        raise ObjectiveError(
            f"{name}: expected one real number, got a tensor of shape {tuple(value.shape)} and {value.dtype}; "
            "reduce it, e.g. with .mean()"
        )
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value), aux
    except (TypeError, ValueError):
        raise ObjectiveError(
            f"{name}: expected a number or a one-element tensor, got {type(value).__name__}"
        ) from None
