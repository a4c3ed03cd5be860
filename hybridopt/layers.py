"""A learning rate, and a weight decay, for each layer of a model: as a space, and as parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hybridopt.errors import ObjectiveError
from hybridopt.space import Float, Space, Value


def layers(
    model: torch.nn.Module, *, multiplier: float = 10.0, weight_decay: tuple[float, float] | None = None
) -> Space:
    """A ready space for one model: a learning-rate multiplier, and if wanted a weight decay, for each layer.

    Args:
        model: whose modules with own parameters are the layers; a weight that several share is the first one's.
        multiplier: from 1/multiplier to multiplier, on a logarithmic scale.
        weight_decay: (low, high), positive, on a logarithmic scale; None (default) = not tuned.

    See `layer_groups` for its other half.
    """
    parameters: dict[str, Any] = {}
    for name in _layers(model):
        parameters[f"{name}.lr"] = Float(1 / multiplier, multiplier, log=True)
        if weight_decay is not None:
            parameters[f"{name}.weight_decay"] = Float(*weight_decay, log=True)
    return Space(parameters)


def layer_groups(model: torch.nn.Module, config: Mapping[str, Value], lr: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer from a configuration of `layers(model)`.

    Example:
        >>> import torch
        >>> from hybridopt.layers import layer_groups, layers
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> space = layers(model, weight_decay=(1e-6, 1e-2))
        >>> groups = layer_groups(model, space.values(space.vector().read()), lr=0.1)
        >>> [(len(g["params"]), round(g["lr"], 3), round(g["weight_decay"], 6)) for g in groups]
        [(2, 0.1, 0.0001), (2, 0.1, 0.0001)]
    """
    groups = []
    for name, weights in _layers(model).items():
        group: dict[str, Any] = {"params": weights}
        group["lr"] = lr * float(config[f"{name}.lr"])  # type: ignore[arg-type]
        if f"{name}.weight_decay" in config:
            group["weight_decay"] = float(config[f"{name}.weight_decay"])  # type: ignore[arg-type]
        groups.append(group)
    return groups


def _layers(model: torch.nn.Module) -> dict[str, list[torch.nn.Parameter]]:
    """The weights of each layer that is to be trained."""
    found: dict[str, list[torch.nn.Parameter]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
        seen.update(map(id, own))
        if own:
            found[name or "model"] = own
    if not found:
        raise ObjectiveError("layers: expected a model with weights that require a gradient, there are none")
    return found
