"""What AdEMAMix, LAMB, SparseAdam and L-BFGS cost on the CPU beside torch, loss and gradient not counted.

Run: python benchmarks/more_optim.py [--quick]

Interleaved in one process, one thread. SparseAdam and L-BFGS: against torch's own (L-BFGS equals it bit for bit).
torch has neither AdEMAMix nor LAMB: their compiled step against the same rule over lists of tensors (`foreach`), and
against torch's foreach AdamW for scale. L-BFGS: microseconds an iteration, the closure's own time subtracted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _measure import interleaved, ratio, record, summary
from torch import Tensor
from torch.nn import Parameter

from hybridopt.optim.ademamix import AdEMAMix
from hybridopt.optim.lamb import LAMB
from hybridopt.optim.lbfgs import LBFGS
from hybridopt.optim.sparse_adam import SparseAdam

SIZES: dict[str, list[tuple[int, ...]]] = {
    "4 tensors, 12 weights": [(2, 3), (3,), (1, 2), (1,)],
    "50 tensors, 104k weights": [(64, 64), (64,)] * 25,
    "62 tensors, 11.2M weights": [(600, 600), (600,)] * 31,
}
TABLES = {
    "1k x 16, 64 rows": (1000, 16, 64),
    "100k x 64, 4096 rows": (100_000, 64, 4096),
}  # rows drawn with repeats
PROBLEMS = {f"n={n}, history {m}": (n, m) for n in (10, 1000, 100_000) for m in (10, 100)}


def repeated(step: Callable[[], Any], per: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(per):
            step()

    return run


def dense(cls: Any, shapes: list[tuple[int, ...]], **options: Any) -> Any:
    torch.manual_seed(0)
    params = [Parameter(torch.randn(s)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return cls(params, lr=1e-6, **options)


def sparse(cls: Any, rows: int, columns: int, count: int) -> Any:
    torch.manual_seed(0)
    p = Parameter(torch.randn(rows, columns))
    at, values = torch.randint(0, rows, (1, count)), torch.randn(count, columns)
    p.grad = torch.sparse_coo_tensor(at, values, p.shape, check_invariants=True)
    return cls([p], lr=1e-6)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def lbfgs_overhead(cls: Any, n: int, history: int) -> float:
    """Microseconds an iteration that are not the closure's, over one run of 100 iterations at most."""
    x = torch.full((n,), -1.2, dtype=torch.float64)
    x[::2] = 1.0
    x.requires_grad_()
    options = {"line_search_fn": "strong_wolfe", "tolerance_change": 0, "tolerance_grad": 0}
    optimizer = cls([x], max_iter=100, max_eval=10_000, history_size=history, **options)
    inside = 0.0

    def closure() -> Tensor:
        nonlocal inside
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = rosenbrock(x)
        loss.backward()  # type: ignore[no-untyped-call]
        inside += time.perf_counter() - begin
        return loss

    begin = time.perf_counter()
    optimizer.step(closure)
    spent = time.perf_counter() - begin - inside
    iterations: int = optimizer.state[x]["n_iter"]
    return spent / iterations * 1e6


def show(title: str, samples: dict[str, list[float]]) -> dict[str, Any]:
    times = "  ".join(f"{name} {summary(s)['median']:.1f}" for name, s in samples.items())
    ratios = {name: ratio(samples["ours"], s) for name, s in samples.items() if name != "ours"}
    said = "  ".join(f"{r['median']:.2f}x ({r['min']:.2f}-{r['max']:.2f}) of {k}" for k, r in ratios.items())
    print(f"{title:44s} {said};  us: {times}")
    return {"microseconds": {name: summary(s) for name, s in samples.items()}, "ratio": ratios}


def main() -> None:
    quick = "--quick" in sys.argv
    rounds = 5 if quick else 15
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for size, shapes in SIZES.items():
        per = {4: 200, 50: 20, 62: 1}[len(shapes)]
        for cls in (AdEMAMix, LAMB):
            steps = {
                "ours": dense(cls, shapes).step,
                "foreach": dense(cls, shapes, implementation="foreach").step,
                "torch AdamW": dense(torch.optim.AdamW, shapes, foreach=True).step,
            }
            samples = interleaved({k: repeated(s, per) for k, s in steps.items()}, rounds, per)
            rows[f"{cls.__name__}, {size}"] = show(f"{cls.__name__}, {size}", samples)
    for name, table in TABLES.items():
        per = 50 if table[0] == 1000 else 3
        steps = {
            "ours": sparse(SparseAdam, *table).step,
            "torch": sparse(torch.optim.SparseAdam, *table).step,
        }
        samples = interleaved({k: repeated(s, per) for k, s in steps.items()}, rounds, per)
        rows[f"SparseAdam, {name}"] = show(f"SparseAdam, {name}", samples)
    for name, (n, history) in PROBLEMS.items():
        if quick and n > 1000:
            continue
        samples = {"ours": [], "torch": []}
        for k in range(rounds + 1):
            for key, cls in (("ours", LBFGS), ("torch", torch.optim.LBFGS)):
                spent = lbfgs_overhead(cls, n, history)
                if k:  # the first round warms up
                    samples[key].append(spent)
        rows[f"LBFGS, {name}"] = show(f"LBFGS, {name}", samples)
    if not quick:
        path = record("more_optim_cpu", {"rows": rows}, "llvmlite")
        print(f"written: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
