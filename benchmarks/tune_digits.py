"""Does `tune` find better hyperparameters than Optuna in as many trials?

Usage: `OMP_NUM_THREADS=1 python benchmarks/tune_digits.py [--seeds 10] [--trials 60] [--quick] [--write]`; `--quick` is
2 seeds of 20 trials, `--write` stores the outcome in results/. Needs the extras `problems` and `optuna`.

A trial trains a network of one hidden layer on 1000 of scikit-learn's digits (8 × 8), 6 epochs of SGD with momentum in
batches of 50, and its loss is the mean cross entropy, in nats, of 400 others. Tuned are learning rate, weight decay,
momentum and width. A seed stands for one division of the images, one initialisation and one order of batches, the same
for every trial and every search, so a trial's loss is a function of its hyperparameters. The remaining 397 images
say what the choice is worth: the errors of the network with the lowest loss.

Each of ours is compared with the better of Optuna's two (by the mean over the seeds): mean difference of the lowest
loss of the same seed, and its 95 % interval from 10 000 bootstraps over the seeds; below 0 = ours is better.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import torch
from _measure import record
from sklearn.datasets import load_digits
from torch import nn

from hybridopt import tune
from hybridopt.space import Float, Int, Space
from hybridopt_optuna import suggest

SPACE = Space(
    {
        "lr": Float(1e-4, 1, log=True),
        "weight_decay": Float(1e-6, 1e-1, log=True),
        "momentum": Float(0, 0.99),
        "width": Int(4, 128, log=True),
    }
)
Search = Callable[[Callable[[dict[str, Any]], float], int, int], None]


def ours(*method: str) -> Search:
    return lambda train, trials, seed: void(tune(train, SPACE, *method, budget=trials, seed=seed))


def theirs(sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Search:
    def search(train: Callable[[dict[str, Any]], float], trials: int, seed: int) -> None:
        study = optuna.create_study(sampler=sampler(seed))
        study.optimize(lambda trial: train(suggest(trial, SPACE)), trials)

    return search


def void(_: object) -> None:
    """For its side effect: the training keeps its own record."""


OURS = {"default": ours(), "auto": ours("auto"), "cmaes": ours("cmaes")}
THEIRS = {
    "Optuna TPE": theirs(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "Optuna CMA-ES": theirs(lambda seed: optuna.samplers.CmaEsSampler(seed=seed)),
}


class Training:
    """The trials of one search on one seed, and what became of them."""

    def __init__(self, seed: int) -> None:
        data = load_digits()
        order = np.random.default_rng(seed).permutation(len(data.target))
        self.images = torch.tensor(data.data[order] / 16, dtype=torch.float32)
        self.labels = torch.tensor(data.target[order], dtype=torch.int64)
        self.seed = seed
        self.losses: list[float] = []
        self.errors: list[int] = []

    def __call__(self, config: dict[str, Any]) -> float:
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = nn.Sequential(nn.Linear(64, config["width"]), nn.ReLU(), nn.Linear(config["width"], 10))
        options = {name: config[name] for name in ("lr", "momentum", "weight_decay")}
        optimizer = torch.optim.SGD(model.parameters(), **options)
        with torch.enable_grad():
            for _ in range(6):
                for batch in torch.randperm(1000, generator=generator).split(50):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(self.images[batch]), self.labels[batch]).backward()
                    optimizer.step()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(self.images[1000:1400]), self.labels[1000:1400]).item()
            wrong = model(self.images[1400:]).argmax(1) != self.labels[1400:]
        # a network that has diverged is as bad as one that guesses wrongly with certainty, for every search alike
        self.losses.append(loss if loss < 100 else 100.0)
        self.errors.append(int(wrong.sum()))
        return self.losses[-1]


def interval(differences: list[float]) -> list[float]:
    """Mean and the ends of its 95 % bootstrap interval."""
    values = np.array(differences)
    draws = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return [float(values.mean()), float(low), float(high)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Hyperparameter search against Optuna.")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0")
    parser.add_argument("--trials", type=int, default=60, help="of each search")
    parser.add_argument("--quick", action="store_true", help="2 seeds of 20 trials")
    parser.add_argument("--write", action="store_true", help="store the outcome in results/")
    arguments = parser.parse_args()
    seeds, trials = (2, 20) if arguments.quick else (arguments.seeds, arguments.trials)
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    searches = {**OURS, **THEIRS}
    lowest: dict[str, list[float]] = {name: [] for name in searches}
    errors: dict[str, list[int]] = {name: [] for name in searches}
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for seed in range(seeds):
        for name, search in searches.items():
            training = Training(seed)
            begun = time.perf_counter()
            search(training, trials, seed)
            seconds[name].append(time.perf_counter() - begun)
            if len(training.losses) < trials:
                print(f"{name}, seed {seed}: ended by itself after {len(training.losses)} trials")
            best = int(np.argmin(training.losses))
            lowest[name].append(training.losses[best])
            errors[name].append(training.errors[best])
    print(f"{trials} trials, {seeds} seeds")
    print(f"{'':<16}{'lowest loss: median (min to max)':>36}{'errors of 397':>16}{'seconds':>10}")
    for name in searches:
        low = lowest[name]
        spread = f"{statistics.median(low):.4f} ({min(low):.4f} to {max(low):.4f})"
        print(
            f"{name:<16}{spread:>36}{statistics.median(errors[name]):>16g}{statistics.median(seconds[name]):>10.1f}"
        )
    peer = min(THEIRS, key=lambda name: statistics.fmean(lowest[name]))
    against = {}
    for name in OURS:
        mean, low, high = against[name] = interval(
            [a - b for a, b in zip(lowest[name], lowest[peer], strict=True)]
        )
        print(f"{name} - {peer}: {mean:+.4f}, 95 % from {low:+.4f} to {high:+.4f}")
    if arguments.write:
        found = {"lowest": lowest, "errors": errors, "seconds": seconds, "peer": peer, "difference": against}
        file = record(
            "tune_digits", {"seeds": seeds, "trials": trials, **found}, "optuna", "cmaes", "scikit-learn"
        )
        print(f"wrote results/{file.name}")


if __name__ == "__main__":
    main()
