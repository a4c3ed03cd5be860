"""What one step of Muon and Adafactor costs on the CPU: ours, and torch's for-loop and foreach (where it has it).

Run: python benchmarks/matrix_optimizers.py [--quick]

Everything is measured in turn in one process, in float32, with gradients that stay where they are. torch's best is the
fastest median. Muon takes the matrices of each model only. torch's bfloat16 products make Muon's reference so slow on
processors without bfloat16 units (seconds a step) that it is stepped once a round there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from _measure import interleaved, ratio, record, summary
from torch.nn import Parameter

from hybridopt.optim.adafactor import Adafactor
from hybridopt.optim.muon import Muon

SIZES: dict[str, list[tuple[int, ...]]] = {
    "4 tensors, 12 weights": [(2, 3), (3,), (1, 2), (1,)],
    "50 tensors, 104k weights": [(64, 64), (64,)] * 25,
    "20 matrices 256 x 256": [(256, 256)] * 20,
    "10 convolutions 64 x 32 x 3 x 3": [(64, 32, 3, 3)] * 10,
    "one matrix 2000 x 2000": [(2000, 2000)],
}
PER = {"Adafactor": (100, 10, 5, 5, 3), "Muon": (100, 2, 1, 1, 1)}  # steps a sample, by size
SLOW = 8_000_000_000  # multiplications a step beyond which torch's Muon is not timed


def stepper(
    cls: Any, shapes: list[tuple[int, ...]], per: int, **options: Any
) -> tuple[Any, Callable[[], None]]:
    torch.manual_seed(0)
    params = [Parameter(torch.randn(s)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = cls(params, lr=1e-6, **options)

    def run() -> None:
        for _ in range(per):
            optimizer.step()

    return optimizer, run


def compare(name: str, size: str, per: int, rounds: int) -> dict[str, Any]:
    shapes = [s for s in SIZES[size] if name == "Adafactor" or len(s) == 2]
    ours, theirs = {"Muon": Muon, "Adafactor": Adafactor}[name], getattr(torch.optim, name)
    optimizer, run = stepper(ours, shapes, per)
    tasks = {"ours": run}
    variants: dict[str, dict[str, Any]] = {"for-loop": {}}
    if name == "Adafactor":
        variants = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}}
    for key, options in variants.items():
        tasks[key] = stepper(theirs, shapes, per, **options)[1]
    samples = interleaved(tasks, rounds, per)
    medians = {key: summary(s)["median"] for key, s in samples.items()}
    best = min(variants, key=lambda key: medians[key])
    return {
        "microseconds": {key: summary(s) for key, s in samples.items()},
        "ran": optimizer._used,
        "best": best,
        "ratio": ratio(samples["ours"], samples[best]),
    }


def work(size: str) -> int:
    """Multiplications of Muon's five iterations."""
    return sum(15 * s[0] * s[1] * min(s) for s in SIZES[size] if len(s) == 2)


def main() -> None:
    quick = "--quick" in sys.argv
    rows: dict[str, Any] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, pers in PER.items():
            for size, per in zip(SIZES, pers, strict=True):
                if name == "Muon" and not 0 < work(size) < SLOW:
                    continue
                row = compare(name, size, per, 3 if quick else 9)
                rows.setdefault(f"{threads} threads", {}).setdefault(size, {})[name] = row
                times = "  ".join(f"{k} {v['median']:.0f}" for k, v in row["microseconds"].items())
                r = row["ratio"]
                print(
                    f"{threads} thread(s) {name:9s} {size:32s} {r['median']:6.2f}x ({r['min']:.2f}-{r['max']:.2f}) of "
                    f"{row['best']}; {times} µs; {row['ran']}",
                    flush=True,
                )
    path = record("matrix_optimizers_cpu", {"steps": rows})
    print(f"\nwritten: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
