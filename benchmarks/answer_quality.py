"""How good are the answers? `auto` and single methods on problems with known answers, under one budget.

Usage: `OMP_NUM_THREADS=1 python benchmarks/answer_quality.py [--only bbob mgh identity scales atoms] [--methods auto
slsqp] [--budgets 50 200] [--instances 15] [--dimensions 2 5 10] [--seeds 15] [--workers 2] [--write]`; every option
narrows what is run, so any line of a record can be run again alone; `--write` puts what was run into
results/answer_quality.json beside what stands there (each line with what was asked for, its machine and its date).

`bbob`: the 24 noiseless BBOB functions in the box ±5, values only, starts uniform in ±4, seed = instance. Values are
package ioh's where it is installed (ours are equal to them to 1e-9, `bbob_reference.py`, but take five times as long).
Measure: the share of the 51 targets f_opt + 10^2, 10^1.8, ..., 10^-8 reached within 50 d, 200 d and 1000 d evaluations,
each budget a run of its own; mean over functions, dimensions and instances, with the standard error over instances.
`ecdf`: the same share after fewer evaluations of those runs (of `mgh`, `identity` and `atoms`: the share of runs
solved after so many evaluations, or forward-equivalents). `profiles` (data profiles, Moré & Wild 2009): the share of
problems with f - f_opt <= tau (f_start - f_opt) after so many times n + 1 evaluations. `bbob+g`: the same losses with
gradients allowed, ours, budgets in forward-equivalents.
`bayes`, whose own time is large, runs only where it is named, for small budgets.
`oracle` is the best of the single methods for each function, dimension and instance, in hindsight.
Peers through their adapters (the same evaluations as called directly): SLSQP begun again at random points, L-BFGS-B
likewise, SciPy's annealing and differential evolution, pycma with BIPOP restarts.

`mgh`: the 35 problems of Moré, Garbow and Hillstrom from their standard starts, residuals known; solved is
f − f* ≤ 1e-8 (f0 − f*) for a listed minimum f*. Evaluations are of residuals, SciPy's LM counted the same way.

`identity`: starts 0.1 · randn, one a seed, 5000 forward-equivalents; forward-equivalents until ≤ 0.783055.

`scales`: quantisation scales of a digits network fitted on training images (3 and 2 bits), gradients off, 300
evaluations; the share of the lost test accuracy that is recovered, against 300 random scales.

`atoms`: Lennard-Jones clusters of 38, random starts; runs of 2e6 forward-equivalents that reach -173.9284 to 1e-3.
Without `--methods` by basin hopping alone; takes about a quarter of an hour a run that fails, so with `--write` the
record is rewritten after every run; `--go-on` keeps the recorded runs and goes on with the next seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from _measure import RESULTS, record

import hybridopt
from hybridopt import Budget, problems

try:
    import ioh
except ImportError:
    ioh = None

BUDGETS = (50, 200, 1000)
CHECKPOINTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
TAUS = (1e-1, 1e-3, 1e-5, 1e-7)
PEERS = {
    "slsqp": "restart(slsqp, begin_at=uniform)",
    "lbfgsb": "restart(lbfgsb, begin_at=uniform)",
    "annealing": "dual_annealing",
    "de": "scipy.differential_evolution",
    "pycma": "cma.cmaes(restarts=bipop)",
}
LQ = "lq_cmaes(restarts=bipop)"
TARGET = 0.783055
CLUSTER = -173.9284
HOPPING = "restart(lbfgsb(ftol=1e-6, gtol=0.01, gradients=autograd), sigma=0.22, temperature=1.2)"


def quiet(run: Callable[[], Any]) -> Any:
    """What it returns, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        return run()


def bbob_loss(f: int, d: int, instance: int, problem: problems.Problem) -> Callable[[np.ndarray], float]:
    """Values alone: nobody can ask for a gradient."""
    if ioh is not None:
        function: Callable[[np.ndarray], float] = ioh.get_problem(f, instance, d, ioh.ProblemClass.BBOB)
        return function
    return lambda x: float(problem.loss(torch.from_numpy(x)))


