"""Thresholds of one-digit classifiers, against scikit-learn's measure and a search of every cut."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import f1_score

from hybridopt import problems


def parts(problem: problems.Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return problem.loss.keywords["scores"], problem.loss.keywords["truth"]


def test_loss_is_one_minus_the_mean_f1() -> None:
    problem = problems.get("thresholds", seed=1)
    scores, truth = parts(problem)
    assert scores.shape == (1200, 10)
    for x in (problem.target, torch.linspace(0.1, 0.9, 10, dtype=torch.float64)):
        told = f1_score(truth.numpy(), (scores > x).numpy(), average="macro")
        assert problem.loss(x).item() == pytest.approx(1 - told, abs=1e-12)


def test_the_best_is_reached_by_trying_every_cut_and_not_passed() -> None:
    problem = problems.get("thresholds", seed=2)
    scores, truth = parts(problem)
    x = problem.target.clone()
    for digit in range(10):  # they do not interact, so each is searched alone
        cuts = scores[:, digit] - 1e-9
        said, true = scores[:, digit] > cuts[:, None], truth[:, digit]
        x[digit] = cuts[(2 * (said * true).sum(1) / (said.sum(1) + true.sum())).argmax()]
    assert problem.loss(x).item() == pytest.approx(problem.best_known, abs=1e-12)
    assert problem.best_known < problem.loss(problem.target) - 0.01
    assert (x.abs() < 1.5).all()


def test_score_is_judged_on_other_images_and_split_by_seed() -> None:
    problem, other = problems.get("thresholds", 3), problems.get("thresholds", 4)
    assert problem.score(problem.target) != pytest.approx(1 - problem.loss(problem.target).item(), abs=1e-6)
    assert 0.8 < problem.score(problem.target) < 1
    assert problem.loss(problem.target) != other.loss(other.target)
    assert problem.loss(problem.target) == problems.get("thresholds", 3).loss(problem.target)
