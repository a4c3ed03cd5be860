"""Interleaved timing of alternatives in one process, and the record of machine and versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def interleaved(tasks: Mapping[str, Callable[[], Any]], rounds: int, per: int) -> dict[str, list[float]]:
    """Run all tasks once to warm up, then `rounds` times in turn; microseconds per unit of work (`per` a call)."""
    for task in tasks.values():
        task()
    seen: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            begin = time.perf_counter()
            task()
            seen[name].append((time.perf_counter() - begin) / per * 1e6)
    return seen


def summary(samples: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(samples), "median": statistics.median(samples), "max": max(samples)}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Round by round theirs / ours: minimum, median and maximum (above 1 = we are faster)."""
    return summary([b / a for a, b in zip(ours, theirs, strict=True)])


def machine(*libraries: str) -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    threads = {name: os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        **threads,
        **{name: version(name) for name in ("torch", "numpy", *libraries)},
    }


def record(name: str, content: Mapping[str, Any], *libraries: str) -> Path:
    """Write `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(*libraries), **content}, indent=1) + "\n")
    return path
