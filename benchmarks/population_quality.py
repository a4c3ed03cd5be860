"""How many targets do our swarm and our differential evolution reach, against pyswarm's and scipy's?

Usage: `OMP_NUM_THREADS=1 python benchmarks/population_quality.py [--quick] [--dimensions 2 5] [--instances 3]
[--workers 2] [--write]`; `--write` stores the outcome in results/. Needs ioh (`pip install --target
DIR ioh`, then `PYTHONPATH=DIR`).

Problems: the 24 noiseless BBOB functions in the box ±5, d = 2, 5, 10, 20, instances 1 to 15, with their optimal value
subtracted (which flatters stopping rules that are relative to the loss). Ours start at a uniformly drawn point,
which is one of their first ones; the peers draw their first points themselves. Measure: the share of the 51 targets
10^2, 10^1.8, ..., 10^-8 reached within 50 d, 200 d and 1000 d evaluations. A solver that stops early keeps what it has.
Compared is the difference of shares of the same function and instance; its 95 % interval is a bootstrap over these
pairs. Goal: no interval wholly below -0.01.

- `pso`, `de`: our defaults. `de reduced`: with `reduce_over` the evaluations of each column (one run a column).
- `pyswarm`: its defaults (100 particles, coefficients 0.5, at most 100 sweeps). `pyswarm constriction`: 0.7298 and
  1.49618, with as many sweeps as the budget takes.
- `scipy`: `differential_evolution` with its defaults, so with a final polish by L-BFGS-B.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import ioh
import numpy as np
import pyswarm
import torch
from _measure import record
from scipy.optimize import differential_evolution

from hybridopt import Method, ParameterVector
from hybridopt.optimizer import Answer
from hybridopt.population.de import DifferentialEvolution
from hybridopt.population.pso import PSO

TARGETS = 10.0 ** np.linspace(2, -8, 51)
BUDGETS = (50, 200, 1000)  # times d
PAIRS = {
    "pso": ("pyswarm", "pyswarm constriction"),
    "de": ("scipy",),
    "de reduced": ("scipy",),
}
Loss = Callable[[Any], Any]


class Enough(Exception):
    """The budget is spent."""


class Problem:
    """One function and instance; remembers the losses that it gave, up to the budget."""

    def __init__(self, function: int, instance: int, d: int) -> None:
        self.d, self.limit = d, max(BUDGETS) * d
        self._problem = ioh.get_problem(
            function, instance=instance, dimension=d, problem_class=ioh.ProblemClass.BBOB
        )
        self._lowest = self._problem.optimum.y
        self.seed = 1000 * function + instance
        self.seen: list[float] = []

    def losses(self, x: np.ndarray) -> np.ndarray:
        """Of a generation."""
        found = np.array(self._problem(x.tolist())) - self._lowest
        self.seen.extend(found.tolist())
        return found

    def loss(self, x: np.ndarray) -> float:
        """Of one point; raises `Enough`."""
        if len(self.seen) >= self.limit:
            raise Enough
        self.seen.append(self._problem(x) - self._lowest)
        return self.seen[-1]

    def reached(self, budget: int) -> float:
        """Share of the targets reached within `budget` × d evaluations."""
        return float(np.mean(min(self.seen[: budget * self.d]) <= TARGETS))


def ours(method: Method, problem: Problem, evaluations: int) -> None:
    """Run until the evaluations are spent or the method ends."""
    x0 = np.random.default_rng(problem.seed).uniform(-5, 5, problem.d)
    run = method.start(ParameterVector(torch.tensor(x0), bounds=(-5, 5)), problem.seed)
    while len(problem.seen) < evaluations:
        step = run.tell(Answer(losses=problem.losses(run.ask().x)))
        if step is not None and step.reason is not None:
            return


def swarm(problem: Problem, **options: Any) -> None:
    """pyswarm; an exception through its Fortran code would print, so past the budget all losses are 0 and unseen."""
    loss = lambda x: problem.loss(x) if len(problem.seen) < problem.limit else 0.0  # noqa: E731
    pyswarm.pso(loss, [-5] * problem.d, [5] * problem.d, seed=problem.seed, **options)


def evolution(problem: Problem) -> None:
    """scipy's."""
    try:
        differential_evolution(problem.loss, [(-5, 5)] * problem.d, rng=problem.seed)
    except Enough:
        pass


