"""How far CMA-ES gets on the 24 BBOB functions within 50, 200 and 1000 evaluations a weight: ours and pycma's.

Run: OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/cmaes_quality.py [--quick | --some]

Wants package `ioh` for the functions. Start (uniform in [-4, 4]), sigma (2) and popsize (the default, which is one)
are equal on both sides; no bounds, no restarts; tolerances are each library's own. A run is worth the share of 51
targets, 1e2 ... 1e-8 above the optimum, that it has met within the budget. The interval is from a bootstrap of the
paired differences over (function, dimension, instance). `--some`: dimensions up to 10, instances 1 to 5. `--quick`:
every fourth function and dimension 5, nothing is written.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable

import cma
import ioh
import numpy as np
import torch
from _measure import record

from hybridopt.optimizer import Answer
from hybridopt.population._base import PopulationRun
from hybridopt.population.cmaes import CMAES
from hybridopt.start import Start

BUDGETS = (50, 200, 1000)  # evaluations a weight
TARGETS = 10.0 ** np.linspace(2, -8, 51)
GOAL = -0.01
Batch = Callable[[np.ndarray], np.ndarray]


def ours(loss: Batch, x0: np.ndarray, most: int, seed: int) -> np.ndarray:
    """All losses in the order they were asked for."""
    free = np.full(len(x0), np.inf)
    start = Start(x0, -free, free, np.full(len(x0), np.finfo(float).eps), seed)
    run = PopulationRun(CMAES(sigma=2.0), start)
    seen = []
    while sum(map(len, seen)) < most:
        x = run.ask().x
        assert x is not None
        seen.append(loss(x))
        step = run.tell(Answer(losses=seen[-1]))
        assert step is not None
        if step.reason is not None:
            break
    return np.concatenate(seen)[:most]


def pycma(loss: Batch, x0: np.ndarray, most: int, seed: int) -> np.ndarray:
    es = cma.CMAEvolutionStrategy(x0, 2.0, {"seed": seed, "verbose": -9, "verb_log": 0})
    seen = []
    while sum(map(len, seen)) < most and not es.stop():
        x = es.ask()
        seen.append(loss(np.array(x)))
        es.tell(x, seen[-1].tolist())
    return np.concatenate(seen)[:most]


def share(losses: np.ndarray, optimum: float, most: int) -> float:
    """Share of the targets met by the first `most` losses."""
    return float((losses[:most].min() - optimum <= TARGETS).mean())


def interval(difference: np.ndarray) -> list[float]:
    """95 % of the bootstrapped means."""
    rng = np.random.default_rng(0)
    means = [rng.choice(difference, len(difference)).mean() for _ in range(4000)]
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quick, some = "--quick" in sys.argv, "--some" in sys.argv
    dimensions = (5,) if quick else (2, 5, 10) if some else (2, 5, 10, 20)
    functions = range(1, 25, 4) if quick else range(1, 25)
    instances = range(1, 4) if quick else range(1, 6) if some else range(1, 16)
    sides = {"ours": ours, "pycma": pycma}
    shares: dict[tuple[str, int, int], list[float]] = {}
    begin = time.perf_counter()
    for d in dimensions:
        for function in functions:
            for instance in instances:
                problem = ioh.get_problem(function, instance, d, ioh.ProblemClass.BBOB)
                seed = 1000 * function + instance
                x0 = np.random.default_rng(seed).uniform(-4, 4, d)
                for name, run in sides.items():
                    losses = run(lambda x: np.array(problem(x)), x0, BUDGETS[-1] * d, seed)  # noqa: B023
                    for budget in BUDGETS:
                        worth = share(losses, problem.optimum.y, budget * d)
                        shares.setdefault((name, d, budget), []).append(worth)
        print(f"{d} dimensions done after {time.perf_counter() - begin:.0f} s", flush=True)
    rows = {}
    for budget in BUDGETS:
        for which in (*dimensions, "all"):
            of = dimensions if which == "all" else (which,)
            a, b = (np.concatenate([shares[name, d, budget] for d in of]) for name in ("ours", "pycma"))
            low, high = interval(a - b)
            rows[f"{budget}d, {which}"] = {
                "ours": float(a.mean()),
                "pycma": float(b.mean()),
                "interval": [low, high],
                "problems": len(a),
            }
            print(
                f"{budget:5d} d evaluations, dimension {which!s:4s} ours {a.mean():.4f}   pycma {b.mean():.4f}   "
                f"difference {(a - b).mean():+.4f}   ({low:+.4f} – {high:+.4f})"
                + ("   MISSED" if which == "all" and high < GOAL else "")
            )
    if not quick:
        scope = {"dimensions": list(dimensions), "instances": [instances[0], instances[-1]], "goal": GOAL}
        path = record("cmaes_quality", {**scope, "share_of_targets": rows}, "cma", "ioh")
        print(f"\nwritten: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
