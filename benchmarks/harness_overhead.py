"""What the harness costs per evaluation, on the 10-weight `identity` model, above calling the loss by hand.

Run: OMP_NUM_THREADS=1 python benchmarks/harness_overhead.py

Floor: writing 4 tensors and one forward without gradients (`by hand`); for a solver, the solver called directly
with that function (`scipy directly`, `pyswarm directly`); for Adam, the loop everybody writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyswarm
import torch
from _measure import interleaved, record, summary
from scipy.optimize import dual_annealing

import hybridopt
from hybridopt.optimizer import Kind, Request
from hybridopt.problems import get

EVALUATIONS = 2000


def main() -> None:
    torch.set_num_threads(1)
    problem = get("identity", 42)
    model, loss = problem.target, problem.loss
    vector = hybridopt.ParameterVector(model, bounds=(-1, 1))
    x0 = vector.read()
    points = np.clip(np.random.default_rng(0).normal(size=(EVALUATIONS, vector.n)) * 0.3, -1, 1)

    def value(x: np.ndarray) -> float:
        vector.write(x)
        with torch.no_grad():
            return loss(model).item()

    def by_hand() -> None:
        for x in points:
            value(x)

    def objective() -> None:
        vector.write(x0)
        with hybridopt.Objective(loss, vector) as o:
            for x in points:
                o.answer(Request(Kind.VALUE, x))

    class Enough(Exception):
        pass

    def limited(f: Callable[[Any], float]) -> Callable[[Any], float]:
        left = EVALUATIONS

        def g(x: Any) -> float:
            nonlocal left
            left -= 1
            if left < 0:
                raise Enough
            return f(x)

        return g

    def scipy_directly() -> None:
        try:
            dual_annealing(limited(value), [(-1, 1)] * vector.n, rng=np.random.default_rng(1), x0=x0)
        except Enough:
            pass

    def pyswarm_directly() -> None:  # one more generation would be 100 evaluations
        pyswarm.pso(
            value,
            [-1] * vector.n,
            [1] * vector.n,
            maxiter=EVALUATIONS // 100 - 1,
            seed=1,
            minfunc=0,
            minstep=0,
        )

    def adam_by_hand() -> None:
        vector.write(x0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        best = float("inf")
        for _ in range(EVALUATIONS):
            optimizer.zero_grad()
            out = loss(model)
            out.backward()
            best = min(best, out.item())
            optimizer.step()

    def ours(method: str) -> Callable[[], None]:
        def run() -> None:
            vector.write(x0)
            hybridopt.minimize(loss, vector, method, budget=EVALUATIONS, seed=1)

        return run

    swarm = f"pyswarm.pso(maxiter={EVALUATIONS // 100 - 1}, minfunc=0.0, minstep=0.0)"
    tasks: dict[str, Callable[[], None]] = {
        "by hand": by_hand,
        "objective": objective,
        "scipy directly": scipy_directly,
        "dual_annealing": ours("scipy.dual_annealing(gradients=none)"),
        "chain of dual_annealing": ours("scipy.dual_annealing(gradients=none, steps=1000000)"),
        "pyswarm directly": pyswarm_directly,
        "pso": ours(swarm),
        "adam by hand": adam_by_hand,
        "adam": ours("torch.adam(lr=0.01)"),
    }
    samples = interleaved(tasks, rounds=9, per=EVALUATIONS)
    rows = {name: summary(s) for name, s in samples.items()}
    for name, row in rows.items():
        print(f"{name:26s} {row['median']:8.1f} µs/evaluation   ({row['min']:.1f} – {row['max']:.1f})")
    pairs = {
        "objective": "by hand",
        "dual_annealing": "scipy directly",
        "chain of dual_annealing": "dual_annealing",
        "pso": "pyswarm directly",
        "adam": "adam by hand",
    }
    extra = {
        a: summary([x - y for x, y in zip(samples[a], samples[b], strict=True)]) for a, b in pairs.items()
    }
    print()
    for name, row in extra.items():
        print(
            f"{name:26s} {row['median']:+8.1f} µs over {pairs[name]}   ({row['min']:+.1f} – {row['max']:+.1f})"
        )
    path = record(
        "harness_overhead",
        {"microseconds": rows, "over": {a: {"of": pairs[a], **extra[a]} for a in pairs}},
        "scipy",
        "pyswarm",
        "greenlet",
    )
    print(f"\nwritten: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
