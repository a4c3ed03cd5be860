"""What a generation of CMA-ES costs beside the loss: ours, pycma, cmaes and EvoTorch.

Run: OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/cmaes_speed.py [--quick]

pycma comes with hybridopt; `cmaes` and `evotorch` (which wants ray) are measured where they are installed. All minimise
the same ellipsoid from the same start with the same popsize, in turn in one process; only asking and telling is timed.
(EvoTorch evaluates within its step: one vectorised call is part of its time.) A sample is the mean over many
generations in a row, so that work done only now and then (factorisations) is in it.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import cma
import numpy as np
import torch
from _measure import record, summary

from hybridopt.optimizer import Answer
from hybridopt.population._base import PopulationRun
from hybridopt.population.cmaes import CMAES
from hybridopt.start import Start

GOALS = {(10, 10): 5.0, (10, 100): 5.0, (100, 100): 4.0, (1000, 100): 3.0}
Generations = Callable[[int], float]
"""Runs so many generations; the seconds spent in the method."""


def ellipsoid(x: np.ndarray) -> np.ndarray:
    d = x.shape[1]
    return (10.0 ** (6 * np.arange(d) / d) * x**2).sum(1)


def ours(d: int, popsize: int, covariance: str = "full") -> Generations:
    free = np.full(d, np.inf)
    start = Start(np.ones(d), -free, free, np.full(d, np.finfo(float).eps), 1)
    method = CMAES(sigma=0.5, popsize=popsize, covariance=covariance, tolfun=0.0, tolfunhist=0.0, tolx=0.0)  # type: ignore[arg-type]
    run = PopulationRun(method, start)

    def generations(count: int) -> float:
        spent = 0.0
        for _ in range(count):
            begin = time.perf_counter()
            x = run.ask().x
            spent += time.perf_counter() - begin
            assert x is not None
            answer = Answer(losses=ellipsoid(x))
            begin = time.perf_counter()
            step = run.tell(answer)
            spent += time.perf_counter() - begin
            assert step is not None
            assert step.reason is None
        return spent

    return generations


def pycma(d: int, popsize: int) -> Generations:
    options = {
        "popsize": popsize,
        "verbose": -9,
        "verb_log": 0,
        "seed": 1,
        "tolfun": 0,
        "tolfunhist": 0,
        "tolx": 0,
    }
    es = cma.CMAEvolutionStrategy(np.ones(d), 0.5, options)

    def generations(count: int) -> float:
        spent = 0.0
        for _ in range(count):
            begin = time.perf_counter()
            x = es.ask()
            spent += time.perf_counter() - begin
            losses = ellipsoid(np.array(x)).tolist()
            begin = time.perf_counter()
            es.tell(x, losses)
            es.stop()
            spent += time.perf_counter() - begin
        return spent

    return generations


def cmaes(d: int, popsize: int) -> Generations:
    from cmaes import CMA

    es = CMA(mean=np.ones(d), sigma=0.5, population_size=popsize, seed=1)

    def generations(count: int) -> float:
        spent = 0.0
        for _ in range(count):
            begin = time.perf_counter()
            x = [es.ask() for _ in range(popsize)]
            spent += time.perf_counter() - begin
            losses = ellipsoid(np.array(x)).tolist()
            begin = time.perf_counter()
            es.tell(list(zip(x, losses, strict=True)))
            es.should_stop()
            spent += time.perf_counter() - begin
        return spent

    return generations


def evotorch(d: int, popsize: int) -> Generations:
    from evotorch import Problem
    from evotorch.algorithms import CMAES as Theirs  # noqa: N811
    from evotorch.decorators import vectorized

    logging.disable(logging.INFO)
    sizes = 10.0 ** (6 * torch.arange(d, dtype=torch.float64) / d)
    loss = vectorized(lambda x: (sizes * x * x).sum(1))
    problem = Problem("min", loss, solution_length=d, initial_bounds=(-1, 1), dtype=torch.float64, seed=1)
    es = Theirs(problem, stdev_init=0.5, popsize=popsize, center_init=torch.ones(d, dtype=torch.float64))

    def generations(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            es.step()
        return time.perf_counter() - begin

    return generations


def main() -> None:
    quick = "--quick" in sys.argv
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    peers: dict[str, Callable[[int, int], Generations]] = {"pycma": pycma}
    for name, make in (("cmaes", cmaes), ("evotorch", evotorch)):
        if importlib.util.find_spec(name) is not None:
            peers[name] = make
        else:
            print(f"{name} is not installed: left out")
    rows: dict[str, Any] = {}
    for (d, popsize), goal in GOALS.items():
        per = {10: 50, 100: 20, 1000: 10}[d]
        rounds = 5 if quick else 11
        tasks = {"ours": ours(d, popsize), **{name: make(d, popsize) for name, make in peers.items()}}
        seen: dict[str, list[float]] = {name: [] for name in tasks}
        for round_ in range(rounds + 1):
            for name, task in list(tasks.items()):
                slow = len(seen[name]) > 0 and min(seen[name]) > 1e6
                count = 1 if slow else per
                if slow and len(seen[name]) >= 2:  # seconds a generation: two samples tell enough
                    continue
                micro = task(1 if name != "ours" and d == 1000 and round_ == 0 else count) / count * 1e6
                if round_ or d == 1000:  # the first round warms up
                    seen[name].append(micro)
        print(f"\n{d} weights, popsize {popsize}; microseconds per generation")
        row = {name: summary(samples) for name, samples in seen.items()}
        for name, found in row.items():
            print(f"  {name:10s} {found['median']:12.1f}   ({found['min']:.1f} – {found['max']:.1f})")
        best = min((name for name in row if name != "ours"), key=lambda name: row[name]["median"])
        times = row[best]["median"] / row["ours"]["median"]
        print(f"  {times:.1f} × faster than {best}; goal {goal:g}")
        rows[f"{d}x{popsize}"] = {"microseconds": row, "best_peer": best, "times_faster": times, "goal": goal}
    if not quick:
        found = [name for name in peers if name != "pycma"]
        path = record("cmaes_speed", {"generation": rows}, "cma", *found)
        print(f"\nwritten: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
