"""Decision thresholds: a measure of classification that no gradient sees."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hybridopt.problems._digits import _data
from hybridopt.problems._problem import Problem


def thresholds(seed: int = 42) -> Problem:
    """Ten thresholds, one a digit: which scores of a linear model count as "this digit", judged by the F1 measure.

    A ridge regression on 1200 of the 1797 images gives every image ten scores around 0 (no) to 1 (yes). `x` holds the
    thresholds; the loss is 1 − F1, averaged over the ten digits, on the same images: piecewise constant, gradient zero.
    The digits do not interact, so the lowest loss is known exactly by trying all cuts between scores. `score` is
    the mean F1 on the other 597 images.

    Args:
        seed: of the split; the start is 0.5 everywhere.

    Raises:
        ProblemError: scikit-learn is not installed.

    Example:
        >>> from hybridopt.problems import thresholds
        >>> problem = thresholds(seed=0)
        >>> problem.best_known < problem.loss(problem.target).item() < 0.2
        True
    """
    images, labels = _data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    inputs = torch.cat([images.flatten(1), torch.ones(len(labels), 1)], 1).double()[order]
    truth = torch.nn.functional.one_hot(labels)[order].double()
    train, test = slice(1200), slice(1200, None)
    ridge = 10 * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(inputs[train].T @ inputs[train] + ridge, inputs[train].T @ truth[train])
    scores = inputs @ weights

    return Problem(
        name="thresholds",
        loss=partial(_one_minus_f1, scores=scores[train], truth=truth[train]),
        target=torch.full((10,), 0.5, dtype=torch.float64),
        bounds=(-0.5, 1.5),
        best_known=_best(scores[train], truth[train]),
        score=lambda x: 1 - _one_minus_f1(x.detach(), scores=scores[test], truth=truth[test]).item(),
        description="thresholds of ten one-digit classifiers, 1 - mean F1",
    )


def _one_minus_f1(x: Tensor, *, scores: Tensor, truth: Tensor) -> Tensor:
    """F1 = 2·hits / (said + true), per digit; x is (10,), scores and truth (images, 10)."""
    said = (scores > x).double()
    return 1 - (2 * (said * truth).sum(0) / (said.sum(0) + truth.sum(0))).mean()


def _best(scores: Tensor, truth: Tensor) -> float:
    """Over all cuts: with the k highest scores said, hits are the true ones among them."""
    order = scores.argsort(0, descending=True)
    hits = truth.gather(0, order).cumsum(0)
    said = torch.arange(1, len(scores) + 1, dtype=torch.float64)[:, None]
    return 1 - (2 * hits / (said + truth.sum(0))).amax(0).mean().item()
