"""Do compositions reach what their parts do not, does handing over help, and what does a chain cost?

Usage: `OMP_NUM_THREADS=1 python benchmarks/compositions.py [--seeds 15] [--workers 2] [--only identity] [--write]`;
`--write` stores the outcome in results/.

`identity`: the seed comparison's problem from starts 0.1 · randn, one a seed: annealing (700 evaluations), then Adam,
then SLSQP within 1500 forward-equivalents; Adam and CMA-ES by turns within 20 000, where each turn of CMA-ES is a wide
search from the best point, since 12 of 30 starts lead it to a plateau at 1e5 first. There the shape that Adam hands
over misleads (13 of 15 seeds arrive with it), so it takes the point alone. Goal: each ends ≤ 0.783055 for every seed.

`handover`: forward-equivalents until the target, with all that a stage takes from its predecessor and with the point
alone (`handover=point`), the same seeds; a run that does not arrive counts as its whole budget. Shown are medians, how
many arrived, and in how many pairs handing over was faster or slower.

`overhead`: µs per step of a method alone, as the one stage of a chain, and with a switch rule; interleaved, no loss.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from _measure import interleaved, record, summary
from torch import Tensor

import hybridopt
from hybridopt import Budget, problems
from hybridopt.optimizer import Answer

IDENTITY = {
    "dual_annealing(evaluations=700) > adam(lr=0.001, steps=10) > slsqp(ftol=1e-12)": "1500fe",
    "cycle(cmaes(handover=point) until plateau(500, tolerance=1e-05) > adam(lr=0.003, steps=200) until plateau(50))":
        "20000fe",
}  # fmt: skip
GOAL = 0.783055


def rosenbrock(x: Tensor) -> Tensor:
    """Minimum 0."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def ellipsoid(x: Tensor) -> Tensor:
    """Minimum 0; curvatures from 1 to 1e6."""
    n = len(x)
    return (10 ** (6 * torch.arange(n, dtype=x.dtype) / (n - 1)) * (x - 0.5) ** 2).sum()


def rastrigin(x: Tensor) -> Tensor:
    """Minimum 0."""
    return (x**2 - 10 * torch.cos(2 * torch.pi * x) + 10).sum()


# name: (loss or problem, n, budget, target, chain with {} where the receiving stage's option goes)
HANDOVER: dict[str, tuple[Any, int, str, float, str]] = {
    "Rosenbrock-20, SLSQP to CMA-ES": (rosenbrock, 20, "40000fe", 1e-8, "slsqp(evaluations=60) > cmaes(sigma=0.1{})"),
    "Rosenbrock-20, L-BFGS to CMA-ES": (rosenbrock, 20, "40000fe", 1e-8, "lbfgs(evaluations=60) > cmaes(sigma=0.1{})"),
    "Rosenbrock-20, Adam to CMA-ES": (
        rosenbrock, 20, "60000fe", 1e-8, "adam(lr=0.02, steps=300) > cmaes(sigma=0.1{})",
    ),
    "ellipsoid-20, Adam to CMA-ES": (ellipsoid, 20, "60000fe", 1e-8, "adam(lr=0.02, steps=100) > cmaes(sigma=0.1{})"),
    "ellipsoid-20, SLSQP to CMA-ES": (ellipsoid, 20, "60000fe", 1e-8, "slsqp(evaluations=20) > cmaes(sigma=0.1{})"),
    "Rosenbrock-20, CMA-ES to Adam": (rosenbrock, 20, "60000fe", 1e-2, "cmaes(evaluations=3000) > adam{}"),
    "Rosenbrock-20, DE to CMA-ES": (rosenbrock, 20, "60000fe", 1e-8, "de(evaluations=8000) > cmaes{}"),
    "Rosenbrock-20, PSO to CMA-ES": (rosenbrock, 20, "60000fe", 1e-8, "pso(evaluations=3000) > cmaes{}"),
    "Rosenbrock-20, DE to Adam": (rosenbrock, 20, "60000fe", 1e-2, "de(evaluations=4000) > adam{}"),
    "Rastrigin-10, DE to CMA-ES": (rastrigin, 10, "40000fe", 1e-6, "de(evaluations=3000) > cmaes(popsize=100{})"),
    "Rastrigin-10, PSO to DE": (rastrigin, 10, "60000fe", 1e-6, "pso(evaluations=4000) > de{}"),
    "Rastrigin-10, DE to PSO": (rastrigin, 10, "60000fe", 1e-6, "de(evaluations=3000) > pso{}"),
    "digits MLP, SNES to Adam": ("digits_mlp", 0, "4000fe", 150, "snes(evaluations=500) > adam{}"),
}  # fmt: skip


