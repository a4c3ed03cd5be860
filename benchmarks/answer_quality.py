"""How good are the answers? `auto` and single methods on problems with known answers, under one budget.

Usage: `OMP_NUM_THREADS=1 python benchmarks/answer_quality.py [--only bbob mgh identity scales] [--methods auto slsqp]
[--instances 15] [--dimensions 2 5 10] [--seeds 15] [--workers 2] [--write]`; every option narrows what is run, so any
line of a record can be run again alone; `--write` stores the outcome in results/.

`bbob`: the 24 noiseless BBOB functions in the box ±5, values only, starts uniform in ±4, seed = instance. Measure: the
share of the 51 targets f_opt + 10^2, 10^1.8, ..., 10^-8 reached within 50 d, 200 d and 1000 d evaluations, each budget
a run of its own; mean over functions, dimensions and instances, with the standard error over instances. `bbob+g`: the
same losses with gradients allowed, budgets in forward-equivalents.
`oracle` is the best of the single methods for each function, dimension and instance, in hindsight.
Peers through their adapters (the same evaluations as called directly): SLSQP begun again at random points, L-BFGS-B
likewise, SciPy's annealing and differential evolution, pycma with BIPOP restarts.

`mgh`: the 35 problems of Moré, Garbow and Hillstrom from their standard starts, residuals known; solved is
f − f* ≤ 1e-8 (f0 − f*) for a listed minimum f*. Evaluations are of residuals, SciPy's LM counted the same way.

`identity`: starts 0.1 · randn, one a seed, 5000 forward-equivalents; forward-equivalents until ≤ 0.783055.

`scales`: quantisation scales of a digits network fitted on training images (3 and 2 bits), gradients off, 300
evaluations; the share of the lost test accuracy that is recovered, against 300 random scales.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from _measure import record

import hybridopt
from hybridopt import Budget, problems

BUDGETS = (50, 200, 1000)
SINGLE = {
    "slsqp": "restart(slsqp, begin_at=uniform)",
    "lbfgsb": "restart(lbfgsb, begin_at=uniform)",
    "annealing": "dual_annealing",
    "de": "scipy.differential_evolution",
    "pycma": "cma.cmaes(restarts=bipop)",
}
TARGET = 0.783055


def quiet(run: Callable[[], Any]) -> Any:
    """What it returns, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        return run()


def share(job: tuple[str, int, int, int, int, bool]) -> float:
    """Share of targets that a method reaches on one function."""
    text, f, d, instance, budget, gradients = job
    problem = problems.get(f"bbob(f={f}, d={d}, instance={instance})", instance)
    assert problem.best_known is not None
    targets = problems.bbob_targets(problem.best_known)
    loss: Any = problem.loss
    x: Any = problem.target
    if not gradients:  # NumPy's array: nobody can ask for a gradient
        x = x.numpy().copy()
        inner = problem.loss
        loss = lambda x: float(inner(torch.from_numpy(x)))  # noqa: E731
    limit: Any = f"{budget * d}fe" if gradients else budget * d
    result = quiet(
        lambda: hybridopt.minimize(loss, x, text, bounds=problem.bounds, budget=limit, seed=instance)
    )
    return float((result.best_loss <= targets).mean())


def bbob(asked: argparse.Namespace, pool: ProcessPoolExecutor, gradients: bool) -> dict[str, Any]:
    """Shares of targets, method by method."""
    chosen = {"auto": "auto", **SINGLE}
    chosen = {name: text for name, text in chosen.items() if not asked.methods or name in asked.methods}
    cells = [(f, d) for d in asked.dimensions for f in range(1, 25)]
    found: dict[str, Any] = {}
    tables: dict[tuple[str, int], np.ndarray] = {}
    for name, text in chosen.items():
        found[name] = {}
        for budget in BUDGETS:
            jobs = [
                (text, f, d, i, budget, gradients) for f, d in cells for i in range(1, asked.instances + 1)
            ]
            table = np.array(list(pool.map(share, jobs, chunksize=8))).reshape(len(cells), asked.instances)
            tables[name, budget] = table
            by_instance = table.mean(axis=0)
            error = (
                float(by_instance.std(ddof=1) / math.sqrt(asked.instances)) if asked.instances > 1 else 0.0
            )
            by_function = {f"f{f}": float(np.mean([row for (g, _), row in zip(cells, table.mean(axis=1), strict=True)
                                                  if g == f])) for f in range(1, 25)}  # fmt: skip
            found[name][f"{budget}d"] = {
                "share": float(table.mean()),
                "error": error,
                "functions": by_function,
            }
            print(f"{name:10} {budget:5}d  {table.mean():.3f} ± {error:.3f}", flush=True)
    alone = [name for name in chosen if name != "auto"]
    if alone:
        found["oracle"] = {}
        for budget in BUDGETS:
            best = np.max([tables[name, budget] for name in alone], axis=0)
            found["oracle"][f"{budget}d"] = {"share": float(best.mean())}
            print(f"{'oracle':10} {budget:5}d  {best.mean():.3f}")
    return found


