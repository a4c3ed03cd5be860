"""A network with a rounding gate: six weights that gradients reach, and a threshold by which the gradient is 0."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from hybridopt.problems._problem import Problem

THRESHOLD = 0.6  # what is to be found


class Gated(nn.Module):
    """A linear function of 4 inputs and of a hard gate `round(sigmoid(x - threshold))` of the first."""

    def __init__(self, threshold: float, jump: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor([threshold]))
        self.features = nn.Linear(5, 1)
        with torch.no_grad():
            self.features.weight[:, 4] = jump

    def forward(self, x: Tensor) -> Tensor:
        """Shape (rows, 4) to (rows, 1)."""
        gate = torch.round(torch.sigmoid(x[:, :1] - self.threshold))
        said: Tensor = self.features(torch.cat([x, gate], dim=1))
        return said


def rounding_gate(seed: int = 42) -> Problem:
    """Learn from 200 points a function of the network's own kind; mean squared error, 0 can be reached.

    Args:
        seed: of both networks' other weights and of the points.

    Example:
        >>> from hybridopt.problems._gate import rounding_gate
        >>> problem = rounding_gate()
        >>> problem.target.threshold.item() < 0, problem.loss(problem.target).item() > 1
        (True, True)
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, teacher, x = Gated(-0.8, 0.0), Gated(THRESHOLD, 3.0), 4 * torch.rand(200, 4) - 2
    return Problem(
        name="rounding_gate",
        loss=partial(_mean_square, x=x, y=teacher(x).detach()),
        target=model,
        bounds={"threshold": (-2, 2)},  # the range of the inputs, outside which the gate does nothing
        best_known=0.0,
        description="six weights and the threshold of a hard gate, whose gradient is 0",
    )


def _mean_square(model: nn.Module, *, x: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = (model(x) - y).square().mean()
    return loss
