"""Nothing of the caller's is changed, and exceptions come out as they are."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybridopt.objective import Objective
from hybridopt.optimizer import Kind
from tests.objective.drive import FORMS, Meter, X, at

# -- nothing of the caller's is changed -----------------------------------------------------------------------------


class Zoo(nn.Module):
    """Dropout, batch statistics, a frozen layer, a submodule in another mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 1)
        self.train()
        self.last.eval()
        self.first.bias.requires_grad_(False)
        self.batch = torch.randn(8, 3)

    def forward(self) -> Tensor:
        return self.last(self.drop(self.norm(self.first(self.batch))).relu()).pow(2).mean()


def zoo_loss(model: Zoo) -> Tensor:
    random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(3)
    return model()


def caller() -> tuple[Any, ...]:
    """Everything of the global generators, in a form that compares."""
    _, words, position, has_gauss, cached = np.random.get_state()
    return torch.get_rng_state().tolist(), words.tolist(), position, has_gauss, cached, random.getstate()


QUESTIONS_OF_ALL_KINDS = [
    lambda x: at(Kind.VALUE, x, keep_graph=True),
    lambda x: at(Kind.GRADIENT, x),
    lambda x: at(Kind.VALUE_AND_GRADIENT, x),
    lambda x: at(Kind.POPULATION, [x, x]),
    lambda x: at(Kind.VALUE_AND_GRADIENT),
    lambda x: at(Kind.VALUE_AND_GRADIENT, commit=True),
]


@pytest.mark.parametrize("form", ["loss(model)", "closure", "closure with backward"])
@pytest.mark.parametrize("select", [None, "last.*", "first.bias"])
def test_nothing_of_the_callers_is_changed(form: str, select: str | None) -> None:
    model = Zoo()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    grads = [p.grad for p in model.parameters()]
    flags, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    norm = {k: v.clone() for k, v in model.norm.state_dict().items() if "running" in k or "num" in k}
    weights = {k: p.detach().clone() for k, p in model.named_parameters()}
    np.random.randn(), random.gauss(0, 1)  # each holds a cached number now
    before = caller()
    grad_mode = torch.is_grad_enabled()

    def closure() -> Tensor:
        loss = zoo_loss(model)
        if form == "closure with backward":
            loss.backward()
        return loss

    objective = Objective(zoo_loss if form == "loss(model)" else closure, model, select=select)
    x = objective.vector.read()
    moved = False
    for question in QUESTIONS_OF_ALL_KINDS:
        request = question(x + 0.25)
        objective.answer(request)
        assert torch.is_grad_enabled() == grad_mode
        moved = moved or request.commit
        for key, value in norm.items():
            assert torch.equal(model.norm.state_dict()[key], value) != moved
        assert torch.get_rng_state().tolist() == before[0]
    objective.close()

    assert caller() == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True)), "the same objects"
    assert all((g == 7).all() for g in grads if g is not None), "and untouched"
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]) == (name not in objective.vector.names)


def test_rejected_candidates_do_not_move_batch_statistics() -> None:
    model = Zoo()
    alone = Zoo()
    alone.load_state_dict(model.state_dict())
    alone.batch = model.batch
    with Objective(zoo_loss, model, noise="fixed") as objective:
        x = objective.vector.read()
        for _ in range(20):
            objective.answer(at(Kind.POPULATION, [x * 100]))
        objective.vector.write(x)
        objective.answer(at(Kind.VALUE_AND_GRADIENT, commit=True))
    alone.norm(alone.first(alone.batch))
    torch.testing.assert_close(model.norm.running_mean, alone.norm.running_mean)
    assert model.norm.num_batches_tracked == 1


def test_two_objectives_over_one_model_end_in_any_order() -> None:
    for order in ((0, 1), (1, 0)):
        model = nn.Linear(2, 1)
        model.weight.grad = mark = torch.ones(1, 2)
        model.bias.requires_grad_(False)
        before = caller()
        two = [Objective(lambda m: m.weight.sum() + m.bias.sum(), model, "9", select="*") for _ in range(2)]
        for objective in two:
            objective.answer(at(Kind.VALUE_AND_GRADIENT))
        for i in order:
            two[i].close()
        assert model.weight.grad is mark
        assert not model.bias.requires_grad
        assert caller() == before


