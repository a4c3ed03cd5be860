"""Handwritten digits: the number of misclassified images, which has no useful gradient."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache, partial

import torch
from torch import Tensor, nn

from hybridopt.problems._problem import Problem, ProblemError


def digits(seed: int = 42) -> Problem:
    """scikit-learn's 1797 images, average-pooled to 4×4: the errors of a softmax layer of 170 weights.

    The loss is the number of misclassified images, a whole number from 0 to 1797; `surrogate` is the mean cross
    entropy in nats. Pixels are scaled to 0..1.

    Args:
        seed: of the start, torch's default initialisation; the data are the same for every seed.

    Raises:
        ProblemError: scikit-learn is not installed.
    """
    images, labels = _data()
    inputs = nn.functional.avg_pool2d(images[:, None], 2).flatten(1)  # (1797, 16)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = nn.Linear(16, 10)
    return Problem(
        name="digits",
        loss=partial(_errors, inputs=inputs, labels=labels),
        target=model,
        bounds=(-10.0, 10.0),
        surrogate=partial(_cross_entropy, inputs=inputs, labels=labels),
        description="misclassified images of a softmax layer of 170 weights on 4×4 digits",
    )


def digits_mlp(seed: int = 42) -> Problem:
    """The same images at 8×8, and the errors of a network of which one named layer is optimized.

    `Linear(64,32) → ReLU → Linear(32,10)`; the layer `hidden` keeps its random initial weights (features that
    nobody trained), the 330 weights of `head` are selected (`select="head.*"`).

    Args:
        seed: of the initial weights of both layers, torch's default initialisation.

    Raises:
        ProblemError: scikit-learn is not installed.
    """
    images, labels = _data()
    inputs = images.flatten(1)  # (1797, 64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = nn.Sequential(
            OrderedDict(hidden=nn.Linear(64, 32), activation=nn.ReLU(), head=nn.Linear(32, 10))
        )
    return Problem(
        name="digits_mlp",
        loss=partial(_errors, inputs=inputs, labels=labels),
        target=model,
        bounds=(-10.0, 10.0),
        surrogate=partial(_cross_entropy, inputs=inputs, labels=labels),
        select="head.*",
        description="misclassified 8×8 digits of a network whose layer `head` (330 weights) is optimized",
    )


@cache
def _data() -> tuple[Tensor, Tensor]:
    """Images (1797, 8, 8), float32, 0..1, and labels (1797,), int64; read once a process, never written."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ProblemError(
            f"digits: expected scikit-learn, which holds the images ({error}); "
            "pip install 'torch-hybridopt[problems]'"
        ) from error
    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32) / 16, torch.tensor(bunch.target)


def _errors(model: nn.Module, *, inputs: Tensor, labels: Tensor) -> Tensor:
    wrong: Tensor = model(inputs).argmax(1) != labels
    return wrong.sum().float()


def _cross_entropy(model: nn.Module, *, inputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs), labels)
