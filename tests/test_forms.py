"""`hybridopt.forms`: how a loss takes the weights, decided once, and what it may return."""

from __future__ import annotations

import functools
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybridopt.errors import HybridoptError, ObjectiveError
from hybridopt.forms import Form, as_number, as_scalar, as_vector, bind_loss
from hybridopt.vector import ParameterVector


class Callable1:
    def __call__(self, model: Any) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("target", "form"),
    [
        (nn.Linear(1, 1), Form.MODULE),
        (nn.ParameterDict({"params": nn.Parameter(torch.ones(1))}), Form.MODULE),
        (torch.ones(2), Form.TENSOR),
        (np.ones(2), Form.ARRAY),
        ([1.0, 2.0], Form.ARRAY),
        ((1, 2.5), Form.ARRAY),
        ([np.float32(1)], Form.ARRAY),
        ({"a": torch.ones(1)}, Form.MAPPING),
        ({"params": torch.ones(1)}, Form.MAPPING),
    ],
)
def test_the_target_decides_the_form_and_a_loss_without_argument_is_a_closure(
    target: Any, form: Form
) -> None:
    vector = as_vector(target)
    takes_one: list[Callable[..., Any]] = [
        lambda m: 1.0,
        lambda m, scale=2: 1.0,
        lambda *args: 1.0,
        lambda m, /, **rest: 1.0,
        functools.partial(lambda m, k: 1.0, k=3),
        Callable1(),
        Callable1().__call__,
        nn.Identity(),
        max,  # no signature to look at
    ]
    assert [bind_loss(loss, vector).form for loss in takes_one] == [form] * len(takes_one)
    takes_none: list[Callable[..., Any]] = [
        lambda: 1.0,
        lambda k=3: 1.0,
        lambda **rest: 1.0,
        functools.partial(lambda m: 1.0, None),
    ]
    assert [bind_loss(loss, vector).form for loss in takes_none] == [Form.CLOSURE] * len(takes_none)


def test_each_form_sees_the_weights_as_they_stand_and_at_other_weights() -> None:
    def sum_of(x: Any) -> Any:
        return sum(p.sum() for p in x.parameters()) if isinstance(x, nn.Module) else x.sum()

    frozen = torch.full((1,), 100.0)
    mapping = {"a": torch.zeros(2), "frozen": frozen}
    targets: list[tuple[Any, Any, Callable[..., Any]]] = [
        (nn.Linear(1, 1), None, sum_of),
        (torch.zeros(2), None, sum_of),
        (np.zeros(2), None, sum_of),
        (mapping, "a", lambda d: d["a"].sum() + d["frozen"].sum() - 100),
    ]
    for target, select, loss in targets:
        vector = as_vector(target, select)
        bound = bind_loss(loss, vector)
        vector.write([1.0, 2.0])
        assert as_number(bound.call())[0] == 3
        if bound.functional is not None:
            other = vector.unflatten(torch.tensor([5.0, 6.0]))
            assert as_number(bound.functional(other))[0] == 11
            assert vector.read().tolist() == [1, 2], "the model is not touched"
    assert mapping["frozen"] is frozen


def test_a_tied_weight_is_replaced_under_all_its_names() -> None:
    weight = torch.zeros(2, dtype=torch.float64)
    model = nn.Module()
    model.a = model.b = nn.Parameter(weight.clone())
    targets: list[tuple[Any, Callable[..., Any]]] = [
        ({"a": weight, "b": weight}, lambda d: (d["a"] * d["b"]).sum()),
        (model, lambda m: (m.a * m.b).sum()),
    ]
    for target, loss in targets:
        vector = as_vector(target)
        functional = bind_loss(loss, vector).functional
        assert functional is not None
        x = torch.tensor([1.0, 3.0], dtype=torch.float64)
        assert functional(vector.unflatten(x)).item() == 10
        gradient = torch.func.grad(lambda z, f=functional, v=vector: f(v.unflatten(z)))(x)
        assert gradient.tolist() == [2, 6], "through both names"


def test_array_losses_cannot_change_the_weights_by_writing_into_what_they_get() -> None:
    start = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    vector = as_vector(start)

    def greedy(x: np.ndarray) -> float:
        assert x.shape == (2, 3)
        x[:] = 0
        return 1.0

    bind_loss(greedy, vector).call()
    assert vector.read().tolist() == [0, 1, 2, 3, 4, 5]
    vector.write(np.zeros(6))
    assert start.tolist() == [[0, 1, 2], [3, 4, 5]], "the caller's array is only read"


def test_arrays_of_any_layout_are_taken() -> None:
    base = np.arange(8.0)
    read_only = base.copy()
    read_only.flags.writeable = False
    for start in (base[::-2], read_only, np.float32(base), np.array(3.0), np.float16(base)):
        vector = as_vector(start)
        assert vector.read().tolist() == start.ravel().tolist()
        vector.write(np.zeros(vector.n))


def test_a_loss_module_is_called_on_the_model_and_is_not_optimized_itself() -> None:
    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, model: nn.Module) -> Tensor:
            return (model.weight * self.weight).sum()  # type: ignore[operator]

    model = nn.Linear(2, 1, bias=False)
    vector = as_vector(model)
    bound = bind_loss(Penalty(), vector)
    assert bound.functional is not None
    assert bound.functional(vector.unflatten(torch.tensor([1.0, 2.0]))).item() == 3
    assert [name for name, _ in model.named_modules()] == [""], "nothing was attached to the model"