def mgh(asked: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Which of the 35 are solved, in how many evaluations, against SciPy's LM."""
    found: dict[str, Any] = {}
    for name in ("auto", "least_squares(method=lm)"):
        runs = list(pool.map(solve_mgh, [(name, number) for number in range(1, 36)]))
        solved = [number for number, (evaluations, _) in enumerate(runs, 1) if evaluations is not None]
        counts = [e for e, _ in runs if e is not None]
        failed = sorted(set(range(1, 36)) - set(solved))
        print(
            f"mgh {name}: {len(solved)}/35 solved, not {failed}; median {statistics.median(counts)} evaluations"
        )
        found[name] = {"solved": solved, "evaluations": runs}
    return found


def solve_mgh(job: tuple[str, int]) -> tuple[int | None, float]:
    """Evaluations until solved (None: not within 5000), and the lowest loss."""
    text, number = job
    problem = problems.get(f"mgh(number={number})")
    start = float(problem.loss(problem.target))
    minima = [problem.best_known, *problem.minima]
    goals = [m + 1e-8 * (start - m) for m in minima if m is not None]
    tracker = hybridopt.Tracker()
    result = quiet(
        lambda: hybridopt.minimize(
            problem.residuals,
            problem.target,
            text,
            budget=Budget(evaluations=5000, target=min(goals)),
            residuals=True,
            seed=0,
            tracker=tracker,
        )
    )
    listed = any(abs(result.best_loss - m) <= 1e-8 * abs(start - m) for m in minima if m is not None)
    if not listed and result.best_loss > min(goals):
        return None, result.best_loss
    reached = min((g for g in goals if result.best_loss <= g), default=result.best_loss)
    losses = tracker.runs[0].column("loss")
    return next((i for i, loss in enumerate(losses, 1) if loss <= reached), len(losses)), result.best_loss


def identity(asked: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Forward-equivalents of `auto` until the global minimum."""
    runs = list(pool.map(solve_identity, range(asked.seeds)))
    costs = [cost for loss, cost in runs if loss <= TARGET]
    worst = max(loss for loss, _ in runs)
    print(f"identity: {len(costs)}/{len(runs)} ≤ {TARGET}, worst {worst:.7f}, median {statistics.median(costs):g} fe, "
          f"most {max(costs):g}")  # fmt: skip
    return {"runs": runs}


def solve_identity(seed: int) -> tuple[float, float]:
    """Lowest loss and forward-equivalents, stopped at the target."""
    problem = problems.get("identity")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in problem.target.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    budget = Budget(forward_equivalents=5000, target=TARGET)
    result = quiet(lambda: hybridopt.minimize(problem.loss, problem.target, "auto", budget=budget, seed=seed))
    return result.best_loss, result.forward_equivalents


def scales(asked: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Recovered test accuracy."""
    found: dict[str, Any] = {}
    for bits in (3, 2):
        for text in ("cmaes", "random_search"):
            runs = list(pool.map(fit_scales, [(text, bits, seed) for seed in range(asked.seeds)]))
            print(
                f"int{bits} {text}: median {statistics.median(runs):.3f}, {min(runs):.3f} to {max(runs):.3f}"
            )
            found[f"int{bits} {text}"] = runs
    return found


def fit_scales(job: tuple[str, int, int]) -> float:
    """The share of the lost test accuracy that is recovered."""
    text, bits, seed = job
    problem = problems.get(f"quantisation(bits={bits})", seed)
    quiet(
        lambda: hybridopt.minimize(
            problem.loss,
            problem.target,
            text,
            budget=300,
            bounds=problem.bounds,
            select=problem.select,
            seed=seed,
        )
    )
    assert problem.score is not None
    return problem.score(problem.target)


def main() -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("bbob", "bbob+g", "mgh", "identity", "scales")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--methods", nargs="+", choices=["auto", *SINGLE])
    parser.add_argument("--instances", type=int, default=15)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 5, 10])
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    content: dict[str, Any] = {"asked": {k: v for k, v in vars(asked).items() if k != "write"}}
    with ProcessPoolExecutor(asked.workers) as pool:
        for part in asked.only:
            print(part)
            if part in ("bbob", "bbob+g"):
                content[part] = bbob(asked, pool, part == "bbob+g")
            else:
                content[part] = {"mgh": mgh, "identity": identity, "scales": scales}[part](asked, pool)
    if asked.write:
        print(record("answer_quality", content, "scipy", "cma"))


if __name__ == "__main__":
    main()
