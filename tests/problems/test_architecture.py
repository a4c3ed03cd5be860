"""Training on digits as a function of the configuration, against the same training written out."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from hybridopt import tune
from hybridopt.problems import ProblemError, train_digits
from hybridopt.space import Float, Space


def test_training_against_the_same_written_out() -> None:
    data = load_digits()
    torch.manual_seed(3)
    order = torch.randperm(1797)
    inputs = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(data.target)[order]
    model = nn.Sequential(nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.8, weight_decay=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[:1200]), labels[:1200]).backward()
        optimizer.step()
    expected = nn.functional.cross_entropy(model(inputs[1200:]), labels[1200:]).item()
    told = train_digits(
        {"depth": 2, "width": 7, "second_width": 9, "activation": "tanh", "lr": 0.2, "momentum": 0.8}
        | {"weight_decay": 1e-3},
        seed=3,
        steps=20,
    )
    assert told == pytest.approx(expected, rel=1e-5)


def test_second_width_matters_at_depth_two_only_and_width_from_one() -> None:
    told = {
        (depth, width, second): train_digits(
            {"depth": depth, "width": width, "second_width": second}, steps=5
        )
        for depth, width, second in [
            (0, 8, 8),
            (0, 9, 8),
            (1, 8, 8),
            (1, 8, 9),
            (1, 9, 8),
            (2, 8, 8),
            (2, 8, 9),
        ]
    }
    assert told[0, 8, 8] == told[0, 9, 8]
    assert told[1, 8, 8] == told[1, 8, 9] != told[1, 9, 8]
    assert told[2, 8, 8] != told[2, 8, 9]


def test_generators_are_left_as_found_and_a_good_configuration_learns() -> None:
    state = torch.get_rng_state()
    good, same = (train_digits({"lr": 0.3, "width": 64}) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert good == same < 0.3 < train_digits({"lr": 1e-3})
    assert good != train_digits({"lr": 0.3, "width": 64}, seed=1)


def test_diverging_is_no_error() -> None:
    told = train_digits({"lr": 1e6, "depth": 2})
    assert not told < math.log(10)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"widht": 3}, r"unknown keys \['widht'\]; known: depth, width"),
        ({"depth": 3}, "expected depth 0, 1 or 2"),
        ({"width": 0}, "expected depth 0, 1 or 2, widths from 1"),
        ({"activation": "step"}, "an activation of relu, tanh, gelu, sigmoid, got {'activation': 'step'}"),
    ],
)
def test_wrong_configurations(config: dict[str, object], what: str) -> None:
    with pytest.raises(ProblemError, match=what):
        train_digits(config)


def test_a_trial_is_told_on_the_way() -> None:
    """After every tenth step what a training of so many steps returns; early stopping then saves steps."""

    class Told:
        def __init__(self) -> None:
            self.reports: dict[int, float] = {}

        def report(self, step: int, loss: float) -> None:
            self.reports[step] = loss

    trial = Told()
    last = train_digits({}, trial, steps=30)
    assert list(trial.reports) == [10, 20, 30]
    assert trial.reports[30] == last == train_digits({}, steps=30)
    assert trial.reports[10] == train_digits({}, steps=10)

    space = Space({"lr": Float(1e-4, 1, log=True)})
    tuning = tune(train_digits, space, "cmaes", 16, seed=0, early="median")
    pruned = [record for record in tuning.trials if record.state == "pruned"]
    assert pruned
    assert all(max(record.reports) < 100 for record in pruned)
    assert tuning.best.state == "complete"
