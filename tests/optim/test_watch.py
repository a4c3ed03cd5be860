"""Whatever moves is noticed, by compiled code and where that cannot be had."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import hybridopt.optim
from hybridopt.optim import _plan, _watch
from hybridopt.optim._watch import END, Contents, Gradients, Memory, Versions
from tests.optim.side_by_side import COMPILED, assert_same, both, give, odd, pair
from tests.optim.test_moves import MOVES, STRANGE, step_moved


class Dispatching(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("nothing may be computed with it")


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 4), torch.randn(3, 2).t(), torch.tensor(1.0), torch.empty(0, 3)]


def _data(t: Tensor) -> None:
    t.data = t.data.clone()


def _transpose(t: Tensor) -> None:
    t.t_()


def _reshape(t: Tensor) -> None:
    t.data = t.data.view(2, 8)


def _flatten(t: Tensor) -> None:
    t.data = t.data.view(16)


def _narrow(t: Tensor) -> None:
    t.data = t.data[:2]


def _swap(t: Tensor) -> None:
    torch.utils.swap_tensors(t, t.clone())


def _share(t: Tensor) -> None:
    t.share_memory_()  # type: ignore[no-untyped-call]


@pytest.fixture(params=[True, False], ids=["remembered", "asked"])
def remembered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether tensors are compared by the words of their memory first, or torch is asked at each look."""
    if not request.param:
        monkeypatch.setattr(_watch, "_place_of_words", lambda: (0, 0, 0))
    elif not any(_watch._place_of_words()):
        pytest.skip("which words tell of a tensor is not known")
    return bool(request.param)


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("change", [_data, _transpose, _reshape, _flatten, _narrow, _swap, _share])
def test_weight_that_moved(change: Any) -> None:
    laid_out, others = tensors(), tensors()
    assert _watch.readable([*laid_out, *others])
    memory = Memory(laid_out, others)
    assert memory.look() == 0
    assert memory.look() == 0
    laid_out[0].mul_(2)
    assert memory.look() == 0
    change(laid_out[0])
    assert memory.look() == -1
    assert memory.look() == -1  # as often as one asks


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("change", [_data, _swap, _share])
def test_state_that_moved(change: Any) -> None:
    laid_out, others = tensors(), tensors()
    memory = Memory(laid_out, others)
    others[0].t_()  # its layout was looked at when the plan was made
    assert memory.look() == 0
    change(others[0])
    assert memory.look() == -1


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize(
    "other",
    [
        None,
        torch.randn(4, 4).to_sparse(),
        torch._neg_view(torch.randn(4, 4)),
        torch._neg_view(torch.randn(4, 4)).t().t(),
        torch.randn(4, 4).t(),
        torch.randn(4, 4).as_subclass(Dispatching),
    ],
    ids=["None", "sparse", "negated", "negated view", "transposed", "subclass"],
)
def test_gradient_of_another_kind(other: Any) -> None:
    weights = [t.requires_grad_() for t in tensors()]
    for p in weights:
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in weights if p.grad is not None]
    addresses = array("q", [g.data_ptr() for g in grads])
    memory, gradients = Memory(weights, ()), Gradients(weights, grads, addresses)
    assert memory.look(gradients) == 0
    again = [g.clone() for g in grads]
    for p, g in zip(weights, again, strict=True):
        p.grad = g
    assert memory.look(gradients) == 3  # the one without elements has no address
    assert list(addresses) == [g.data_ptr() for g in again]
    assert memory.look(gradients) == 0
    weights[0].grad = other
    assert memory.look(gradients) == -1
    weights[0].grad = again[0]
    assert memory.look(gradients) == 0
    weights[0].data = weights[0].data.clone()
    assert memory.look(gradients) == -1


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("name", ["dtype", "shape"])
def test_gradient_of_another_dtype_or_shape(name: str) -> None:
    """Which torch lets nobody assign, but `.data` does."""
    p = torch.zeros(4, 4, requires_grad=True)
    p.grad = torch.ones(4, 4)
    gradients = Gradients([p], [p.grad], array("q", [p.grad.data_ptr()]))
    memory = Memory([p], ())
    assert memory.look(gradients) == 0
    others = {
        "dtype": torch.ones(4, 4).double(),
        "shape": torch.ones(2, 8),
    }
    p.grad.data = others[name]
    assert memory.look(gradients) == -1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_words_are_found_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    known = _watch._place_of_words()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        _watch._place_of_words.cache_clear()
        assert _watch._place_of_words() == known
    finally:
        torch.set_default_dtype(before)
        _watch._place_of_words.cache_clear()


