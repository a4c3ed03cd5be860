"""Whole generations of SNES and PGPE for a model on a GPU: drawn there, drawn on the CPU, and EvoTorch's SNES there.

Run: python benchmarks/population_device.py [--write]
     python benchmarks/population_device.py --on-cpu      (no GPU: torch's operations on the CPU instead; it only shows
                                                           that the script works)

A generation is drawn, its losses are computed in batches of vmap, and it is learnt from. The loss reads every weight
once (a mean of squares). All sides have float32 models and take turns in one process. "drawn on the CPU" is the same
method made blind to the device; its losses are the same numbers. EvoTorch (where it is installed) draws in float32.
Without a CUDA device nothing is measured, and the script says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from _measure import interleaved, ratio, record, summary
from cmaes_speed import stepped
from torch import Tensor

import hybridopt
from hybridopt import start
from hybridopt.population import PGPE, SNES


def loss(w: Tensor) -> Tensor:
    return ((w - 1) ** 2).mean()


def ours(method: Any, n: int, device: str, drawn: str | None, per: int) -> Callable[[], None]:
    """Steps of a run, drawn on a device, or by the CPU where `drawn` is None."""
    weights = torch.zeros(n, device=device)
    with mock.patch.object(start, "_home", return_value=drawn):
        run = hybridopt.Run(loss, weights, method, budget=10**9, seed=0)

    def steps() -> None:
        for _ in range(per):
            run.step()

    steps()  # the first finds out how to batch
    return steps


def evotorch(n: int, device: str, popsize: int, per: int) -> Callable[[], None]:
    generations = stepped(
        "SNES", lambda x: ((x - 1) ** 2).mean(1), n, popsize, dtype=torch.float32, device=device
    )

    def steps() -> None:
        generations(per)
        if device != "cpu":
            torch.cuda.synchronize()

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--on-cpu", action="store_true")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    if not torch.cuda.is_available() and not asked.on_cpu:
        print("not measured: there is no CUDA device here")
        return
    device = "cpu" if asked.on_cpu else "cuda:0"
    rounds, per = (2, 1) if asked.on_cpu else (9, 5)
    rows: dict[str, Any] = {}
    for n in (100_000, 1_000_000):
        popsize = 2 * (2 + int(1.5 * math.log(n)))
        tasks: dict[str, Callable[[], None]] = {}
        for name, method in (("SNES", SNES(popsize=popsize)), ("PGPE", PGPE(popsize=popsize))):
            tasks[name] = ours(method, n, device, device, per)
            tasks[f"{name}, drawn on the CPU"] = ours(method, n, device, None, per)
        if importlib.util.find_spec("evotorch") is not None:
            tasks["EvoTorch SNES"] = evotorch(n, device, popsize, per)
        seen = interleaved(tasks, rounds, per)
        print(f"\n{n} weights, popsize {popsize}; milliseconds a generation")
        for name, samples in seen.items():
            milli = summary([sample / 1e3 for sample in samples])
            print(f"  {name:26s} {milli['median']:9.2f} ({milli['min']:.2f} - {milli['max']:.2f})")
            rows.setdefault(str(n), {})[name] = milli
        for name in ("SNES", "PGPE"):
            for other in (f"{name}, drawn on the CPU", "EvoTorch SNES"):
                if other in seen:
                    found = ratio(seen[name], seen[other])
                    rows[str(n)][f"{other} / {name}"] = found
                    print(
                        f"  {other} ÷ {name}: {found['median']:.2f} ({found['min']:.2f} - {found['max']:.2f})"
                    )
    if asked.write and not asked.on_cpu:
        content = {"gpu": torch.cuda.get_device_name(0), "generations": rows}
        print(f"\nwritten: benchmarks/results/{record('population_device', content).name}")


if __name__ == "__main__":
    main()