def reached(job: tuple[str, int, int, int, int, bool]) -> tuple[float, list[float], list[float]]:
    """What a method does with one function.

    Returns:
        The share of targets in the end; that after `CHECKPOINTS` evaluations a weight; and the evaluations, in units
        of n + 1, until f - f_opt <= tau (f_start - f_opt) for each of `TAUS`, inf if never.
    """
    text, f, d, instance, budget, gradients = job
    problem = problems.get(f"bbob(f={f}, d={d}, instance={instance})", instance)
    assert problem.best_known is not None
    optimum = problem.best_known
    targets = problems.bbob_targets(optimum)
    x: Any = problem.target if gradients else problem.target.numpy().copy()
    inner: Any = problem.loss if gradients else bbob_loss(f, d, instance, problem)
    lowest: list[float] = []

    def loss(x: Any) -> Any:
        value = inner(x)
        lowest.append(min(float(value), lowest[-1] if lowest else math.inf))
        return value

    limit: Any = f"{budget * d}fe" if gradients else budget * d
    result = quiet(
        lambda: hybridopt.minimize(loss, x, text, bounds=problem.bounds, budget=limit, seed=instance)
    )
    path = np.array(lowest)
    start = float(problem.loss(problems.get(problem.name, instance).target)) - optimum
    shares = [float((path[: c * d].min() <= targets).mean()) for c in CHECKPOINTS if c <= budget]
    hits = [np.flatnonzero(path - optimum <= tau * start) for tau in TAUS]
    spent = [float(hit[0] + 1) / (d + 1) if len(hit) else math.inf for hit in hits]
    return float((result.best_loss <= targets).mean()), shares, spent


def bbob(asked: argparse.Namespace, pool: Executor, gradients: bool) -> dict[str, Any]:
    """Shares of targets, method by method."""
    chosen = {"auto": "auto", "lq_cmaes": LQ} if gradients else {"auto": "auto", "lq_cmaes": LQ, **PEERS}
    named = {**chosen, "bayes": "bayes"}
    chosen = {name: named[name] for name in asked.methods if name in named} if asked.methods else chosen
    cells = [(f, d) for d in asked.dimensions for f in range(1, 25)]
    found: dict[str, Any] = {}
    for name, text in chosen.items():
        for budget in asked.budgets:
            jobs = [
                (text, f, d, i, budget, gradients) for f, d in cells for i in range(1, asked.instances + 1)
            ]
            runs = list(pool.map(reached, jobs, chunksize=8))
            table = np.array([run[0] for run in runs]).reshape(len(cells), asked.instances)
            by_instance = table.mean(axis=0)
            error = float(by_instance.std(ddof=1) / len(by_instance) ** 0.5) if asked.instances > 1 else 0.0
            ecdf = np.mean([run[1] for run in runs], axis=0)
            spent = np.array([run[2] for run in runs])
            of = np.array(cells)
            found[f"{name} {budget}d"] = {
                "instances": asked.instances,
                "dimensions": asked.dimensions,
                "share": float(table.mean()),
                "error": error,
                "by function": {f"f{f}": float(table[of[:, 0] == f].mean()) for f in range(1, 25)},
                "by dimension": {str(d): float(table[of[:, 1] == d].mean()) for d in asked.dimensions},
                "ecdf": {f"{c}d": float(v) for c, v in zip(CHECKPOINTS, ecdf, strict=False)},
                "profiles": {
                    f"tau {tau:g}": {
                        str(c): float((spent[:, k] <= c).mean()) for c in CHECKPOINTS if c <= budget
                    }
                    for k, tau in enumerate(TAUS)
                },
                "cells": {
                    f"f{f} d{d}": row.round(4).tolist() for (f, d), row in zip(cells, table, strict=True)
                },
            }
            print(f"{name:10} {budget:5}d  {table.mean():.3f} ± {error:.3f}", flush=True)
            if asked.write:
                write("bbob+g" if gradients else "bbob", found)
    return found


def oracle(lines: dict[str, Any]) -> dict[str, Any]:
    """The best of all recorded single methods for each run, where they have the same runs."""
    found: dict[str, Any] = {}
    for budget in BUDGETS:
        alone = [lines[key] for name in (*PEERS, "lq_cmaes") if (key := f"{name} {budget}d") in lines]
        if not alone:
            continue
        count = min(line["instances"] for line in alone)
        cells = [cell for cell in alone[0]["cells"] if all(cell in line["cells"] for line in alone)]
        best = np.max([[line["cells"][cell][:count] for cell in cells] for line in alone], axis=0)
        found[f"oracle {budget}d"] = {"of": len(alone), "instances": count, "share": float(best.mean())}
    return found


def mgh(asked: argparse.Namespace, pool: Executor) -> dict[str, Any]:
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
        found[name] = {
            "solved": solved,
            "ecdf": solved_after([e for e, _ in runs], 5000),
            "evaluations": runs,
        }
    return found