def test_torch_is_not_asked_again_of_what_is_remembered(remembered: bool) -> None:
    memory = Memory(tensors(), tensors())
    assert memory.look() == 0
    memory.block[13] += 1  # the dtype that it should have, so that asking shows
    assert memory.look() == (0 if remembered else -1)
    memory.block[13] -= 1
    assert memory.look() == 0


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("dims", [5, 6])
def test_strides_of_many_dimensions(dims: int) -> None:
    """torch keeps those of more than five elsewhere, and writes new ones to the same place."""
    weight, state = torch.zeros([2] * dims).transpose_(0, 1), torch.zeros([2] * dims)
    memory = Memory([weight], [state])
    assert memory.look() == memory.look() == 0
    weight.transpose_(2, 3)
    assert memory.look() == -1


@pytest.mark.usefixtures("remembered")
def test_weight_whose_memory_is_shared_until_one_writes() -> None:
    params = [Parameter(torch.ones(3, 3))]
    optimizer = hybridopt.optim.SGD(params, lr=0.5)
    for _ in range(3):
        give(params, 0)
        optimizer.step()
    assert optimizer._used == COMPILED
    before = params[0].detach().clone()
    copied = torch._lazy_clone(params[0].detach())
    optimizer.step()
    assert torch.equal(copied, before)
    assert not torch.equal(params[0].detach(), before)


@pytest.mark.parametrize("kind", [dict, lambda x: defaultdict(dict, x)])
def test_versions(kind: Any) -> None:
    if not _watch.counts_versions():
        pytest.skip("this Python does not count versions of dicts")
    number = 1.5
    items: list[Any] = [object(), object()]
    held = kind({"a": number})
    versions = Versions([items, []], [held])
    assert versions.same()
    held["a"] = number
    assert versions.same()
    for change in (
        lambda: held.update(a=2.5),
        lambda: held.setdefault("b", 1),
        lambda: held.pop("a"),
        lambda: items.append(1),
        lambda: items.reverse(),
        lambda: items.__setitem__(0, object()),
        lambda: items.clear(),
    ):
        assert Versions([items, []], [held]).same()
        versions = Versions([items, []], [held])
        change()
        assert not versions.same()
    assert not Versions().same()


def test_order_counts() -> None:
    a, b = [object(), object()], [object()]
    contents = Contents([a, END, b])
    assert contents.same()
    b.insert(0, a.pop())
    assert not contents.same()
    a.append(b.pop(0))
    assert contents.same()
    b.append(object())
    assert not contents.same()
    b[:] = []
    assert not contents.same()


@pytest.fixture
def python_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "readable", lambda tensors: False)
    monkeypatch.setattr(_watch, "counts_versions", lambda: False)


@odd
@pytest.mark.usefixtures("python_only")
@pytest.mark.parametrize("move", MOVES)
def test_whatever_moves_without_compiled_code(move: str) -> None:
    case = pair("Adam")
    both(case, range(3))
    assert case[0]._used == COMPILED
    assert case[0]._plans[0].memory is None
    step_moved(case, move)
    both(case, range(4, 7))
    assert_same(case)


@odd
@pytest.mark.parametrize("compiled", [True, False])
def test_square_weight_transposed_in_place(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(_plan, "readable", lambda tensors: False)
    case = pair("Adam", shapes=((3, 3),))
    both(case, range(3))
    for params in (case[1], case[3]):
        params[0].data.t_()
        with torch.no_grad():
            params[0].t_()
    both(case, range(3, 6))
    assert_same(case)


@odd
def test_strange_gradients_after_plain_ones() -> None:
    """At the same address, of the same shape."""
    assert STRANGE
    case = pair("SGD", shapes=((4, 4),))
    both(case, range(3))
    for optimizer, params in (case[:2], case[2:]):
        params[0].grad = torch._neg_view(params[0].grad)
        optimizer.step()
    assert_same(case)


def test_weight_listed_twice_is_stepped_by_one_thread() -> None:
    p = Parameter(torch.ones(600, 600))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = hybridopt.optim.SGD([p, p], lr=0.5)
    p.grad = torch.ones_like(p)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert Counter(p.detach().flatten().tolist()) == {0.0: 360_000}
    assert optimizer._plans is not None
    assert not optimizer._plans[0].parallel  # type: ignore[attr-defined]


@pytest.mark.parametrize("known", [True, False])
def test_autograd_sees_that_weights_have_changed(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of weights given other memory since, and for a graph that was recorded before."""
    if known and _watch._place_of_version() == (0, 0):
        pytest.skip("where versions stand is not known")
    if not known:
        monkeypatch.setattr(_watch, "_place_of_version", lambda: (0, 0))
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2, 2))]
    optimizer = hybridopt.optim.SGD(params)
    for _ in range(3):
        give(params, 0)
        optimizer.step()
    assert optimizer._used == COMPILED
    assert (optimizer._plans[0].touching is not None) == known  # type: ignore[index, attr-defined]
    params[0].data = torch.zeros(3)
    recorded = (params[0] ** 2).sum()
    before = [p._version for p in params]
    optimizer.step()
    assert [p._version for p in params] == [version + 1 for version in before]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        recorded.backward()
