"""What is paid once: seconds of `import hybridopt`, and of a method's first compiled step.

Usage: `OMP_NUM_THREADS=1 python benchmarks/first_use.py [--rounds 7] [--methods SGD Adam] [--write]`; `--write` stores
the outcome in results/.

Every figure is of a process of its own, ours and torch's taking turns. Modules' bytecode is there, as pip leaves it.

- import: `import hybridopt` (which imports torch) ÷ `import torch`; goal 1.15.
- first use: the steps until the compiled one has run, after one of torch's optimizers has stepped (the first one of a
  process loads a part of torch): with an empty cache folder, and with what the process before left there. Goal 2 s,
  once a machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from _measure import record

METHODS = ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "RMSprop", "Rprop", "ASGD", "NAdam", "RAdam",
           "Lion", "Adan", "ADOPT", "AdEMAMix", "LAMB")  # fmt: skip
IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
STEPS = """
import time, torch, hybridopt
def steps(kind):
    p = torch.nn.Parameter(torch.ones(3))
    t = time.perf_counter()
    optimizer = kind([p])
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    return time.perf_counter() - t, optimizer
steps(torch.optim.Adagrad)
told, optimizer = steps(hybridopt.optim.{})
assert "llvm" in optimizer._used, optimizer._used
print(told)
"""


def seconds(code: str, **environment: str) -> float:
    """What a fresh process prints."""
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return float(told.stdout)


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    folder = tempfile.mkdtemp()
    bytecode = {"PYTHONPYCACHEPREFIX": f"{folder}/bytecode", "PYTHONDONTWRITEBYTECODE": ""}
    try:
        seconds(STEPS.format("SGD"), **bytecode, HYBRIDOPT_CACHE=f"{folder}/other")  # bytecode
        found: dict[str, Any] = {"import": imports(asked.rounds, bytecode), "first use": {}}
        for name in asked.methods:
            empty, filled = [], []
            for k in range(max(1, asked.rounds // 2)):
                cache = {"HYBRIDOPT_CACHE": f"{folder}/{name}{k}"}
                empty.append(seconds(STEPS.format(name), **bytecode, **cache))
                filled.append(seconds(STEPS.format(name), **bytecode, **cache))
            found["first use"][name] = {"empty cache": empty, "cached": filled}
            print(
                f"{name:9} first use {statistics.median(empty):.2f} s, cached {statistics.median(filled):.2f} s"
            )
    finally:
        shutil.rmtree(folder)
    if asked.write:
        record("first_use", found, "llvmlite")


def imports(rounds: int, bytecode: dict[str, str]) -> dict[str, Any]:
    """Ours, torch's, and their ratio."""
    times: dict[str, list[float]] = {"torch": [], "hybridopt": []}
    for name in times:
        seconds(IMPORT.format(name), **bytecode)
    for _ in range(rounds):
        for name, spent in times.items():
            spent.append(seconds(IMPORT.format(name), **bytecode))
    ratios = [ours / torchs for ours, torchs in zip(times["hybridopt"], times["torch"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"import {ratio:.2f} x torch's ({min(ratios):.2f} to {max(ratios):.2f})")
    return {**times, "ratio": ratio}


if __name__ == "__main__":
    main()