# -- exceptions in the loss -----------------------------------------------------------------------------------------


class Once:
    """A loss that draws, moves a buffer, and raises in its k-th call after all that."""

    def __init__(self, fails: int | None, error: BaseException, backward: bool) -> None:
        self.fails, self.error, self.backward, self.calls = fails, error, backward, 0

    def __call__(self, model: nn.Module) -> Tensor:
        self.calls += 1
        assert isinstance(model.count, Tensor)
        model.count += 1
        loss = (
            ((model.weight - 1) ** 2).sum() + torch.rand(()) + float(np.random.randn()) + random.gauss(0, 1)
        )
        if self.calls == self.fails:
            if self.backward:
                loss.register_hook(self._raise)
            else:
                self._raise(loss)
        return loss

    def _raise(self, _: Tensor) -> None:
        raise self.error


def counted_model() -> nn.Module:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    model.register_buffer("count", torch.zeros(()))
    return model


@pytest.mark.parametrize("noise", ["shared", "independent", "fixed"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("from the loss"), KeyboardInterrupt()])
def test_after_an_exception_the_question_can_be_asked_again(
    noise: Any, backward: bool, error: BaseException
) -> None:
    requests = [
        at(Kind.VALUE, [1, 2]),
        at(Kind.VALUE_AND_GRADIENT, commit=True),
        at(Kind.POPULATION, [[1, 1], [2, 2], [3, 3]]),
        at(Kind.VALUE_AND_GRADIENT, [0, 1]),
        at(Kind.VALUE, [1, 2], probe=True),
        at(Kind.VALUE, [2, 2], keep_graph=True),
        at(Kind.GRADIENT, [2, 2]),
        at(Kind.VALUE, [1, 2]),
    ]
    asks_for_gradient = {2, 6, 8}  # calls of the loss, from 1, whose backward is run

    def path(fails: int | None) -> list[Any]:
        model = counted_model()
        found: list[Any] = []
        before = caller()
        with Objective(Once(fails, error, backward), model, seed=5, noise=noise, keep="best") as objective:
            for request in requests:
                raised: BaseException | None = None
                try:
                    answer = objective.answer(request)
                except type(error) as caught:
                    raised = caught
                if raised is not None:
                    assert raised is error, "unchanged"
                    assert torch.get_rng_state().tolist() == before[0]
                    assert fails is not None
                    booked = fails if request.kind is Kind.GRADIENT else fails - 1
                    assert objective.ledger.evaluations == objective.ledger.forward == booked
                    answer = objective.answer(request)
                found.append((answer.loss, answer.losses, answer.gradient))
            ledger = objective.ledger
            found.append((ledger.evaluations, ledger.forward, ledger.backward, ledger.nonfinite))
            found.append((ledger.best_loss, ledger.best_evaluation, ledger.best_point.x))
            found.append(objective.stochastic)
        assert model.count == 1, "one was committed"
        assert caller() == before
        return found

    expected = path(None)
    for fails in range(1, 10) if not backward else sorted(asks_for_gradient):
        np.testing.assert_equal(path(fails), expected)


@pytest.mark.parametrize("form", ["closure with backward", "closure"])
def test_a_closure_may_fail_before_it_is_known_whether_it_calls_backward(form: str) -> None:
    meter = Meter()
    loss, target = FORMS[form](meter)
    broken = [True]

    def closure() -> Any:
        if broken:
            broken.pop()
            raise ValueError("first call")
        return loss()

    with Objective(closure, target, {"forward_equivalents": 3}) as objective:
        with pytest.raises(ValueError, match="first call"):
            objective.answer(at(Kind.VALUE, X))
        objective.answer(at(Kind.VALUE, X))
        assert (objective.ledger.evaluations, objective.ledger.backward) == (1, meter.backward)