@pytest.mark.parametrize(
    ("value", "number", "aux"),
    [
        (3, 3.0, None),
        (True, 1.0, None),
        (2.5, 2.5, None),
        (Decimal("1.5"), 1.5, None),
        (np.float32(1.5), 1.5, None),
        (np.int64(7), 7.0, None),
        (np.array(2.0), 2.0, None),
        (np.array([[2.0]]), 2.0, None),
        (torch.tensor(4), 4.0, None),
        (torch.tensor([4.5]), 4.5, None),
        (torch.tensor(True), 1.0, None),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5, None),
        ((torch.tensor(4.0), {"k": 1}), 4.0, {"k": 1}),
        ((2.0, None), 2.0, None),
    ],
)
def test_one_number_comes_back_as_a_float(value: Any, number: float, aux: Any) -> None:
    got = as_number(value)
    assert got == (number, aux)
    assert type(got[0]) is float


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.ones(2),
            r"loss: expected one real number, got a tensor of shape \(2,\) and torch\.float32; reduce it",
        ),
        (torch.tensor(1j), r"got a tensor of shape \(\) and torch\.complex64"),
        (torch.empty(0), r"shape \(0,\)"),
        (np.ones(2), r"loss: expected a number or a one-element tensor, got ndarray"),
        (None, r"got NoneType"),
        ("3.0", r"got str"),
        (1j, r"got complex"),
        ([1.0], r"got list"),
        ((1.0, 2.0, 3.0), r"got tuple"),
    ],
)
def test_anything_else_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        as_number(value)


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        (
            nn.Linear(1, 1).weight,
            torch.ones(1),
            r"loss: expected a function, got Parameter; the loss comes first",
        ),
        (
            lambda m, batch: 0.0,
            nn.Linear(1, 1),
            r"function of the model \(or weights\) alone.*needs m, batch.*partial",
        ),
        (lambda m, *, batch: 0.0, nn.Linear(1, 1), r"it needs m, batch"),
        (lambda *, batch: 0.0, nn.Linear(1, 1), r"it needs batch"),
        (lambda x: 0.0, [torch.ones(1), torch.ones(1)], r"for a list of tensors expected a closure\(\)"),
        (lambda x: 0.0, [{"params": [torch.ones(1)]}], r"expected a closure\(\) without arguments"),
        (lambda d: 0.0, {"params": [torch.ones(1)]}, r"expected a closure\(\) without arguments"),
        (
            lambda x: 0.0,
            [1, 2],
            r"start: expected floating numbers, .* got int64; integer=True keeps weights whole",
        ),
        (lambda x: 0.0, np.array([True]), r"start: expected floating numbers, .* got bool"),
        (nn.Linear(1, 1), lambda m: 0.0, r"got function; the loss comes first, then the model"),
        (lambda x: 0.0, np.array(["a"]), r"start: expected an array of float16, float32 or float64.*got <U1"),
        (lambda x: 0.0, np.array([None]), r"start: expected an array of .*got object"),
        (lambda x: 0.0, np.ones(2, dtype=">f8"), r"machine's byte order, got >f8"),
        (lambda x: 0.0, np.ones(1, dtype=complex), r"weights: 'x' is complex"),
    ],
)
def test_what_cannot_be_bound_is_said_clearly(loss: Any, target: Any, message: str) -> None:
    with pytest.raises(HybridoptError, match=message):
        bind_loss(loss, as_vector(target))


def test_options_of_a_vector_are_given_once() -> None:
    vector = ParameterVector(torch.ones(2))
    assert as_vector(vector) is vector
    for option in ({"select": "x"}, {"bounds": (-2, 2)}, {"scale": 2}):
        with pytest.raises(ObjectiveError, match="belong to the ParameterVector"):
            as_vector(vector, **option)


def test_the_models_own_weights_are_back_after_a_call_at_other_ones() -> None:
    model = torch.nn.LSTM(2, 2)  # which keeps its weights in a list of its own, too
    own = list(model.parameters())
    vector = as_vector(model)
    seen: list[Any] = []

    def loss(m: nn.Module) -> Tensor:
        seen.append(list(m.parameters()))
        if len(seen) == 3:
            raise ValueError("from the loss")
        out: Tensor = m(torch.ones(1, 2))[0].sum()
        return out

    bound = bind_loss(loss, vector)
    assert bound.functional is not None
    here = as_number(bound.call())[0]
    other = vector.unflatten(torch.zeros(vector.n))
    assert as_number(bound.functional(other))[0] == 0
    assert all(a is b for a, b in zip(seen[1], other.values(), strict=True))
    with pytest.raises(ValueError, match="from the loss"):
        bound.functional(other)
    assert all(a is b for a, b in zip(model.parameters(), own, strict=True))
    assert as_number(bound.call())[0] == here != 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, "returned a float"),
        (np.ones(1), "returned a ndarray"),
        (torch.ones(2), r"a tensor of shape \(2,\) and torch.float32"),
        (torch.ones(1, dtype=torch.complex64), r"torch.complex64, not one real number"),
        ((1.0, "aux"), "returned a float"),
    ],
)
def test_what_is_no_scalar_tensor(value: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        as_scalar(value)


def test_a_loss_as_a_tensor_without_dimensions() -> None:
    for value in (torch.tensor(3.0), torch.tensor([[3.0]]), (torch.tensor([3.0]), "aux")):
        assert as_scalar(value).shape == ()
        assert as_scalar(value).item() == 3
