"""What 256 Adam runs on `identity` cost: one after another, and as one batched program.

Run: OMP_NUM_THREADS=1 python benchmarks/multistart.py [--rounds 5] [--steps 50] [--profile]

All do the same evaluations from the same starts, and nobody is dropped. `by hand` is the loop everybody writes around
`hybridopt.optim.Adam`; `minimize, one by one` the same through the harness. `bare floor` is what a step cannot do
without: one vmapped forward and backward of all starts and one fused step over their matrix, with no bounds, books,
best points or saving.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _measure import interleaved, ratio, record, summary

import hybridopt
from hybridopt.compose import MultiStart
from hybridopt.problems import get

STARTS = 256
LR = 0.05


def tasks(steps: int) -> dict[str, Callable[[], list[float]]]:
    """Each returns the best loss of every start (of the floor: of the last step)."""
    problem = get("identity", 42)
    given = MultiStart(hybridopt.method("adam", lr=LR), starts=STARTS, begin_at="normal", sigma=0.1, keep=1)
    points = given._points(hybridopt.ParameterVector(problem.target), 0, None)

    def fresh(row: int) -> torch.nn.Module:
        model = get("identity", 42).target
        torch.nn.utils.vector_to_parameters(torch.tensor(points[row]), model.parameters())
        return model

    models = [fresh(i) for i in range(STARTS)]

    def again() -> None:
        for model, point in zip(models, points, strict=True):
            torch.nn.utils.vector_to_parameters(torch.tensor(point), model.parameters())

    def by_hand() -> list[float]:
        again()
        best = []
        for model in models:
            optimizer = hybridopt.optim.Adam(model.parameters(), lr=LR)
            lowest = np.inf
            for _ in range(steps):
                optimizer.zero_grad()
                loss = problem.loss(model)
                loss.backward()
                optimizer.step()
                lowest = min(lowest, loss.item())
            best.append(lowest)
        return best

    def one_by_one() -> list[float]:
        again()
        return [
            hybridopt.minimize(problem.loss, model, given.method, budget=steps, seed=0).best_loss
            for model in models
        ]

    def together() -> list[float]:
        model = models[0]
        torch.nn.utils.vector_to_parameters(torch.tensor(points[0]), model.parameters())
        run = hybridopt.Run(problem.loss, model, given, budget=STARTS * steps, seed=0)
        with run:
            for _ in run:
                pass
        losses: list[float] = run.optimizer._many.losses.tolist()  # type: ignore[attr-defined]
        return losses

    pure = hybridopt.Objective(problem.loss, models[0]).functional()
    batched = torch.func.vmap(torch.func.grad_and_value(pure))

    def floor() -> list[float]:
        x = torch.tensor(points)
        optimizer = hybridopt.optim.Adam([x], lr=LR)
        for _ in range(steps):
            x.grad, losses = batched(x)
            optimizer.step()
        return losses.tolist()  # type: ignore[no-any-return]

    return {
        "by hand": by_hand,
        "minimize, one by one": one_by_one,
        "multistart": together,
        "bare floor": floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--profile", action="store_true", help="where multistart's time goes, instead of the table"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    todo = tasks(options.steps)
    if options.profile:
        todo["multistart"]()
        with cProfile.Profile() as profile:
            todo["multistart"]()
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)
        return
    expected = np.array(todo["minimize, one by one"]())
    for name in ("by hand", "multistart"):
        np.testing.assert_allclose(todo[name](), expected, rtol=1e-9, err_msg=name)
    samples = interleaved(todo, options.rounds, STARTS * options.steps)
    rows: dict[str, Any] = {}
    for name, seen in samples.items():
        row = summary(seen)
        rows[name] = {
            "microseconds per evaluation": row,
            "times faster than minimize, one by one": ratio(seen, samples["minimize, one by one"]),
            "times faster than by hand": ratio(seen, samples["by hand"]),
            "times the floor": ratio(samples["bare floor"], seen),
        }
        print(
            f"{name:24s} {row['median']:9.2f} µs/evaluation ({row['min']:.2f} – {row['max']:.2f})   "
            + "   ".join(f"{value['median']:.1f} {what}" for what, value in list(rows[name].items())[1:])
        )
    path = record("multistart", {"starts": STARTS, "steps": options.steps, "ways": rows})
    print(f"written: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
