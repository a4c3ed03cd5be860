"""Which models and losses are batched, and that the answers are those one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybridopt.objective import Objective
from hybridopt.optimizer import Kind, Request
from tests.batch.drive import CASES, INPUTS, ROWS, ask, draws, linear, population, way


@pytest.mark.parametrize("name", CASES)
def test_a_population_is_answered_as_one_by_one(name: str) -> None:
    def answered(choice: Any) -> tuple[Any, ...]:
        torch.manual_seed(5)
        loss, target, reason, options = CASES[name]()
        with Objective(loss, target, seed=3, batch=choice, **options) as objective:
            vector = objective.vector
            before = [b.clone() for b in target.buffers()] if isinstance(target, nn.Module) else []
            x, y = (vector.encode(population(vector, seed=seed)) for seed in (0, 1))
            first, second = objective.answer(ask(x)), objective.answer(ask(y))
            after = objective.answer(Request(Kind.VALUE, x[0]))
            buffers = list(target.buffers()) if isinstance(target, nn.Module) else []
            assert all(torch.equal(a, b) for a, b in zip(before, buffers, strict=True)), "buffers stay"
            state = objective.randomness.state_dict()
            best = objective.ledger.best_point
            seen = (*first.losses, *second.losses, after.loss)
            return seen, objective, reason, state, None if best is None else best.x

    looped, plain, _, drawn, best = answered("loop")
    batched, objective, reason, drawn_in_batches, best_of_batches = answered("auto")
    eps = max(torch.finfo(t.dtype).eps for t in objective.vector.tensors)
    np.testing.assert_allclose(batched, looped, rtol=200 * eps)
    assert way(objective)[0] == ("loop" if reason else "vmap"), way(objective)
    assert reason in way(objective)[1]
    ledger = objective.ledger
    assert ledger.evaluations == plain.ledger.evaluations == 2 * ROWS + 1
    assert ledger.backward == ledger.recomputed == 0
    never = ("with torch.", "a loss of a NumPy array", "numbers of NumPy")
    assert ledger.forward == 2 * ROWS + 1 + 2 * (not any(text in reason for text in never))
    for key in ("now", "mark", "last"):
        torch.testing.assert_close(drawn_in_batches[key], drawn[key], rtol=0, atol=0)
    np.testing.assert_equal(best_of_batches, best)
    assert torch.backends.mha.get_fastpath_enabled(), "as found"


@pytest.mark.parametrize("kind", ["own generator", "own order"])
def test_losses_that_change_from_call_to_call_are_not_batched(kind: str) -> None:
    loss, model, reason, _ = draws(kind)
    with Objective(loss, model, batch="auto") as objective:
        objective.answer(ask(population(objective.vector)))
        assert way(objective)[0] == "loop"
        assert reason in way(objective)[1]


def keeping(kind: str) -> tuple[Callable[[nn.Module], Tensor], list[Tensor]]:
    """A loss that keeps tensors from call to call, and where it keeps them: the last place first."""
    kept: list[Tensor] = []

    def loss(model: nn.Module) -> Tensor:
        out = model(INPUTS)
        value: Tensor = (out**2).mean()
        if kind == "output":
            kept[:] = [out.detach()]
        elif kind == "transposed":
            kept[:] = [out.detach().T]
        elif kind == "history":
            kept.insert(0, value.detach())
        elif kind.startswith("running mean"):
            kept[:] = [0.9 * kept[0] + 0.1 * value.detach() if kept else value.detach()]
            if kind == "running mean, then an error":
                assert value.item() > 0
        elif kind == "of the data":
            kept[:] = [INPUTS.sum(0)]
        return value

    return loss, kept


@pytest.mark.parametrize(
    "kind", ["output", "transposed", "history", "running mean", "running mean, then an error", "of the data"]
)
def test_what_a_loss_keeps_is_never_a_tensor_of_a_batch(kind: str) -> None:
    """Dead, it would make the next call raise; or, taken into another batch, be one number for each member."""
    found = {}
    for choice in ("loop", "auto"):
        torch.manual_seed(5)
        loss, kept = keeping(kind)
        with Objective(loss, linear(), batch=choice) as objective:
            x = population(objective.vector)
            for rows in (x, x, x[:5]):
                objective.answer(ask(rows))
            found[choice] = [t + 0 for t in kept]
            if choice == "auto":
                reasons = {"running mean, then an error": ".item()", "of the data": ""}
                assert reasons.get(kind, "keeps tensors of its forward") in way(objective)[1]
                assert way(objective)[0] == ("vmap" if kind == "of the data" else "loop")
    assert found["auto"][0].shape == found["loop"][0].shape
    if kind == "history":
        assert len(found["auto"]) == len(found["loop"]) + 1, "the check's forward is one"
        del found["auto"][-3]
        torch.testing.assert_close(found["auto"], found["loop"])
    elif not kind.startswith("running mean"):  # one more call, the check, is in that
        torch.testing.assert_close(found["auto"], found["loop"])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["transformer", "transformer, eval", "clamps", "rnn cell", "weight norm"])
def test_operations_that_torch_loops_over_are_batched_on_request(name: str) -> None:
    found = []
    for choice in ("loop", "vmap", ROWS):
        torch.manual_seed(5)
        loss, model, _, _ = CASES[name]()
        with Objective(loss, model, batch=choice) as objective:
            losses = objective.answer(ask(population(objective.vector))).losses
            assert losses is not None
            found.append(losses.tolist())
            assert way(objective)[0] == ("loop" if choice == "loop" else "vmap")
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=2e-5)
