"""Runs whose every evaluation is recorded, for tests that compare paths bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridopt import Method, Run, method
from tests.third_party import NelderMead

BOX = (-2.0, 2.0)

# Blocking solvers, each in the modes that ask different questions.
SOLVERS: dict[str, Method] = {
    "slsqp": method("slsqp"),
    "slsqp_differences": method("slsqp(gradients=differences)"),
    "slsqp_none": method("slsqp(gradients=none)"),
    "annealing": method("dual_annealing"),
    "annealing_none": method("dual_annealing(gradients=none)"),
    "pyswarm.pso": method("pyswarm.pso(swarmsize=6)"),
    "cma.cmaes": method("cma.cmaes"),
    "nelder_mead": NelderMead(),
}


def rosenbrock(x: Tensor) -> Tensor:
    """Minimum 0 at (1, ..., 1)."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


class Evaluation(NamedTuple):
    """Equal if and only if all bits are."""

    x: bytes
    loss: str


class Recorded:
    """A loss that remembers where it was called and what it said."""

    def __init__(self, function: Callable[[Tensor], Any] = rosenbrock) -> None:
        self.function = function
        self.path: list[Evaluation] = []

    def __call__(self, x: Tensor) -> Any:
        value = self.function(x)
        self.path.append(Evaluation(x.detach().numpy().tobytes(), float(value.detach()).hex()))
        return value

    @property
    def best(self) -> float:
        return min((v for e in self.path if math.isfinite(v := float.fromhex(e.loss))), default=math.inf)


def start(
    solver: Method,
    budget: Any = 60,
    seed: int = 3,
    x0: list[float] | None = None,
    loss: Recorded | None = None,
    bounds: Any = BOX,
) -> tuple[Run, Recorded]:
    """A run of a solver on Rosenbrock's function, and its recorded loss."""
    loss = Recorded() if loss is None else loss
    x = torch.tensor([-1.2, 1.0, 0.3] if x0 is None else x0, dtype=torch.float64)
    if isinstance(solver, NelderMead):
        bounds = None
    return Run(loss, x, solver, budget=budget, bounds=bounds, seed=seed, batch="loop"), loss


def whole(solver: Method, budget: Any = 60, **options: Any) -> list[Evaluation]:
    """The path of an undisturbed run."""
    run, loss = start(solver, budget, **options)
    with run:
        for _ in run:
            pass
    return loss.path


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
