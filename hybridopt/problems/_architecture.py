"""Training a small network on digits, as a function of how it is built and trained."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hybridopt.problems._digits import _data
from hybridopt.problems._problem import ProblemError

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
}
_DEFAULTS: dict[str, Any] = {
    "depth": 1,
    "width": 32,
    "second_width": 32,
    "activation": "relu",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
}


def train_digits(config: Mapping[str, Any], trial: Any = None, seed: int = 0, steps: int = 100) -> float:
    """Train a network on 1200 digits by SGD and return its mean cross entropy on the other 597, in nats.

    To be tuned: a function from a configuration to a loss. A hundred steps on all images at once take a tenth of a
    second. Diverging gives nan or a large number.

    Args:
        config: any of `depth` (hidden layers: 0, 1 or 2), `width` (of the first), `second_width` (only matters at
            depth 2), `activation` (relu, tanh, gelu, sigmoid), `lr`, `momentum`, `weight_decay`; what is missing
            is 1, 32, 32, relu, 0.1, 0.9 and 0.
        trial: what `tune` hands over: it is told the loss after every tenth step, and may end the training early.
        seed: of the split and the initial weights.
        steps: of SGD.

    Raises:
        ProblemError: an unknown key or activation, or a depth or width that makes no network.

    Example:
        >>> from hybridopt.problems import train_digits
        >>> train_digits({"depth": 0}) > train_digits({"depth": 1, "width": 64, "lr": 0.3})
        True
    """
    unknown = set(config) - set(_DEFAULTS)
    if unknown:
        raise ProblemError(f"train_digits: unknown keys {sorted(unknown)}; known: {', '.join(_DEFAULTS)}")
    chosen = {**_DEFAULTS, **config}
    widths = [chosen["width"], chosen["second_width"]][: chosen["depth"]]
    if (
        chosen["activation"] not in _ACTIVATIONS
        or chosen["depth"] not in (0, 1, 2)
        or min(widths, default=1) < 1
    ):
        raise ProblemError(
            f"train_digits: expected depth 0, 1 or 2, widths from 1 and an activation of {', '.join(_ACTIVATIONS)}, "
            f"got {dict(config)!r}"
        )
    images, labels = _data()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        order = torch.randperm(len(labels))
        model = nn.Sequential()
        for before, after in pairwise([64, *map(int, widths), 10]):
            model.extend([nn.Linear(before, after), _ACTIVATIONS[chosen["activation"]]()])
        del model[-1]
        rules = {key: chosen[key] for key in ("lr", "momentum", "weight_decay")}
        optimizer = torch.optim.SGD(model.parameters(), **rules)
        train, test = order[:1200], order[1200:]
        inputs = images.flatten(1)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            cross_entropy(model(inputs[train]), labels[train]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if trial is not None and step % 10 == 0:
                trial.report(step, _loss(model, inputs[test], labels[test]))
        return _loss(model, inputs[test], labels[test])


@torch.no_grad()
def _loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return cross_entropy(model(inputs), labels).item()
