"""A trained network of which something discrete is chosen afterwards: rounding scales, or the units that stay."""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from hybridopt.problems._digits import _data
from hybridopt.problems._problem import Problem, ProblemError

KEEPING_COST = 0.5  # nats that all units together cost in `pruning`


class _Trained(NamedTuple):
    """Weights and biases layer by layer, and the images and labels they were trained and are tested on."""

    layers: list[tuple[Tensor, Tensor]]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def quantisation(seed: int = 42, *, bits: int = 3) -> Problem:
    """One rounding scale for each layer of a digits network whose weights are stored as int3 or int2.

    A network 64-128-128-10 (ReLU) is trained on 1200 of the 1797 images to 97 % on the other 597. Each layer's weights
    are then rounded to the whole multiples −top, ..., top of its scale, top = 2^(bits−1) − 1. `x` holds, for each of
    the three layers, log2 of its scale relative to the naive one (largest weight / top), where it starts: 0. The loss
    is the mean cross entropy of the training images, rounding included: it jumps wherever a weight changes its
    multiple, which the slope between the jumps, all that autograd sees, does not know of.

    `score` is the share of the test accuracy lost by naive rounding that the scales recover: 0 at the start, 1 = as
    good as unrounded. 300 points drawn uniformly from the box recover 0.87 to 1.03 of int3 and 0.94 to 1.0 of int2
    (nine seeds; medians 1.0 and 0.96).

    Args:
        seed: of the split, the initial weights and so the network; about half a second for the first use in a
            process.
        bits: 2 or 3.

    Raises:
        ProblemError: other bits, or scikit-learn is not installed.

    Example:
        >>> import torch
        >>> from hybridopt.problems import quantisation
        >>> problem = quantisation(seed=0, bits=2)
        >>> problem.target, problem.score(problem.target)
        (tensor([0., 0., 0.]), 0.0)
        >>> problem.score(torch.tensor([-2.0, -2.5, -2.9])) > 0.9
        True
    """
    if bits not in (2, 3):
        raise ProblemError(f"quantisation: expected bits to be 2 or 3, got {bits!r}")
    network = _trained(seed, (64, 128, 128, 10))
    top = 2 ** (bits - 1) - 1
    rounded = partial(_rounded, layers=network.layers, top=top)
    start = torch.zeros(len(network.layers))
    unrounded, naive = (_accuracy(layers, network.test) for layers in (network.layers, rounded(start)))

    def score(x: Tensor) -> float:
        return (_accuracy(rounded(x.detach()), network.test) - naive) / (unrounded - naive)

    return Problem(
        name=f"quantisation(bits={bits})",
        loss=lambda x: _entropy(rounded(x), network.train),
        target=start,
        bounds=(-3.0, 0.5),
        score=score,
        description=f"rounding scales of an int{bits} digits network, of whose test accuracy {unrounded:.3f} naive "
        f"rounding leaves {naive:.3f}",
    )


def pruning(seed: int = 42) -> Problem:
    """Which of the 32 hidden units of a trained digits network stay: a mask of zeros and ones.

    `x`, shape (32,), is 0 or 1 for each unit: whole numbers, to which the loss rounds by itself too. The loss is the
    mean cross entropy of the training images plus what the units cost that stay, 1/64 nat each: a network without
    hidden units scores about 2.3 by its biases alone, the whole one 0.5. The function is constant almost everywhere, so
    its gradient is zero. `score` is the accuracy on test images.

    Args:
        seed: of the split, the initial weights and so the network (64-32-10, ReLU); the start is all ones.

    Raises:
        ProblemError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> from hybridopt.problems import pruning
        >>> problem = pruning(seed=0)
        >>> bool(problem.loss(problem.target) < problem.loss(torch.zeros(32)))
        True
    """
    network = _trained(seed, (64, 32, 10))
    (first, bias), (last, _) = network.layers

    def kept(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        mask = x.round().clamp(0, 1)
        return [(first, bias), (last * mask, network.layers[1][1])]

    return Problem(
        name="pruning",
        loss=lambda x: (
            _entropy(kept(x), network.train) + KEEPING_COST * x.round().clamp(0, 1).sum() / len(bias)
        ),
        target=torch.ones(len(bias)),
        bounds=(0.0, 1.0),
        integer=True,
        score=lambda x: _accuracy(kept(x.detach()), network.test),
        description="which of 32 hidden units of a digits network stay, cross entropy against their number",
    )


@lru_cache(maxsize=64)
def _trained(seed: int, sizes: tuple[int, ...]) -> _Trained:
    """Adam, 150 steps on all training images at once; never written to."""
    images, labels = _data()
    inputs = images.flatten(1)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        order = torch.randperm(len(inputs))
        model = nn.Sequential()
        for before, after in pairwise(sizes):
            model.extend([nn.Linear(before, after), nn.ReLU()])
        del model[-1]
        train, test = ((inputs[rows], labels[rows]) for rows in (order[:1200], order[1200:]))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            cross_entropy(model(train[0]), train[1]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    layers = [(m.weight.detach(), m.bias.detach()) for m in model if isinstance(m, nn.Linear)]
    return _Trained(layers, train, test)


def _rounded(x: Tensor, *, layers: list[tuple[Tensor, Tensor]], top: int) -> list[tuple[Tensor, Tensor]]:
    scales = [weight.abs().max() / top * 2**log for (weight, _), log in zip(layers, x, strict=True)]
    return [
        ((weight / scale).round().clamp(-top, top) * scale, bias)
        for (weight, bias), scale in zip(layers, scales, strict=True)
    ]


def _logits(layers: list[tuple[Tensor, Tensor]], inputs: Tensor) -> Tensor:
    for weight, bias in layers[:-1]:
        inputs = linear(inputs, weight, bias).relu()
    return linear(inputs, *layers[-1])


def _entropy(layers: list[tuple[Tensor, Tensor]], data: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(_logits(layers, data[0]), data[1])


def _accuracy(layers: list[tuple[Tensor, Tensor]], data: tuple[Tensor, Tensor]) -> float:
    return (_logits(layers, data[0]).argmax(-1) == data[1]).double().mean().item()
