"""A changed loss is noticed where a run goes on from a saved state."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hybridopt
from hybridopt.code import code_digest

SCALE = 1.0


def near(x: Any, place: float = 1.0) -> Any:
    return ((x - place) ** 2).sum()


class Bowl:
    def __call__(self, x: Any) -> Any:
        return (x**2).sum()

    def method(self, x: Any) -> Any:
        return {1, 2} and (x**4).sum()


def made(place: float) -> Callable[[Any], Any]:
    """Another text of the same instructions, and data that the digest does not see."""

    def loss(x: Any) -> Any:
        # a comment
        return ((x - place) ** 2).sum()

    return loss


def test_what_the_digest_covers() -> None:
    same = [made(1.0), made(2.0)]
    assert code_digest(same[0]) == code_digest(same[1])
    others = [
        near,
        lambda x: (x**2).sum(),
        lambda x: (x**3).sum(),
        lambda x: (x**2).mean(),
        lambda x: (lambda y: y**2)(x).sum(),
        lambda x: (lambda y: y**3)(x).sum(),
        Bowl(),
        Bowl().method,
    ]
    digests = {code_digest(loss) for loss in (*same, *others)}
    assert len(digests) == 1 + len(others)
    assert code_digest(functools.partial(near, place=3.0)) == code_digest(near)
    assert code_digest(torch.sum) is None


def test_a_checkpoint_of_another_loss_warns(tmp_path: Path) -> None:
    def run(loss: Callable[[Any], Any], budget: int) -> hybridopt.Result:
        x = torch.zeros(3, dtype=torch.float64)
        return hybridopt.minimize(loss, x, "cmaes", budget=budget, seed=0, checkpoint=tmp_path / "run.pt")

    run(lambda x: ((x - 1) ** 2).sum(), 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(lambda x: ((x - 1) ** 2).sum(), 100)
    with pytest.warns(RuntimeWarning, match="its code has changed since the state was saved") as caught:
        run(lambda x: ((x + 7) ** 2).sum(), 150)
    assert [warning.filename for warning in caught] == [__file__]
