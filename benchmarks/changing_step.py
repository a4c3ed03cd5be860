"""What a step on the CPU costs where something changes between steps: ours, and the best of torch's eager ones.

Run: python benchmarks/changing_step.py [--quick] [--write]

`optimizer_step.py` steps with options and gradients that stay. Here, in turn in one process, on one thread, float32:
"schedule": a new learning rate at every step; "tensor": a learning rate that is a tensor, written to at every step;
"in turn": every fourth weight is without a gradient, another one each time, as where layers or experts are left out.
What changes is part of the time of both sides.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _measure import interleaved, ratio, record, summary
from optimizer_step import SIZES, eager, make

import hybridopt.optim

NAMES = ("SGD", "Adam", "AdamW", "Adagrad", "NAdam")
KINDS = ("schedule", "tensor", "in turn")


def changing(kind: str, optimizer: Any, params: list[torch.nn.Parameter], per: int) -> Callable[[], None]:
    """`per` steps, before each of which something changes."""
    gradients, group, count = [p.grad for p in params], optimizer.param_groups[0], 0
    if kind == "tensor":
        group["lr"] = torch.tensor(1e-6)

    def run() -> None:
        nonlocal count
        for _ in range(per):
            count += 1
            if kind == "schedule":
                group["lr"] = 1e-6 / count
            elif kind == "tensor":
                group["lr"].mul_(0.9999)
            else:
                for i, p in enumerate(params):
                    p.grad = gradients[i] if (i + count) % 4 else None
            optimizer.step()

    return run


def compare(name: str, size: str, kind: str, quick: bool) -> dict[str, Any]:
    shapes = SIZES[size]
    per = 200 if len(shapes) == 4 else 50
    theirs, variants = getattr(torch.optim, name), eager(name)
    if kind == "tensor":  # torch refuses it
        del variants["foreach"]
    sides = {"ours": make(getattr(hybridopt.optim, name), shapes)}
    sides |= {key: make(theirs, shapes, **options) for key, options in variants.items()}
    for optimizer, _ in sides.values():
        optimizer.step()  # creates the states
    samples = interleaved(
        {key: changing(kind, *side, per) for key, side in sides.items()}, 5 if quick else 9, per
    )
    medians = {key: summary(s)["median"] for key, s in samples.items()}
    best = min((key for key in samples if key != "ours"), key=lambda key: medians[key])
    assert sides["ours"][0]._used == "fused (llvm)", sides["ours"][0]
    microseconds = {key: summary(s) for key, s in samples.items()}
    return {"microseconds": microseconds, "best": best, "ratio": ratio(samples["ours"], samples[best])}


def main() -> None:
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for size in list(SIZES)[:2]:
        for kind in KINDS:
            print(f"\n{size}, {kind}; microseconds a step")
            for name in NAMES:
                row = compare(name, size, kind, "--quick" in sys.argv)
                rows.setdefault(size, {}).setdefault(kind, {})[name] = row
                times = "  ".join(f"{k} {v['median']:.1f}" for k, v in row["microseconds"].items())
                r = row["ratio"]
                print(
                    f"{name:9s} {r['median']:6.2f}x ({r['min']:.2f}-{r['max']:.2f}) of {row['best']}; {times}"
                )
    if "--write" in sys.argv:
        path = record("changing_step_cpu", {"steps": rows}, "llvmlite")
        print(f"\nwritten: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