def start_of_identity(seed: int) -> Any:
    """The problem with its weights at 0.1 · randn."""
    problem = problems.get("identity")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in problem.target.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return problem


def identity(text: str, budget: str, seed: int) -> tuple[float, float]:
    """Final loss and forward-equivalents spent."""
    problem = start_of_identity(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        r = hybridopt.minimize(
            problem.loss, problem.target, text, budget=budget, bounds=problem.bounds, seed=seed
        )
    return r.best_loss, r.forward_equivalents


def handed(name: str, option: str, seed: int) -> tuple[float, bool]:
    """Forward-equivalents until the target, and whether it was reached."""
    loss, n, budget, target, chain = HANDOVER[name]
    first, _, last = chain.partition("{}")
    text = (
        first + (f", {option}" if "(" in first.rpartition(">")[2] else f"({option})" if option else "") + last
    )
    text = text.replace(", )", ")").replace("()", "")
    limits = Budget(**(vars(Budget.parse(budget)) | {"target": target}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(loss, str):
            problem = problems.get(loss, seed)
            r = hybridopt.minimize(
                problem.loss, problem.target, text, budget=limits, select=problem.select, seed=seed,
                surrogate=problem.surrogate,
            )  # fmt: skip
        else:
            x = torch.from_numpy(np.random.default_rng(seed).uniform(-2, 2, n))
            r = hybridopt.minimize(loss, x, text, budget=limits, bounds=(-5, 5), seed=seed)
    reached = r.best_loss <= target
    return r.forward_equivalents if reached else float(limits.forward_equivalents or 0), reached


def overhead() -> dict[str, list[float]]:
    """µs per step of a random search of one point, asked and told directly, alone and inside a chain."""

    def walk(text: str, steps: int) -> None:
        vector = hybridopt.ParameterVector(torch.zeros(2, dtype=torch.float64), bounds=(-1, 1))
        run = hybridopt.method(text).start(vector, 0)
        told = Answer(1.0, np.ones(1))
        for _ in range(steps):
            run.ask()
            run.tell(told)

    one = "random_search(popsize=1)"
    tasks = {
        "alone": partial(walk, one, 5000),
        "in a chain": partial(walk, f"({one})(steps=100000)", 5000),
        "with a rule": partial(walk, f"{one} until plateau(50) & steps(90000)", 5000),
    }
    return interleaved(tasks, rounds=15, per=5000)


def main() -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=("identity", "handover", "overhead"))
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    seeds = range(asked.seeds)

    def keep(part: str, content: dict[str, Any]) -> None:
        if asked.write:
            print(record(f"compositions_{part}", {"seeds": asked.seeds, **content}))

    with ProcessPoolExecutor(asked.workers) as pool:
        if asked.only in (None, "identity"):
            content: dict[str, Any] = {}
            for text, budget in IDENTITY.items():
                runs = list(pool.map(partial(identity, text, budget), seeds))
                reached = sum(loss <= GOAL for loss, _ in runs)
                print(f"{text}, {budget}: {reached}/{len(runs)} ≤ {GOAL}, worst {max(loss for loss, _ in runs):.7f}, "
                      f"median {statistics.median(cost for _, cost in runs):g} fe")  # fmt: skip
                content[text] = {"reached": reached, "runs": runs}
            keep("identity", content)
        if asked.only in (None, "handover"):
            content = {}
            for name in HANDOVER:
                both = {
                    option: list(pool.map(partial(handed, name, option), seeds))
                    for option in ("", "handover=point")
                }
                on, off = both[""], both["handover=point"]
                faster = sum(a[0] < b[0] for a, b in zip(on, off, strict=True))
                slower = sum(a[0] > b[0] for a, b in zip(on, off, strict=True))
                for way, runs in (("all", on), ("point", off)):
                    print(f"{name}, {way}: {statistics.median(c for c, _ in runs):g} fe, "
                          f"{sum(r for _, r in runs)}/{len(runs)} arrived")  # fmt: skip
                print(f"{name}: with all faster {faster}, slower {slower}", flush=True)
                content[name] = {"all": on, "point": off}
            keep("handover", content)
    if asked.only in (None, "overhead"):
        found, content = overhead(), {}
        for way in ("in a chain", "with a rule"):
            more = summary([b - a for a, b in zip(found["alone"], found[way], strict=True)])
            print(f"{way}: {more['median']:.2f} µs more a step ({more['min']:.2f} to {more['max']:.2f})")
            content[way] = more
        keep("overhead", content)


if __name__ == "__main__":
    main()
