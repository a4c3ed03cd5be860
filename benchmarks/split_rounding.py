"""A network with a rounding gate: does a split learn both halves, and does neither half alone reach the loss?

Usage: `python benchmarks/split_rounding.py [--seeds 15] [--write]`; `--write` stores the outcome in results/.

The network adds up a linear function of 4 inputs and a jump of the first of them, where a gate
`round(sigmoid(x - threshold))` opens: 6 weights that gradients reach (the features), and a threshold by which the
gradient is exactly 0. It learns from 200 points a function of its own kind with other weights and threshold; the loss
is the mean squared error and 0 can be reached. Every run has the same budget in forward-equivalents (a step of Adam
costs 3, a point without gradient 1), the same bounds of the threshold (the inputs' range, outside which the gate does
nothing) and, per seed, the same start and data. With 7 weights in all, CMA-ES on all of them is a fair rival too.
"""

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import argparse
import statistics
import time
from typing import Any

import torch
from _measure import record

import hybridopt
from hybridopt.problems._gate import THRESHOLD, rounding_gate

BUDGET = "2000fe"
TARGET = 0.1
ADAM = "adam(lr=0.1)"
RUNS: dict[str, tuple[str, str | None]] = {  # method, which weights
    "split": (f'split("threshold": openai_es, "features.*": {ADAM})', None),
    "split with cmaes": (f'split("threshold": cmaes, "features.*": {ADAM})', None),
    "features alone": (ADAM, None),  # the threshold's gradient is 0
    "threshold alone": ("openai_es", "threshold"),
    "cmaes, all weights": ("cmaes", None),
}


def run(method: str, select: str | None, seed: int) -> dict[str, Any]:
    problem = rounding_gate(seed)
    begun = time.perf_counter()
    heard: list[tuple[float, float]] = []

    def watch(run: hybridopt.Run, step: object) -> None:
        heard.append((run.objective.ledger.forward_equivalents, run.objective.ledger.best_loss))

    def wrong() -> float:
        return abs(problem.target.threshold.item() - THRESHOLD)

    before = wrong()
    result = hybridopt.minimize(
        problem.loss,
        problem.target,
        method,
        budget=BUDGET,
        seed=seed,
        select=select,
        callbacks=watch,
        bounds=problem.bounds,
    )
    reached = next((spent for spent, loss in heard if loss <= TARGET), None)
    return {
        "seed": seed,
        "best_loss": result.best_loss,
        "equivalents_to_target": reached,
        "threshold_error": [before, wrong()],
        "spent": result.forward_equivalents,
        "reason": result.reason.value,
        "seconds": time.perf_counter() - begun,
    }


def _mean(runs: list[dict[str, Any]], when: int) -> float:
    """The threshold's mean error at the start (0) or at the end (1)."""
    return statistics.fmean(r["threshold_error"][when] for r in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description="A rounding gate: split against its halves.")
    parser.add_argument("--seeds", type=int, default=15, help="how many, from 0")
    parser.add_argument("--write", action="store_true", help="store the outcome in results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'':<26}{'reached':>9}{'loss: median':>14}{'lowest':>9}{'highest':>9}{'fe to target':>14}  threshold error"
    )
    found = {}
    for label, (method, select) in RUNS.items():
        runs = [run(method, select, seed) for seed in range(arguments.seeds)]
        losses = sorted(r["best_loss"] for r in runs)
        spent = sorted(r["equivalents_to_target"] for r in runs if r["equivalents_to_target"])
        median = f"{spent[len(spent) // 2]:.0f}" if len(spent) > len(runs) / 2 else "-"
        print(
            f"{label:<26}{len(spent):>5}/{len(runs):<3}{statistics.median(losses):>14.4f}{losses[0]:>9.4f}"
            f"{losses[-1]:>9.4f}{median:>14}  {_mean(runs, 0):.2f} > {_mean(runs, 1):.2f}"
        )
        found[label] = {"method": method, "select": select, "reached": len(spent), "runs": runs}
    if arguments.write:
        file = record("split_rounding", {"budget": BUDGET, "target": TARGET, "runs": found})
        print(f"wrote results/{file.name}")


if __name__ == "__main__":
    main()
