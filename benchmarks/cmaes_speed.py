"""What a generation of CMA-ES costs beside the loss: ours, pycma, cmaes and EvoTorch.

Run: OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/cmaes_speed.py [--quick] [--only many]

Each side is measured with 1 thread and with one for each core, in turn, and stands with its better one.

pycma comes with hybridopt; `cmaes` and `evotorch` (which wants ray) are measured where they are installed. All minimise
the same ellipsoid from the same start with the same popsize, in turn in one process; only asking and telling is timed.
(EvoTorch evaluates within its step: one vectorised call is part of its time.) A sample is the mean over many
generations in a row, so that work done only now and then (factorisations) is in it.

For 1e5 and 1e6 weights: SNES and our CMA-ES in O(n) memory against EvoTorch's SNES, popsize 4 + 3 ln n, in float64 as
ours computes and in EvoTorch's default float32. `PYTHONPATH` may name a folder where the peers are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import cma
import numpy as np
import torch
from _measure import ratio, record, summary
from threadpoolctl import threadpool_limits

from hybridopt.optimizer import Answer
from hybridopt.population import CMAES, SNES
from hybridopt.population._base import PopulationMethod, PopulationRun
from hybridopt.start import Start

GOALS = {(10, 10): 5.0, (10, 100): 5.0, (100, 100): 4.0, (1000, 100): 3.0}
THREADS = sorted({1, os.cpu_count() or 1})
Generations = Callable[[int], float]
"""Runs so many generations; the seconds spent in the method."""


def ellipsoid(x: np.ndarray) -> np.ndarray:
    d = x.shape[1]
    return (10.0 ** (6 * np.arange(d) / d) * x**2).sum(1)


def ours(d: int, popsize: int) -> Generations:
    return told(CMAES(sigma=0.5, popsize=popsize, tolfun=0.0, tolfunhist=0.0, tolx=0.0), d, ellipsoid)


def told(method: PopulationMethod, d: int, loss: Callable[[np.ndarray], np.ndarray]) -> Generations:
    """Our `method` on `d` weights."""
    free = np.full(d, np.inf)
    start = Start(np.ones(d), -free, free, np.full(d, np.finfo(float).eps), 1)
    run = PopulationRun(method, start)

    def generations(count: int) -> float:
        spent = 0.0
        for _ in range(count):
            begin = time.perf_counter()
            x = run.ask().x
            spent += time.perf_counter() - begin
            assert x is not None
            answer = Answer(losses=loss(x))
            del x  # as in a run, whose question is gone when the next one is asked
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
    sizes = 10.0 ** (6 * torch.arange(d, dtype=torch.float64) / d)
    return stepped("CMAES", lambda x: (sizes * x * x).sum(1), d, popsize, torch.float64)


def evotorch_snes(d: int, popsize: int, dtype: torch.dtype) -> Generations:
    return stepped("SNES", lambda x: (x[:, :FEW] ** 2).sum(1), d, popsize, dtype)


def stepped(
    name: str,
    loss: Callable[[torch.Tensor], torch.Tensor],
    d: int,
    popsize: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Generations:
    """EvoTorch's method of that name on `d` weights."""
    from evotorch import Problem, algorithms
    from evotorch.decorators import vectorized

    logging.disable(logging.INFO)
    problem = Problem(
        "min",
        vectorized(loss),
        solution_length=d,
        initial_bounds=(-1, 1),
        dtype=dtype,
        seed=1,
        device=device,
    )
    start = torch.ones(d, dtype=dtype, device=device)
    es = getattr(algorithms, name)(problem, stdev_init=0.5, popsize=popsize, center_init=start)

    def generations(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            es.step()
        return time.perf_counter() - begin

    return generations


Samples = dict[str, dict[int, list[float]]]
"""Of each task, by its number of threads."""


def in_turn() -> Iterator[int]:
    """The numbers of threads, set while the loop's body runs."""
    for threads in THREADS:
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            yield threads
    torch.set_num_threads(1)


def best_of_threads(name: str, found: dict[int, list[float]]) -> dict[str, float]:
    """What a task takes with the number of threads that is best for it; printed with the others."""
    by_threads = {threads: summary(samples) for threads, samples in found.items()}
    best = min(THREADS, key=lambda threads: by_threads[threads]["median"])
    others = ", ".join(f"{t}: {by_threads[t]['median']:.1f}" for t in THREADS if t != best)
    told = by_threads[best]
    spread = f"({told['min']:.1f} – {told['max']:.1f})"
    print(f"  {name:22s} {told['median']:12.1f} {spread:24s} threads {best} ({others})")
    return {"threads": best, **told}


FEW = 100  # weights that the loss of the large problems looks at: evaluating is part of EvoTorch's step


def many_weights(quick: bool) -> dict[str, Any]:
    """Milliseconds a generation for 1e5 and 1e6 weights."""
    rounds = 5 if quick else 9
    rows: dict[str, Any] = {}
    for d in (100_000, 1_000_000):
        popsize = 4 + int(3 * math.log(d))

        def few(x: np.ndarray) -> np.ndarray:
            return (x[:, :FEW] ** 2).sum(1)

        tasks = {
            "snes": told(SNES(sigma=0.5, popsize=popsize), d, few),
            "cmaes separable": told(CMAES(sigma=0.5, popsize=popsize, covariance="separable"), d, few),
            "cmaes limited": told(CMAES(sigma=0.5, popsize=popsize, covariance="limited"), d, few),
        }
        if importlib.util.find_spec("evotorch") is not None:
            tasks["evotorch snes float64"] = evotorch_snes(d, popsize, torch.float64)
            tasks["evotorch snes float32"] = evotorch_snes(d, popsize, torch.float32)
        seen: Samples = {name: {count: [] for count in THREADS} for name in tasks}
        for round_ in range(rounds + 1):
            for threads in in_turn():
                for name, task in tasks.items():
                    milli = task(2) / 2 * 1e3
                    if round_:
                        seen[name][threads].append(milli)
        print(f"\n{d} weights, popsize {popsize}; milliseconds per generation")
        row = {name: best_of_threads(name, found) for name, found in seen.items()}
        best = {name: seen[name][found["threads"]] for name, found in row.items()}
        times = {
            name: ratio(best["snes"], samples)
            for name, samples in best.items()
            if name.startswith("evotorch")
        }
        for name, found in times.items():
            print(
                f"  SNES {found['median']:.1f} × faster than {name} ({found['min']:.1f} – {found['max']:.1f})"
            )
        rows[str(d)] = {"popsize": popsize, "milliseconds": row, "snes_times_faster_than": times}
    return rows


def few_weights(quick: bool) -> dict[str, Any]:
    """Microseconds a generation of CMA-ES for 10 to 1000 weights."""
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
        seen: Samples = {name: {count: [] for count in THREADS} for name in tasks}
        for round_ in range(rounds + 1):
            for threads in in_turn():
                for name, task in tasks.items():
                    samples = seen[name][threads]
                    slow = len(samples) > 0 and min(samples) > 2e5
                    if slow and len(samples) >= 2:  # so long a generation: two samples tell enough
                        continue
                    count = 1 if slow or (name != "ours" and d == 1000 and round_ == 0) else per
                    micro = task(count) / count * 1e6
                    if round_ or d == 1000:  # the first round warms up
                        samples.append(micro)
        print(f"\n{d} weights, popsize {popsize}; microseconds per generation")
        row = {name: best_of_threads(name, found) for name, found in seen.items()}
        best = min((name for name in row if name != "ours"), key=lambda name: row[name]["median"])
        times = row[best]["median"] / row["ours"]["median"]
        print(f"  {times:.1f} × faster than {best}; goal {goal:g}")
        rows[f"{d}x{popsize}"] = {"microseconds": row, "best_peer": best, "times_faster": times, "goal": goal}
    return {"generation": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, nothing written")
    parser.add_argument("--only", choices=("generation", "many"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parts: dict[str, tuple[str, Callable[[bool], dict[str, Any]]]] = {
        "generation": ("cmaes_speed", few_weights),
        "many": ("many_weights_speed", many_weights),
    }
    for part, (name, measure) in parts.items():
        if asked.only in (None, part):
            rows = measure(asked.quick)
            if not asked.quick:
                found = [peer for peer in ("cmaes", "evotorch") if importlib.util.find_spec(peer) is not None]
                print(f"\nwritten: benchmarks/results/{record(name, rows, 'cma', *found).name}")


if __name__ == "__main__":
    main()
