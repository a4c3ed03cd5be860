"""What one step of a gradient optimizer costs on a GPU: ours (Triton), torch's fused and torch's foreach.

Run: python benchmarks/gpu_step.py [--peak 4.8] [--write]     (`--peak`: the device's bandwidth in TB/s, here an H200's)
     python benchmarks/gpu_step.py --interpreted              (no GPU: tiny sizes in Triton's interpreter, nothing timed
                                                               means anything; it only shows that the script works)

All sides are timed in turn in one process, from the first call to the end of the device's work, many steps at a time.
Gradients stay where they are. Extra memory is the peak during a step above what weights, gradients and states take.
Without a CUDA device nothing is measured, and the script says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

if "--interpreted" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from _measure import ratio, record, summary
from torch.nn import Parameter

import hybridopt.optim
from hybridopt.optim import _plan

STATES = {"AdamW": 2, "RMSprop": 1, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Adadelta": 2, "ASGD": 1, "Rprop": 2}
GOALS = {
    "RMSprop": 2.2,
    "NAdam": 2.6,
    "RAdam": 2.6,
    "Adamax": 1.8,
    "Adadelta": 3.3,
    "ASGD": 1.9,
    "Rprop": 4.0,
}


def make(cls: Any, device: str, tensors: int, size: int, dtype: torch.dtype, **options: Any) -> Any:
    """An optimizer whose states exist."""
    params = [Parameter(torch.ones(size, device=device, dtype=dtype)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    optimizer = cls(params, lr=1e-6, **options)
    for _ in range(3):
        optimizer.step()
    return optimizer


def graphed(optimizer: Any) -> Callable[[], None]:
    """The step recorded once, replayed at each call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay  # type: ignore[no-any-return]


def timed(tasks: dict[str, Callable[[], Any]], rounds: int, per: int, device: str) -> dict[str, list[float]]:
    """Microseconds a step of each, in turn."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    seen: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            wait()
            begin = time.perf_counter()
            for _ in range(per):
                task()
            wait()
            seen[name].append((time.perf_counter() - begin) / per * 1e6)
    return seen


def extra_memory(step: Callable[[], Any]) -> int:
    """Bytes at the peak of a step above those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def compare(
    name: str, tensors: int, size: int, dtype: torch.dtype, against: str, device: str, *, graph: bool = False
) -> dict[str, Any]:
    """One line of the table."""
    ours = make(getattr(hybridopt.optim, name), device, tensors, size, dtype)
    assert ours._used == "fused (triton)", ours
    option = {against: True} if device == "cuda" else {"foreach": True}
    theirs = make(getattr(torch.optim, name), device, tensors, size, dtype, **option)
    tasks: dict[str, Callable[[], Any]] = {"ours": ours.step, against: theirs.step}
    if graph and device == "cuda":
        tasks["ours, replayed"] = graphed(make(getattr(hybridopt.optim, name), device, tensors, size, dtype))
    large = tensors * size > 1 << 24
    samples = timed(tasks, 9, 1 if device == "cpu" else 10 if large else 50, device)
    moved = tensors * size * dtype.itemsize * (3 + 2 * STATES[name])
    row: dict[str, Any] = {
        "optimizer": name,
        "tensors": tensors,
        "elements each": size,
        "dtype": str(dtype),
        "microseconds": {key: summary(s) for key, s in samples.items()},
        "against": against,
        "ratio": ratio(samples["ours"], samples[against]),
        "terabytes per second": moved / summary(samples["ours"])["median"] / 1e6,
    }
    if device == "cuda":
        row["extra bytes"] = {"ours": extra_memory(ours.step), against: extra_memory(theirs.step)}
    return row


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", type=float, default=4.8)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--interpreted", action="store_true")
    chosen = parser.parse_args()
    device = "cpu" if chosen.interpreted else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("not measured: there is no CUDA device")
        return
    if chosen.interpreted:
        _plan.ENGINES["cpu"] = "triton"
    tiny, single, half = chosen.interpreted, torch.float32, torch.bfloat16
    million = 2000 if tiny else 1_000_000
    lines: list[tuple[str, int, int, torch.dtype, str]] = [
        ("AdamW", 1, 128 * million, single, "fused"),
        ("AdamW", 1, 128 * million, half, "fused"),
        *((name, 10, 10 * million, single, "foreach") for name in GOALS),
        *(("AdamW", 1, size * million, single, "fused") for size in (1, 5, 20)),
        ("AdamW", 3 if tiny else 1000, 1024, single, "fused"),
        ("AdamW", 5 if tiny else 10_000, 64, single, "fused"),
    ]
    if tiny:
        lines = [(n, t, min(s, 3000), d, a) for n, t, s, d, a in lines]
    rows = []
    for line in lines:
        row = compare(*line, device, graph=line[1] >= 1000)
        rows.append(row)
        share = row["terabytes per second"] / chosen.peak
        times = "  ".join(f"{k} {v['median']:.1f}" for k, v in row["microseconds"].items())
        goal = f" (goal {GOALS[line[0]]})" if line[0] in GOALS else ""
        r = row["ratio"]
        print(
            f"{line[0]:9s} {line[1]:6d} x {line[2]:<10d} {str(line[3])[6:]:9s} {r['median']:6.2f}x{goal} "
            f"({r['min']:.2f}-{r['max']:.2f}) of torch {row['against']}; {share:.0%} of the peak; {times} us"
        )
    if chosen.write and device == "cuda":
        name = torch.cuda.get_device_name().lower().replace(" ", "_")
        content = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "rows": rows}
        print(f"written: benchmarks/results/{record(f'gpu_step_{name}', content, 'triton').name}")


if __name__ == "__main__":
    main()