def solved_after(spent: list[float | None], most: float) -> dict[str, float]:
    """The share of runs that were solved after 1, 2, 5, 10, ... and `most` evaluations (None: never)."""
    checkpoints = [digit * 10**power for power in range(7) for digit in (1, 2, 5) if digit * 10**power < most]
    return {f"{c:g}": sum(s is not None and s <= c for s in spent) / len(spent) for c in (*checkpoints, most)}


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


def identity(asked: argparse.Namespace, pool: Executor) -> dict[str, Any]:
    """Forward-equivalents of `auto` until the global minimum."""
    runs = list(pool.map(solve_identity, range(asked.seeds)))
    costs = [cost for loss, cost in runs if loss <= TARGET]
    worst = max(loss for loss, _ in runs)
    print(f"identity: {len(costs)}/{len(runs)} ≤ {TARGET}, worst {worst:.7f}, median {statistics.median(costs):g} fe, "
          f"most {max(costs):g}")  # fmt: skip
    return {"auto": {"ecdf": solved_after([c if v <= TARGET else None for v, c in runs], 5000), "runs": runs}}


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


def scales(asked: argparse.Namespace, pool: Executor) -> dict[str, Any]:
    """Recovered test accuracy."""
    found: dict[str, Any] = {}
    for bits in (3, 2):
        for text in ("cmaes", "random_search"):
            runs = list(pool.map(fit_scales, [(text, bits, seed) for seed in range(asked.seeds)]))
            print(
                f"int{bits} {text}: median {statistics.median(runs):.3f}, {min(runs):.3f} to {max(runs):.3f}"
            )
            found[f"int{bits} {text}"] = {"recovered": runs}
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


def atoms(asked: argparse.Namespace, pool: Executor) -> dict[str, Any]:
    """Runs that find the global minimum of 38 atoms."""
    found: dict[str, Any] = {}
    for text in asked.methods or [HOPPING]:
        kept = recorded("atoms").get(text, {}).get("runs", []) if asked.go_on else []
        runs: list[tuple[float, float]] = [(loss, cost) for loss, cost in kept]
        seeds = range(len(runs), asked.seeds)
        for seed, run in zip(seeds, pool.map(find_cluster, [(text, seed) for seed in seeds]), strict=True):
            runs.append(run)
            hits = sum(loss <= CLUSTER + 1e-3 for loss, _ in runs)
            print(
                f"atoms seed {seed}: {run[0]:.4f} after {run[1]:g} fe; {hits} of {len(runs)} so far",
                flush=True,
            )
            spent = [cost if loss <= CLUSTER + 1e-3 else None for loss, cost in runs]
            found[text] = {"reached": hits, "ecdf": solved_after(spent, 2e6), "runs": runs}
            if asked.write:
                write("atoms", found)
    return found


def find_cluster(job: tuple[str, int]) -> tuple[float, float]:
    """The lowest energy, and the forward-equivalents spent."""
    text, seed = job
    problem = problems.get("lennard_jones(atoms=38)", seed)
    budget = Budget(forward_equivalents=2e6, target=CLUSTER + 1e-3)
    result = quiet(lambda: hybridopt.minimize(problem.loss, problem.target, text, budget=budget, seed=seed))
    return result.best_loss, result.forward_equivalents


def recorded(part: str = "") -> dict[str, Any]:
    """The record, or a part of it."""
    path = RESULTS / "answer_quality.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content.get(part, {}) if part else content


def write(part: str, found: dict[str, Any]) -> None:
    """Put the lines of a part into the record, beside what stands there."""
    content = recorded()
    content.pop("machine", None)
    content.setdefault(part, {}).update(
        {line: {"date": time.strftime("%Y-%m-%d"), **value} for line, value in found.items()}
    )
    if part == "bbob":
        content[part].update(oracle(content[part]))
    record("answer_quality", content, "scipy", "cma")


def main() -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("bbob", "bbob+g", "mgh", "identity", "scales", "atoms")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts[:-1])
    parser.add_argument(
        "--methods", nargs="+", help=f"of bbob: auto, lq_cmaes, bayes, {', '.join(PEERS)}; of atoms: text"
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--instances", type=int, default=15)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 5, 10])
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--go-on", action="store_true", help="of atoms: keep the recorded runs")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    with ProcessPoolExecutor(asked.workers) as pool:
        for part in asked.only:
            print(part)
            if part in ("bbob", "bbob+g"):
                found = bbob(asked, pool, part == "bbob+g")
                print(*(f"{name}: {line['share']:.3f}" for name, line in oracle(found).items()), sep="\n")
            else:
                found = {"mgh": mgh, "identity": identity, "scales": scales, "atoms": atoms}[part](
                    asked, pool
                )
            if asked.write:
                write(part, found)


if __name__ == "__main__":
    main()
