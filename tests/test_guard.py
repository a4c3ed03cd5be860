"""`hybridopt.guard`: what an evaluation must not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridopt.guard import ModelGuard
from hybridopt.vector import ParameterVector


class Counting(nn.Module):
    """Buffers of several kinds, each moved in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("in_place", torch.zeros(2))
        self.register_buffer("assigned", torch.zeros(2))
        self.register_buffer("grown", torch.zeros(0))
        self.register_buffer("nothing", None)
        self.norm = nn.BatchNorm1d(2)
        self.norm_again = self.norm  # shared: one set of statistics

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.in_place, Tensor)
        self.in_place += 1
        self.assigned = self.assigned + 1
        self.grown = torch.zeros(len(self.grown) + 1)
        return self.norm(x * self.weight)

    def moved(self) -> list[Any]:
        buffers = [
            self.in_place,
            self.assigned,
            self.grown,
            self.norm.running_mean,
            self.norm.num_batches_tracked,
        ]
        return [b.tolist() for b in buffers if isinstance(b, Tensor)]


@pytest.mark.parametrize("commit", [False, True])
def test_buffers_move_only_when_committed(commit: bool) -> None:
    model = Counting()
    before = model.moved()
    guard = ModelGuard(ParameterVector(model))
    guard.open()
    for _ in range(3):
        model(torch.rand(4, 2))
        guard.settle_buffers(commit)
        assert (model.moved() != before) == commit
    if commit:
        assert model.norm.num_batches_tracked.item() == 3
        assert model.in_place.tolist() == [3, 3]
    model(torch.rand(4, 2))
    guard.settle_buffers(False)
    assert model.in_place.tolist() == [3.0 * commit] * 2
    guard.close()


class Unversioned(nn.Module):
    """A running mean that is written through `.data`, beside one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean
        assert isinstance(mean, Tensor)
        mean.data.mul_(0.9).add_(x.detach().mean(0))
        return self.norm(x * self.weight)


@pytest.mark.parametrize("commit", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_writes_through_data_are_noticed(commit: bool, both: bool) -> None:
    model = Unversioned()
    model.norm.train(both)
    guard = ModelGuard(ParameterVector(model))
    guard.open()
    for k in range(3):
        if k == 1:
            model.norm.eval()  # now only one of the two moves
        model(torch.ones(4, 2))
        guard.settle_buffers(commit)
    expected = [1 + 0.9 + 0.81 if commit else 0.0] * 2
    assert model.get_buffer("mean").tolist() == pytest.approx(expected)
    saved = guard.base_buffers()[0]
    assert saved is not None
    assert saved.tolist() == pytest.approx(expected)


def test_a_buffer_in_two_places_stays_one() -> None:
    model = Counting()
    model.norm.register_buffer("again", model.in_place)
    guard = ModelGuard(ParameterVector(model))
    guard.open()
    guard.lend_buffers()
    assert model.norm.again is model.in_place
    model(torch.rand(4, 2))
    assert model.norm.get_buffer("again").tolist() == [1, 1]
    guard.return_buffers()
    assert model.norm.again is model.in_place
    assert model.norm.get_buffer("again").tolist() == [0, 0]
    model.in_place = model.norm.again = torch.zeros(3)  # of another shape: put back as one
    guard.settle_buffers(False)
    assert model.norm.again is model.in_place
    assert model.norm.get_buffer("again").tolist() == [0, 0]


def test_a_buffer_made_by_the_first_forward_is_guarded() -> None:
    model = Counting()
    guard = ModelGuard(ParameterVector(model))
    guard.open()
    for lent in (True, False):
        if lent:
            guard.lend_buffers()
        model.nothing = torch.ones(2)
        if lent:
            guard.return_buffers()
        guard.settle_buffers(False)
        assert model.nothing is None
    model.nothing = torch.ones(2)
    guard.settle_buffers(True)
    model.nothing += 1
    guard.settle_buffers(False)
    assert model.get_buffer("nothing").tolist() == [1, 1]


def test_saved_buffers_can_be_put_back() -> None:
    model = Counting()
    guard = ModelGuard(ParameterVector(model))
    guard.open()
    start, saved = model.moved(), guard.copy_buffers()
    for _ in range(2):
        model(torch.rand(4, 2))
        guard.settle_buffers(True)
    moved = model.moved()
    assert moved != start
    guard.set_buffers([])
    assert model.moved() == moved
    guard.set_buffers(saved)
    assert model.moved() == start
    guard.settle_buffers(False)
    assert model.moved() == start
    saved[0].fill_(99)
    assert model.moved() == start, "copies, not references"
    guard.close()


def test_gradients_modes_and_flags_come_back_as_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), nn.BatchNorm1d(2))
    model.train()
    model[1][0].eval()
    model[0].requires_grad_(False)
    marks = [torch.full_like(p, 7.0) for p in model.parameters()]
    for parameter, mark in zip(model.parameters(), marks, strict=True):
        parameter.grad = mark
    model[1][1].bias.grad = None
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]

    vector = ParameterVector(model, "*")  # the frozen ones too
    guard = ModelGuard(vector)
    guard.open()
    assert guard.held
    assert all(t.grad is None and t.requires_grad for t in vector.tensors)
    model.eval()
    model(torch.rand(3, 2)).sum().backward()
    guard.clear_gradients()
    assert all(t.grad is None for t in vector.tensors)
    guard.close()
    assert not guard.held
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True)), "the same objects"
    assert all((m == 7).all() for m in marks), "and untouched"


def test_gradients_of_weights_that_are_not_selected_are_guarded_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[1].weight.grad = mark = torch.ones(1, 2)
    guard = ModelGuard(ParameterVector(model, "0.*"))
    guard.open()
    for _ in range(2):
        model(torch.rand(3, 2)).sum().backward()  # as a closure may do
        guard.clear_gradients()
    guard.close()
    assert model[1].weight.grad is mark
    assert mark.tolist() == [[1, 1]]
    assert model[1].bias.grad is None


def test_tensors_without_a_module_are_guarded_too() -> None:
    plain, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    leaf.grad = mark = torch.zeros(2)
    guard = ModelGuard(ParameterVector([plain, leaf]))
    guard.open()
    (plain * leaf).sum().backward()
    guard.settle_buffers(False)
    guard.close()
    assert (plain.grad, plain.requires_grad) == (None, False)
    assert leaf.grad is mark
    assert mark.tolist() == [0, 0]
