"""Losses that draw random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybridopt.objective import Objective
from hybridopt.optimizer import Kind
from tests.objective.drive import at

# -- noise ----------------------------------------------------------------------------------------------------------


def dropout(x: Tensor) -> Tensor:
    return (nn.functional.dropout(x, 0.5) * torch.arange(1, 65).sqrt()).sum()


ONES = np.ones(64)


def noise_path(noise: Any, seed: int, between: bool = False) -> list[float]:
    """A step, the next step, a generation, its probes, a step."""
    with Objective(dropout, torch.ones(64), seed=seed, noise=noise) as objective:
        found = []
        for request in (
            at(Kind.VALUE, ONES),
            at(Kind.VALUE, ONES),
            at(Kind.POPULATION, [ONES] * 3),
            at(Kind.POPULATION, [ONES] * 2, probe=True),
            at(Kind.VALUE, ONES, probe=True),
            at(Kind.VALUE_AND_GRADIENT),
        ):
            if between:
                torch.rand(3), np.random.rand(3), random.random()
            answer = objective.answer(request)
            found += [answer.loss] if answer.losses is None else answer.losses.tolist()
        assert objective.stochastic == (noise != "fixed")
        assert objective.keeps_best == (noise == "fixed")
        assert (objective.ledger.best_point is not None) == objective.keeps_best
    return found


def test_noise_is_shared_within_a_step_independent_or_fixed() -> None:
    a, b, c, d, e, f, g, h, i = noise_path("shared", 1)
    assert c == d == e == f == g == h, "a generation and the probes after it"
    assert len({a, b, c, i}) == 4, "each step its own"
    assert len(set(noise_path("independent", 1))) == 9
    assert len(set(noise_path("fixed", 1))) == 1


@pytest.mark.parametrize("noise", ["shared", "independent", "fixed"])
def test_same_seed_same_noise(noise: Any) -> None:
    assert noise_path(noise, 1) == noise_path(noise, 1, between=True)
    assert noise_path(noise, 1) != noise_path(noise, 2)


@pytest.mark.parametrize("keep", ["auto", "best", "last"])
def test_which_point_counts_as_the_best(keep: Any) -> None:
    for loss, seen in ((dropout, True), (lambda x: x.sum(), False)):
        with Objective(loss, torch.ones(64), keep=keep) as objective:
            objective.answer(at(Kind.VALUE, ONES))
            assert objective.stochastic == seen
            assert objective.keeps_best == (keep == "best" or (keep == "auto" and not seen))
            assert (objective.ledger.best_point is not None) == objective.keeps_best


def test_a_surrogate_sees_the_noise_of_its_loss() -> None:
    seen: list[float] = []

    def draws(x: Tensor) -> Tensor:
        seen.append(torch.rand(()).item())
        return x.sum()

    with Objective(draws, torch.ones(2), surrogate=draws) as objective:
        for _ in range(2):
            objective.answer(at(Kind.VALUE_AND_GRADIENT))
            objective.answer(at(Kind.VALUE, [1, 1], keep_graph=True))
            objective.answer(at(Kind.GRADIENT, [1, 1]))
    a, b, c, d, e, f, g, h = seen
    assert a == b
    assert c == d
    assert e == f
    assert g == h
    assert len({a, c, e, g}) == 4
