"""What one step of a gradient optimizer costs on the CPU: ours, and torch's best, for three model sizes.

Run: python benchmarks/optimizer_step.py [--quick] [--write]

Everything is measured in turn in one process, in float32, with gradients that stay where they are ("kept") and with
gradients that are new tensors at every step ("fresh": what `zero_grad()` and a backward pass leave). torch's best is
the fastest median of its for-loop, foreach, fused (where it has it) and `torch.compile`d step (that one for the
smallest model only: its compilation takes minutes for the others). Both sides keep their own wrappers: profiler range,
hooks. Options and the set of gradients stay; `changing_step.py` is for where they do not. A side takes so many steps in
a row (200, 100 and 1) that for the small sizes the first one counts little, which after the others' turn finds its
memory out of the caches (SGD of 104k weights, one thread: 20 in a row give 3.4 to 5.6, 100 in a row 4.5 to 6.0).

"floor" is what a step of ours must do whatever the rule, each part called alone, the least of many times: to ask if
lists and dicts are as they were, to ask where tensors and gradients are, and the compiled loop itself, which also
raises the version counters that autograd looks at. What is left of the whole step is Python around them (looking for
hooks, profiler, GradScaler and torch.compile; calls). The loop of 104k weights is bound by one division and one root an
element (Adam), or by reading and writing the cache (SGD), so that it alone decides what ratio can be had there.
"""

from __future__ import annotations

import json
import sys
import time
import timeit
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import interleaved, ratio, record, summary
from torch.nn import Parameter

import hybridopt.optim

NAMES = (
    "SGD",
    "Adam",
    "AdamW",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "RMSprop",
    "Rprop",
    "ASGD",
    "NAdam",
    "RAdam",
)
SIZES: dict[str, list[tuple[int, ...]]] = {
    "4 tensors, 12 weights": [(2, 3), (3,), (1, 2), (1,)],
    "50 tensors, 104k weights": [(64, 64), (64,)] * 25,
    "62 tensors, 11.2M weights": [(600, 600), (600,)] * 31,
}
# bytes a step must move per weight: gradient and weight read, weight written, each state read and written
STATES = {"SGD": 0, "Adam": 2, "AdamW": 2, "Adagrad": 1, "RMSprop": 1, "ASGD": 1}
GOALS = {"4 tensors, 12 weights": 10.0, "50 tensors, 104k weights": 5.0, "62 tensors, 11.2M weights": 1.0}
ROOT = Path(__file__).parents[1]


def make(cls: Any, shapes: list[tuple[int, ...]], **options: Any) -> tuple[Any, list[Parameter]]:
    torch.manual_seed(0)
    params = [Parameter(torch.randn(s)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return cls(params, lr=1e-6, **options), params


def eager(name: str) -> dict[str, dict[str, Any]]:
    """torch's ways of a step, and the options that choose them."""
    variants: dict[str, dict[str, Any]] = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}}
    if name in ("SGD", "Adam", "AdamW", "Adagrad"):
        variants["fused"] = {"fused": True}
    return variants


