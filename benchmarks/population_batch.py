"""What a population of 100 costs: every member by hand, through the objective one by one, and in one forward.

Run: OMP_NUM_THREADS=1 python benchmarks/population_batch.py [--rounds 15]

`by hand` is the loop everybody writes: put each weight tensor into the model, forward without gradients, `.item()`.
`vmap alone` is a bare `torch.func.vmap` over `functional_call`, as a floor for one forward without any harness.
Beside `batch` (the default, as many rows a forward as the allowance takes) other sizes show what the choice costs;
`compiled` is `batch="compiled"`, after its compilation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from _measure import interleaved, ratio, record, summary
from torch import Tensor, nn

import hybridopt
from hybridopt.optimizer import Kind, Request
from hybridopt.problems import get

MEMBERS = 100
TURN = 0.05  # seconds
Problem = tuple[Callable[[nn.Module], Tensor], nn.Module, Any]


def identity() -> Problem:
    problem = get("identity", 42)
    return problem.loss, problem.target, None


def digits_layer() -> Problem:
    """The 330 weights of the named layer of a network, misclassified images."""
    problem = get("digits_mlp", 42)
    return problem.loss, problem.target, problem.select


def digits_convolution() -> Problem:
    """All 674 weights of a small convolutional network, cross entropy of 256 images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images[:256, None], dtype=torch.float32) / 16
    labels = torch.tensor(data.target[:256])
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)
    )  # fmt: skip
    return (lambda m: nn.functional.cross_entropy(m(images), labels)), model, None


def tasks(problem: Problem, sizes: tuple[int, ...]) -> tuple[dict[str, Callable[[], Any]], Any]:
    loss, model, select = problem
    vector = hybridopt.ParameterVector(model, select)
    population = vector.read() + 0.1 * np.random.default_rng(0).normal(size=(MEMBERS, vector.n))
    request = Request(Kind.POPULATION, population)

    def by_hand() -> list[float]:
        losses = []
        with torch.no_grad():
            for x in torch.from_numpy(population):
                for tensor, part in zip(vector.tensors, torch.split(x, list(vector.sizes)), strict=True):
                    tensor.copy_(part.view_as(tensor))
                losses.append(loss(model).item())
        return losses

    pure = torch.func.vmap(
        lambda weights: torch.func.functional_call(Wrapped(model, loss), weights, ()), randomness="same"
    )

    def vmap_alone() -> list[float]:
        parts = torch.split(torch.tensor(population), list(vector.sizes), dim=1)
        weights = {
            f"model.{name}": part.to(t.dtype).view(MEMBERS, *t.shape)
            for name, part, t in zip(vector.names, parts, vector.tensors, strict=True)
        }
        with torch.no_grad():
            return pure(weights).tolist()

    def ours(batch: Any) -> Callable[[], Any]:
        objective = hybridopt.Objective(loss, vector, batch=batch)

        def answered() -> Any:
            return objective.answer(request).losses

        answered.objective = objective  # type: ignore[attr-defined]
        return answered

    found: dict[str, Callable[[], Any]] = {
        "by hand": by_hand,
        "vmap alone": vmap_alone,
        "objective, loop": ours("loop"),
        "objective, batch": ours("auto"),
        "objective, compiled": ours("compiled"),
        **{f"objective, {size} rows a forward": ours(size) for size in sizes},
    }
    expected = by_hand()
    for name, task in found.items():
        off = np.abs(np.array(task()) / expected - 1).max()
        assert off < 1e-2, (name, off)  # a count of misclassified images may change by one
    return found, found["objective, batch"].objective  # type: ignore[attr-defined]


class Wrapped(nn.Module):
    """`loss(model)` as a forward."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = [loss]

    def forward(self) -> Tensor:
        return self.loss[0](self.model)


def in_turn(todo: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Microseconds per member, with turns of one length: in a run generations follow each other, caches are warm."""
    turns, times = {}, {}
    for name, task in todo.items():
        for _ in range(3):  # what is compiled is compiled now
            begin = time.perf_counter()
            task()
            spent = time.perf_counter() - begin
        times[name] = max(1, round(TURN / spent))
        turns[name] = partial(repeated, task, times[name])
    seen = interleaved(turns, rounds, MEMBERS)
    return {name: [spent / times[name] for spent in samples] for name, samples in seen.items()}


def repeated(task: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        task()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    for name, problem, sizes in (
        ("identity", identity(), ()),
        ("digits, one layer", digits_layer(), (10, 30)),
        ("digits, convolution", digits_convolution(), (4, 10, 30)),
    ):
        todo, objective = tasks(problem, sizes)
        samples = in_turn(todo, rounds)
        print(f"\n{name}: {objective!r}")
        rows = {}
        for task, seen in samples.items():
            row, faster = summary(seen), ratio(seen, samples["by hand"])
            rows[task] = {"microseconds per member": row, "times faster than by hand": faster}
            print(
                f"  {task:32s} {row['median']:9.2f} µs/member ({row['min']:.2f} – {row['max']:.2f})   "
                f"{faster['median']:6.1f} × ({faster['min']:.1f} – {faster['max']:.1f})"
            )
        results[name] = {"n": objective.vector.n, "way": repr(objective._generations.batch), **rows}
    path = record("population_batch", {"members": MEMBERS, "problems": results}, "scikit-learn")
    print(f"\nwritten: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
