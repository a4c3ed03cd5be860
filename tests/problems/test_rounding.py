"""Rounding scales and pruning masks of a trained network, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import problems
from hybridopt.compare import _objective
from hybridopt.problems._rounding import _trained


def numpy_logits(layers: list[tuple[np.ndarray, np.ndarray]], inputs: np.ndarray) -> np.ndarray:
    for weight, bias in layers[:-1]:
        inputs = np.maximum(inputs @ weight.T + bias, 0)
    return inputs @ layers[-1][0].T + layers[-1][1]


def entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    logits = logits - logits.max(1, keepdims=True)
    return float((np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]).mean())


def as_numpy(network: object) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[np.ndarray]]:
    layers = [(w.double().numpy(), b.double().numpy()) for w, b in network.layers]
    return layers, [t.numpy() for t in (*network.train, *network.test)]


@pytest.mark.parametrize("bits", [2, 3])
def test_rounding_against_numpy(bits: int) -> None:
    layers, (images, labels, unseen, truth) = as_numpy(_trained(0, (64, 128, 128, 10)))
    problem = problems.get(f"quantisation(bits={bits})", seed=0)
    top = {2: 1, 3: 3}[bits]

    def at(x: list[float]) -> list[tuple[np.ndarray, np.ndarray]]:
        scales = [abs(w).max() / top * 2**log for (w, _), log in zip(layers, x, strict=True)]
        return [
            (np.clip(np.round(w / s), -top, top) * s, b) for (w, b), s in zip(layers, scales, strict=True)
        ]

    def accuracy(weights: list[tuple[np.ndarray, np.ndarray]]) -> float:
        return float((numpy_logits(weights, unseen).argmax(1) == truth).mean())

    for x in ([0.0, 0.0, 0.0], [-1.3, -0.7, -2.1]):
        told = problem.loss(torch.tensor(x)).item()
        assert told == pytest.approx(entropy(numpy_logits(at(x), images), labels), rel=1e-4)
        recovered = (accuracy(at(x)) - accuracy(at([0, 0, 0]))) / (accuracy(layers) - accuracy(at([0, 0, 0])))
        assert problem.score(torch.tensor(x)) == pytest.approx(recovered, abs=1e-6)
    assert len(images) == 1200
    assert len(unseen) == 597
    assert accuracy(layers) > 0.95


def test_a_search_on_training_images_recovers_test_accuracy() -> None:
    recovered = []
    for seed in range(2):
        problem = problems.get("quantisation(bits=2)", seed)
        hybridopt.minimize(
            problem.loss, problem.target, "random_search", budget=60, seed=seed, bounds=problem.bounds
        )
        recovered.append(problem.score(problem.target))
    assert 0.8 < min(recovered) <= max(recovered) < 1.02


def test_pruning_against_numpy() -> None:
    layers, (images, labels, unseen, truth) = as_numpy(_trained(3, (64, 32, 10)))
    problem = problems.get("pruning", seed=3)
    for x in (np.ones(32), np.zeros(32), np.arange(32) % 3 / 2):
        keep = x > 0.5
        few = [(layers[0][0][keep], layers[0][1][keep]), (layers[1][0][:, keep], layers[1][1])]
        told = problem.loss(torch.tensor(x, dtype=torch.float32)).item()
        assert told == pytest.approx(entropy(numpy_logits(few, images), labels) + keep.sum() / 64, rel=1e-4)
        right = (numpy_logits(few, unseen).argmax(1) == truth).mean()
        assert problem.score(torch.tensor(x, dtype=torch.float32)) == pytest.approx(right)
    assert problem.target.tolist() == [1] * 32


def test_pruning_is_over_whole_numbers() -> None:
    """Methods see a mask of zeros and ones, and a comparison tells them so."""
    problem = problems.get("pruning", seed=3)
    start = problem.loss(problem.target).item()
    seen: list[torch.Tensor] = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return problem.loss(x)

    result = hybridopt.minimize(
        loss,
        problem.target,
        "cmaes",
        budget=200,
        seed=0,
        bounds=problem.bounds,
        integer=problem.integer,
        batch="loop",
    )
    assert all(((x == 0) | (x == 1)).all() for x in seen)
    assert result.best_loss < start - 0.05
    assert _objective(problem, hybridopt.method("cmaes"), 0).vector.integer.all()


@pytest.mark.parametrize("name", ["quantisation(bits=2)", "pruning"])
def test_batches_seeds_and_generators(name: str) -> None:
    state = torch.get_rng_state()
    _trained.cache_clear()
    first = problems.get(name, 5)
    _trained.cache_clear()
    again, other = problems.get(name, 5), problems.get(name, 6)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.rand(4, len(first.target), generator=torch.Generator().manual_seed(0))
    told = torch.stack([first.loss(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(first.loss)(x), told, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.stack([again.loss(row) for row in x]), told)
    assert not torch.equal(torch.stack([other.loss(row) for row in x]), told)


def test_four_bits_are_refused() -> None:
    with pytest.raises(problems.ProblemError, match="expected bits to be 2 or 3, got 4"):
        problems.get("quantisation(bits=4)")