def shares(case: tuple[str, int, int, int]) -> list[float]:
    """What one solver reaches on one problem, for each budget."""
    name, function, instance, d = case
    fresh = functools.partial(Problem, function, instance, d)
    if name == "de reduced":
        found = []
        for budget in BUDGETS:
            problem = fresh()
            ours(DifferentialEvolution(reduce_over=budget * d), problem, budget * d)
            found.append(problem.reached(budget))
        return found
    problem = fresh()
    if name in ("pso", "de"):
        ours(PSO() if name == "pso" else DifferentialEvolution(), problem, problem.limit)
    elif name == "pyswarm":
        swarm(problem)
    elif name == "pyswarm constriction":
        swarm(problem, omega=0.7298, phip=1.49618, phig=1.49618, maxiter=-(-problem.limit // 100))
    else:
        evolution(problem)
    return [problem.reached(budget) for budget in BUDGETS]


def interval(differences: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % bootstrap interval."""
    means = [rng.choice(differences, len(differences)).mean() for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def compare(dimensions: list[int], instances: int, workers: int) -> dict[str, Any]:
    """Run all, print and return the table."""
    names = [*PAIRS, *dict.fromkeys(peer for peers in PAIRS.values() for peer in peers)]
    problems = [(f, i, d) for d in dimensions for f in range(1, 25) for i in range(1, instances + 1)]
    reached, seconds = {}, {}
    with ProcessPoolExecutor(workers) as pool:
        for name in names:
            begun = time.perf_counter()
            cases = [(name, *problem) for problem in problems]
            reached[name] = np.array(list(pool.map(shares, cases, chunksize=8)))
            seconds[name] = time.perf_counter() - begun
    of = np.array([d for _, _, d in problems])
    columns = [f"{budget} d" for budget in BUDGETS]
    print(f"{'share of targets':<24}{'d':>4}" + "".join(f"{column:>10}" for column in columns))
    for name in names:
        for d in dimensions:
            row = reached[name][of == d].mean(axis=0)
            print(f"{name:<24}{d:>4}" + "".join(f"{share:>10.3f}" for share in row))
        print(f"{'':<24}{seconds[name]:.0f} s")
    rng = np.random.default_rng(0)
    rows = []
    for name, peers in PAIRS.items():
        for peer in peers:
            for d in [*dimensions, 0]:
                chosen = slice(None) if d == 0 else of == d
                gap = (reached[name] - reached[peer])[chosen]
                for k, column in enumerate(columns):
                    mean, low, high = interval(gap[:, k], rng)
                    rows.append(
                        {"ours": name, "peer": peer, "d": d or "all", "budget": column}
                        | {"difference": mean, "low": low, "high": high, "below_goal": high < -0.01}
                    )
                last = rows[-len(columns) :]
                text = "   ".join(
                    f"{r['difference']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]{' BELOW' * r['below_goal']}"
                    for r in last
                )
                print(f"{name} - {peer}, d = {d or 'all'}: {text}")
    means = {
        name: {str(d): reached[name][of == d].mean(axis=0).tolist() for d in dimensions} for name in names
    }
    return {"instances": instances, "shares": means, "seconds": seconds, "differences": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Swarm and differential evolution on BBOB.")
    parser.add_argument("--quick", action="store_true", help="d = 2, 5 with 2 instances")
    parser.add_argument("--instances", type=int, default=15, help="instances of each function")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 5, 10, 20])
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--write", action="store_true", help="store the outcome in results/")
    arguments = parser.parse_args()
    dimensions, instances = ([2, 5], 2) if arguments.quick else (arguments.dimensions, arguments.instances)
    content = compare(dimensions, instances, arguments.workers)
    if arguments.write:
        file = record("population_quality", content, "scipy", "pyswarm", "ioh")
        print(f"wrote results/{file.name}")


if __name__ == "__main__":
    main()
