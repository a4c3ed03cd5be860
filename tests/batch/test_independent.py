"""noise="independent" in batches: every member draws torch's numbers of its own."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hybridopt
from hybridopt.objective import Objective
from tests.batch.drive import INPUTS, ask, linear, way

N = 3


def masked(x: Tensor) -> Tensor:
    """Linear in x: its gradient is the numbers that were drawn."""
    return (x * torch.rand(N, dtype=torch.float64)).sum()


def objective(loss: Any = masked, target: Any = None, **options: Any) -> Objective:
    x = torch.ones(N, dtype=torch.float64) if target is None else target
    return Objective(loss, x, seed=3, noise="independent", **options)


@pytest.mark.parametrize("choice", ["auto", 7, pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:`torch.jit")  # of torch's compiler
def test_equal_members_have_losses_of_their_own_and_of_the_right_distribution(choice: Any) -> None:
    with objective(batch=choice) as one:
        x = np.ones((400, N))
        first, second = (np.array(one.answer(ask(x)).losses) for _ in range(2))
        assert way(one)[0] == "vmap"
        assert len(set(first) | set(second)) == 800
        both = np.concatenate([first, second])
        assert abs(both.mean() - N / 2) < 4 * (N / 12 / 800) ** 0.5  # of a sum of uniform numbers
        assert abs(both.var() - N / 12) < 0.05
        assert one.ledger.forward == 800 + (4 if choice == "compiled" else 2)


def test_a_members_gradient_is_that_of_its_own_draw() -> None:
    with objective(batch="vmap") as one:
        x = np.arange(1.0, 31.0).reshape(10, N)
        losses, gradients = one.values_and_gradients(x)
        assert one._generations.gradient_batch.way == "vmap"
        np.testing.assert_allclose((x * gradients).sum(axis=1), losses, rtol=1e-12)
        assert len(np.unique(gradients)) == gradients.size
        assert ((gradients >= 0) & (gradients < 1)).all()


def test_a_loss_that_seeds_the_generator_draws_the_same_for_every_member() -> None:
    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return masked(x)

    with objective(loss) as one:
        losses = one.answer(ask(np.ones((6, N)))).losses
        assert losses is not None
        assert len(set(losses)) == 1
        assert "the loss seeds the generator" in way(one)[1]
        state = one.state_dict()
    with objective(loss) as other:
        other.load_state_dict(state)
        assert other.randomness.reseeds


def test_dropout_and_minibatches() -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.5))

    def loss(m: nn.Module) -> Tensor:
        return m(INPUTS[torch.randint(6, (3,))]).pow(2).mean()  # type: ignore[no-any-return]

    with objective(loss, model) as one:
        x = np.tile(one.vector.read(), (60, 1))
        losses = one.answer(ask(x)).losses
        assert way(one)[0] == "vmap"
        assert losses is not None
        assert len(set(losses.tolist())) > 50
        state = one.state_dict()
        expected = one.answer(ask(x)).losses
    with objective(loss, model) as again:
        again.load_state_dict(state)
        np.testing.assert_array_equal(again.answer(ask(x)).losses, expected)


def test_the_check_compares_the_member_whose_numbers_are_known() -> None:
    """A loss that tells something else in a batch is found out, as under common numbers."""

    def loss(x: Tensor) -> Tensor:
        batched = torch.func.debug_unwrap(x) is not x
        return masked(x) + (1.0 if batched else 0.0)

    with objective(loss) as one:
        one.answer(ask(np.ones((6, N))))
        found, reason = way(one)
        assert found == "loop"
        assert "one alone is" in reason


@pytest.mark.parametrize("draw", [np.random.rand, random.random])
def test_numbers_of_numpy_and_python_keep_the_loop(draw: Any) -> None:
    def loss(x: Tensor) -> Tensor:
        return masked(x) * draw()

    with objective(loss) as one:
        losses = one.answer(ask(np.ones((6, N)))).losses
        assert losses is not None
        assert len(set(losses.tolist())) == 6
        assert way(one)[0] == "loop"
        assert 'noise="independent", but numbers of NumPy and Python are drawn once' in way(one)[1]


def test_numbers_of_numpy_that_are_drawn_later_are_noticed() -> None:
    later: list[int] = []

    def loss(x: Tensor) -> Tensor:
        return masked(x) * (np.random.rand() if later else 1.0)

    with objective(loss) as one:
        one.answer(ask(np.ones((6, N))))
        assert way(one)[0] == "vmap"
        later.append(1)
        losses = one.answer(ask(np.ones((6, N)))).losses
        assert losses is not None
        assert len(set(losses.tolist())) == 6
        assert "drawn once for all members" in way(one)[1]


def test_after_a_batch_that_a_limit_cut_nobody_draws_the_same_again() -> None:
    def loss(x: Tensor) -> Tensor:
        return (x * 0).sum() + torch.rand((), dtype=torch.float64)

    x = torch.zeros(N, dtype=torch.float64)
    text = "pso(swarmsize=10, evaluations=25) > cmaes(popsize=8)"
    tracker = hybridopt.Tracker()
    hybridopt.minimize(loss, x, text, budget=90, seed=3, bounds=(-1, 1), noise="independent", tracker=tracker)
    losses = tracker.runs[0].column("loss")
    assert len(set(losses)) == len(losses) == 90