def kept(optimizer: Any, per: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(per):
            optimizer.step()

    return run


def compiled(optimizer: Any, per: int) -> Callable[[], None]:
    step = torch.compile(lambda: optimizer.step())

    def run() -> None:
        for _ in range(per):
            step()

    return run


def fresh(optimizer: Any, params: list[Parameter], per: int) -> Callable[[], None]:
    """Two sets of gradients take turns as new tensor objects; handing them over is not timed."""
    sets = [[p.grad.clone() for p in params if p.grad is not None] for _ in range(2)]

    def run() -> None:
        spent = 0.0
        for k in range(per):
            for p, g in zip(params, sets[k % 2], strict=True):
                p.grad = g.view_as(g)
            begin = time.perf_counter()
            optimizer.step()
            spent += time.perf_counter() - begin
        run.spent = spent  # type: ignore[attr-defined]

    return run


def fresh_samples(tasks: dict[str, Callable[[], None]], rounds: int, per: int) -> dict[str, list[float]]:
    seen: dict[str, list[float]] = {name: [] for name in tasks}
    for k in range(rounds + 1):
        for name, task in tasks.items():
            task()
            if k:  # the first round warms up
                seen[name].append(task.spent / per * 1e6)  # type: ignore[attr-defined]
    return seen


def compare(name: str, size: str, with_compile: bool, quick: bool) -> dict[str, Any]:
    shapes = SIZES[size]
    per = {4: 200, 50: 100, 62: 1}[len(shapes)]
    rounds = 5 if quick else 9
    cls, theirs = getattr(hybridopt.optim, name), getattr(torch.optim, name)
    ours, params = make(cls, shapes)
    ours.step()
    variants = eager(name)
    others = {key: make(theirs, shapes, **options) for key, options in variants.items()}
    tasks = {"ours": kept(ours, per), **{key: kept(o, per) for key, (o, _) in others.items()}}
    if with_compile:
        tasks["compiled"] = compiled(make(theirs, shapes)[0], per)
    samples = interleaved(tasks, rounds, per)
    medians = {key: summary(s)["median"] for key, s in samples.items()}
    best = min((key for key in samples if key != "ours"), key=lambda key: medians[key])
    assert ours._used == "fused (llvm)", ours
    row: dict[str, Any] = {
        "microseconds": {key: summary(s) for key, s in samples.items()},
        "best": best,
        "ratio": ratio(samples["ours"], samples[best]),
    }
    best_eager = min(others, key=lambda key: medians[key])
    again = fresh_samples(
        {"ours": fresh(ours, params, per), best_eager: fresh(*others[best_eager], per)},
        max(3, rounds // 2),
        per,
    )
    row["fresh gradients"] = {
        "microseconds": {key: summary(s) for key, s in again.items()},
        "best eager": best_eager,
        "ratio": ratio(again["ours"], again[best_eager]),
    }
    weights = sum(p.numel() for p in params)
    moved = weights * 4 * (3 + 2 * STATES.get(name, 2))
    row["gigabytes per second"] = moved / medians["ours"] / 1e3
    if "fused" in others:
        row["torch fused gigabytes per second"] = moved / medians["fused"] / 1e3
    return row


def least(task: Callable[[], Any], per: int) -> float:
    """Microseconds of a call, the least of 100 loops."""
    return min(timeit.repeat(task, number=per, repeat=100)) / per * 1e6


def floor(name: str, size: str) -> dict[str, float]:
    """What the parts of a step take, in microseconds."""
    per = 200 if len(SIZES[size]) == 4 else 20
    optimizer, _ = make(getattr(hybridopt.optim, name), SIZES[size])
    for _ in range(3):
        optimizer.step()
    (plan,) = optimizer._plans
    return {
        "step": least(optimizer.step, per),
        "lists and dicts": least(optimizer._versions.same, per),
        "tensors and gradients": least(plan.refresh, per),
        "loop and version counters": least(lambda: plan.step(plan.block_address), per),
    }


def main() -> None:
    quick = "--quick" in sys.argv
    warnings.filterwarnings("ignore", module="torch")
    rows: dict[str, Any] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for size in SIZES:
            print(f"\n{size}, {threads} thread(s), microseconds a step")
            for name in NAMES:
                with_compile = threads == 1 and len(SIZES[size]) == 4
                row = compare(name, size, with_compile, quick)
                rows.setdefault(f"{threads} threads", {}).setdefault(size, {})[name] = row
                times = "  ".join(f"{k} {v['median']:.1f}" for k, v in row["microseconds"].items())
                r, f = row["ratio"], row["fresh gradients"]["ratio"]
                print(
                    f"{name:9s} {r['median']:6.2f}x ({r['min']:.2f}-{r['max']:.2f}) of {row['best']}; fresh "
                    f"{f['median']:.2f}x of {row['fresh gradients']['best eager']}; {times}; "
                    f"{row['gigabytes per second']:.1f} GB/s"
                )
                torch._dynamo.reset()
    torch.set_num_threads(1)
    print("\nfloor, microseconds, one thread")
    floors: dict[str, Any] = {}
    for size in list(SIZES)[:2]:
        for name in ("SGD", "Adam"):
            floors.setdefault(size, {})[name] = parts = floor(name, size)
            print(f"{size}, {name}: {', '.join(f'{key} {value:.2f}' for key, value in parts.items())}")
    content = {
        "goals": GOALS,
        "steps": rows,
        "floor": floors,
    }
    if "--write" in sys.argv:
        path = record("optimizer_step_cpu", json.loads(json.dumps(content)), "llvmlite")
        print(f"\nwritten: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
