"""Runs that are saved in one process and continued in another (`python -m tests.resuming STATES PATHS`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hybridopt import Method, Run, method
from hybridopt.ledger import Ledger
from tests.driving import rosenbrock
from tests.third_party import Extragradient, NelderMead, SignSGD

Path_ = list[tuple[str, bytes]]


class Case(NamedTuple):
    """A method on a problem, with a budget in evaluations."""

    method: Method
    problem: str
    budget: int


def _valley() -> tuple[Callable[..., Any], Any, Any]:
    return rosenbrock, torch.tensor([-1.2, 1.0, 0.3], dtype=torch.float64), (-2.0, 2.0)


def _free_valley() -> tuple[Callable[..., Any], Any, Any]:
    loss, x, _ = _valley()
    return loss, x, None


def _noisy_network() -> tuple[Callable[..., Any], Any, Any]:
    """float32, BatchNorm, dropout and minibatches: everything that draws random numbers or keeps buffers."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))
    x = torch.randn(64, 3)
    y = x.prod(dim=1, keepdim=True)

    def loss(model: nn.Module) -> Tensor:
        rows = torch.randint(64, (16,))
        jitter = float(np.random.standard_normal())
        return ((model(x[rows]) - y[rows]) ** 2).mean() + 1e-3 * jitter

    return loss, model, (-3.0, 3.0)


PROBLEMS: dict[str, Callable[[], tuple[Callable[..., Any], Any, Any]]] = {
    "valley": _valley,
    "free": _free_valley,
    "network": _noisy_network,
}

CASES: dict[str, Case] = {
    "slsqp": Case(method("slsqp"), "valley", 45),
    "slsqp_differences": Case(method("slsqp(gradients=differences)"), "valley", 60),
    "slsqp_none": Case(method("slsqp(gradients=none)"), "free", 60),
    "annealing": Case(method("dual_annealing"), "valley", 90),
    "annealing_none": Case(method("dual_annealing(gradients=none)"), "valley", 90),
    "pyswarm.pso": Case(method("pyswarm.pso(swarmsize=8)"), "valley", 61),
    "cma.cmaes": Case(method("cma.cmaes"), "free", 61),
    "cmaes_bounded": Case(method("cma.cmaes(popsize=6)"), "valley", 61),
    "adam": Case(method("torch.adam(lr=0.05)"), "network", 25),
    "sgd": Case(method("torch.sgd(lr=0.01, momentum=0.9)"), "network", 25),
    "rprop": Case(method("torch.rprop(lr=0.01)"), "valley", 25),
    "lbfgs": Case(method("torch.lbfgs(line_search_fn=strong_wolfe)"), "free", 60),
    "lbfgs_noisy": Case(method("torch.lbfgs(lr=0.2, max_iter=5)"), "network", 31),
    "pso_noisy": Case(method("pyswarm.pso(swarmsize=5)"), "network", 31),
    "cmaes_noisy": Case(method("cma.cmaes"), "network", 45),
    "sign": Case(method(SignSGD, lr=0.02), "network", 25),
    "extragradient": Case(method(Extragradient, lr=1e-3), "valley", 25),
    "nelder_mead": Case(NelderMead(), "free", 61),
    "chain": Case(method("dual_annealing(evaluations=40, gradients=none) > slsqp(ftol=1e-12)"), "valley", 90),
    "chain_noisy": Case(
        method("torch.adam(lr=0.05, steps=7) > cma.cmaes(evaluations=20) > torch.lbfgs"), "network", 40
    ),
    "native_cmaes": Case(method("cmaes(restarts=ipop, popsize=6)"), "valley", 61),
    "native_pso": Case(method("pso(swarmsize=8)"), "valley", 61),
    "native_de": Case(method("de(popsize=9)"), "valley", 61),
    "native_snes": Case(method("snes"), "network", 45),
    "native_xnes": Case(method("xnes"), "free", 61),
    "native_pgpe": Case(method("pgpe"), "free", 61),
    "native_sobol": Case(method("sobol(popsize=8)"), "valley", 40),
    "lbfgsb": Case(method("lbfgsb"), "valley", 61),
    "cobyqa": Case(method("cobyqa"), "free", 40),
    "differential_evolution": Case(method("differential_evolution(popsize=3)"), "valley", 61),
    "chain_nested": Case(
        method("((pyswarm.pso(swarmsize=5, evaluations=12) > torch.adam(lr=0.1))(evaluations=22) > slsqp)"
               "(forward_equivalents=70) > cma.cmaes(steps=3)"),
        "valley",
        61,
    ),
}  # fmt: skip


class Recorder:
    """Listens: each evaluation's loss and weights, to the bit."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path: Path_ = []
        run.objective.listeners.append(self)

    def evaluated(self, ledger: Ledger, scopes: Any, loss: float, probe: bool) -> None:
        self.path.append((float(loss).hex(), self.run.objective.vector.read().tobytes()))


def begin(case: Case, budget: Any = None) -> tuple[Run, Recorder]:
    loss, target, bounds = PROBLEMS[case.problem]()
    limit = case.budget if budget is None else budget
    run = Run(loss, target, case.method, budget=limit, bounds=bounds, seed=9, batch="loop")
    return run, Recorder(run)


def resume(case: Case, state: Any) -> Path_:
    """The rest of the path."""
    run, recorder = begin(case)
    with run:
        run.load_state_dict(state)
        for _ in run:
            pass
    return recorder.path


def main(states: str, paths: str) -> None:
    """Continue every state of a file; write the paths."""
    torch.set_num_threads(1)
    todo = torch.load(states, weights_only=True)
    done = [[name, [list(row) for row in resume(CASES[name], state)]] for name, state in todo]
    torch.save(done, paths)


if __name__ == "__main__":
    main(*sys.argv[1:])
