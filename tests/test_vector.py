"""`hybridopt.vector`: the laws of flattening, then who holds the weights."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hybridopt.errors import SelectionError
from hybridopt.vector import ParameterVector

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "transposed", "gaps", "offset")
VALUES = st.floats(-6e4, 6e4, allow_subnormal=True)  # within float16


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """To nearest, ties to even, in NumPy alone; 16-bit dtypes by way of float32, as torch casts doubles."""
    if dtype == torch.float64:
        return x
    narrow = x.astype(np.float32)
    if dtype == torch.float16:
        narrow = narrow.astype(np.float16)
    if dtype == torch.bfloat16:
        bits = narrow.view(np.uint32)
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        narrow = bits.view(np.float32)
    return narrow.astype(np.float64)


def laid_out(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """A tensor of a shape in a memory layout, and the base tensor whose memory it uses."""
    count = math.prod(shape)
    if layout == "transposed":
        base = torch.zeros(shape[::-1], dtype=dtype)
        return base.permute(tuple(range(len(shape)))[::-1]), base
    if layout == "gaps" and shape:
        base = torch.zeros((*shape[:-1], 2 * shape[-1] + 1), dtype=dtype)
        return base[..., 1::2], base
    if layout == "offset":
        base = torch.zeros(count + 5, dtype=dtype)
        return base[3 : 3 + count].view(shape), base
    base = torch.zeros(shape, dtype=dtype)
    return base, base


SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)
TENSORS = st.lists(
    st.tuples(SHAPES, st.sampled_from(DTYPES), st.sampled_from(LAYOUTS)), min_size=1, max_size=4
)


@given(TENSORS, st.data())
def test_read_after_write_is_rounding_and_nothing_else_changes(
    specs: list[tuple[tuple[int, ...], torch.dtype, str]], data: st.DataObject
) -> None:
    pairs = [laid_out(*spec) for spec in (*specs, ((1,), torch.float64, "contiguous"))]  # at least one weight
    tensors = [t for t, _ in pairs]
    vector = ParameterVector(tensors)
    assert vector.n == sum(math.prod(t.shape) for t in tensors)
    x = np.array(data.draw(st.lists(VALUES, min_size=vector.n, max_size=vector.n)))
    before = [(t.data_ptr(), t.stride(), t.dtype, t.shape) for t in tensors]

    vector.write(x)

    assert [(t.data_ptr(), t.stride(), t.dtype, t.shape) for t in tensors] == before
    expected = np.concatenate(
        [rounded(x[vector.slices[n]], t.dtype) for n, t in zip(vector.names, tensors, strict=True)]
    )
    got = vector.read()
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))
    for (tensor, base), part in zip(pairs, vector.slices.values(), strict=True):
        # logical order, whatever the strides; memory between the entries stays as it was
        assert tensor.to(torch.float64).flatten().tolist() == expected[part].tolist()
        sums = [math.fsum(one.double().abs().flatten().tolist()) for one in (base, tensor)]
        assert sums[0] == sums[1]  # exact: not of another order
    # the same values by the differentiable way, and back
    parts = vector.unflatten(torch.from_numpy(x))
    assert list(parts) == list(vector.names)
    for name, tensor in zip(vector.names, tensors, strict=True):
        assert parts[name].dtype == tensor.dtype
        assert torch.equal(parts[name], tensor)
    np.testing.assert_array_equal(vector.gather(parts.values()), expected)
    # what was read is a fixed point, and owns its memory
    vector.write(got)
    np.testing.assert_array_equal(vector.read(), got)
    got += 1
    np.testing.assert_array_equal(vector.read(), expected)


def test_channels_last_weights_keep_their_strides() -> None:
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    vector = ParameterVector(conv)
    stride, pointer = conv.weight.stride(), conv.weight.data_ptr()
    assert not conv.weight.is_contiguous()
    vector.write(np.arange(vector.n))
    assert (conv.weight.stride(), conv.weight.data_ptr()) == (stride, pointer)
    assert conv.weight.flatten().tolist() == list(range(conv.weight.numel()))
    shadow = vector.snapshot()
    assert shadow[0].stride() == stride
    assert shadow[0].data_ptr() != pointer
    vector.write(np.zeros(vector.n))
    vector.restore(shadow)
    assert conv.weight.stride() == stride
    assert vector.read().tolist() == list(range(vector.n))
    vector.write(np.ones(vector.n))
    vector.copy_to(shadow)
    assert vector.gather(shadow).tolist() == [1.0] * vector.n


@pytest.mark.parametrize("shape", [(3,), (), (2, 2)])
def test_what_is_read_is_a_copy_even_of_a_single_float64_tensor(shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape, dtype=torch.float64)
    vector = ParameterVector(weight)
    read, gathered = vector.read(), vector.gather([weight])
    for copy in (read, gathered):
        copy += 1
    assert weight.sum() == vector.n
    vector.write(read)
    read += 1
    assert weight.sum() == 2 * vector.n


def test_gather_counts_none_as_zeros() -> None:
    vector = ParameterVector([torch.ones(2), torch.ones(1), torch.ones(())])
    assert vector.gather([torch.full((2,), 5.0), None, torch.tensor(7.0)]).tolist() == [5, 5, 0, 7]


class Tied(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False, dtype=dtype)
        self.decode = nn.Linear(3, 3, dtype=dtype)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


def test_tied_weights_are_one_weight() -> None:
    model = Tied()
    vector = ParameterVector(model)
    assert vector.names == ("encode.weight", "decode.bias")
    assert vector.aliases == {"decode.weight": "encode.weight"}
    assert vector.n == 12
    vector.write(np.arange(12.0))
    assert model.decode.weight.flatten().tolist() == list(range(9))
    both = ParameterVector({"a": model.encode.weight, "b": model.decode.weight, "c": model.decode.bias})
    assert (both.names, both.aliases) == (("a", "c"), {"b": "a"})


# torch's forward mode compiles its own decompositions with torch.jit on first use
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_unflatten_is_differentiable_and_vmappable_with_tied_weights() -> None:
    model, batch = Tied(), torch.randn(5, 3, dtype=torch.float64)
    vector = ParameterVector(model)

    def loss(x: Tensor) -> Tensor:
        return torch.func.functional_call(model, vector.unflatten(x), (batch,)).pow(2).mean()

    x0 = torch.from_numpy(vector.read())
    assert torch.autograd.gradcheck(loss, (x0.clone().requires_grad_(),))
    # the same gradient as torch's own through the module, both uses of the tied weight included
    grads = torch.autograd.grad(model(batch).pow(2).mean(), vector.tensors)
    torch.testing.assert_close(torch.func.grad(loss)(x0), torch.from_numpy(vector.gather(grads)))
    population = torch.randn(7, vector.n, dtype=torch.float64)
    batched = torch.func.vmap(loss)(population)
    looped = []
    for row in population:
        vector.write(row)
        looped.append(model(batch).pow(2).mean().item())
    np.testing.assert_allclose(batched.numpy(), looped, rtol=1e-12)
    hessian = torch.func.hessian(loss)(x0)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, x0))  # type: ignore[no-untyped-call]


def test_unflatten_casts_per_weight_and_lets_gradients_through() -> None:
    vector = ParameterVector([torch.zeros(2, dtype=t) for t in DTYPES])
    x = torch.linspace(-1, 1, 8, dtype=torch.float64, requires_grad=True)
    parts = vector.unflatten(x)
    assert [p.dtype for p in parts.values()] == list(DTYPES)
    sum((i + 1) * p.double().sum() for i, p in enumerate(parts.values())).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("x", [np.zeros(2), np.zeros((1, 3)), [0.0], 1.0, torch.zeros(4)])
def test_a_wrong_shape_is_refused_and_nothing_is_touched(x: object) -> None:
    weight = torch.ones(3)
    vector = ParameterVector(weight)
    owner = Owner(vector)
    vector.claim(owner)
    epoch = vector.epoch
    with pytest.raises(ValueError, match=r"expected shape \(3,\), one number per weight, got \("):
        vector.write(x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected shape \(3,\), one number per weight, got \("):
        vector.unflatten(torch.as_tensor(x))
    assert weight.tolist() == [1, 1, 1]
    assert (vector.epoch, owner.saved) == (epoch, None)


@pytest.mark.parametrize(
    "x", [[1, 2], np.array([1, 2]), torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)]
)
def test_write_takes_lists_arrays_and_tensors(x: object) -> None:
    weight = nn.Parameter(torch.zeros(2))
    ParameterVector(weight).write(x)  # type: ignore[arg-type]
    assert weight.tolist() == [1, 2]
    assert weight.requires_grad
    assert weight.grad_fn is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_start_weights_must_be_finite(bad: float, dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2, dtype=dtype)
    with torch.no_grad():
        model.weight[1, 0] = bad
    with pytest.raises(SelectionError, match=r"'weight' holds 1 value\(s\) that are nan or inf.*select="):
        ParameterVector(model)
    assert ParameterVector(model, "bias").n == 2  # what is not selected may hold anything


def test_no_weight_at_all_is_an_error() -> None:
    with pytest.raises(
        SelectionError, match=r"expected at least one, the selected tensors \['x'\] hold none"
    ):
        ParameterVector(torch.empty(0, 3))


def test_eps_is_that_of_each_weight() -> None:
    vector = ParameterVector([torch.zeros(2, dtype=torch.bfloat16), torch.zeros((), dtype=torch.float64)])
    assert vector.eps.tolist() == [2**-7, 2**-7, 2**-52]


# -- who holds the weights ------------------------------------------------------------------------------------------


class Owner:
    """Keeps its iterate in the tensors, as an in-place optimizer does."""

    def __init__(self, vector: ParameterVector) -> None:
        self.vector = vector
        self.saved: list[float] | None = None

    def evicted(self) -> None:
        self.saved = self.vector.read().tolist()


def test_a_write_lets_the_owner_save_its_own_weights_first() -> None:
    vector = ParameterVector(torch.ones(2))
    first, second = Owner(vector), Owner(vector)
    assert vector.claim(first)
    assert not vector.claim(first), "it holds them already"
    vector.write([3.0, 4.0])
    assert first.saved == [1, 1]
    first.saved = None
    vector.write([5.0, 6.0])
    assert first.saved is None, "it was told already"
    assert vector.claim(first), "the weights may have changed: it must put its iterate back"
    assert vector.claim(second)
    assert first.saved == [5, 6]
    vector.release(first)  # not the holder: nothing happens
    vector.release(second)
    vector.write([7.0, 8.0])
    assert second.saved is None, "released without saving"


def test_every_change_of_the_weights_moves_the_epoch() -> None:
    vector = ParameterVector(torch.zeros(2), bounds=(-1, 1))
    seen = [vector.epoch]
    shadow = vector.snapshot()
    for change in (
        lambda: vector.write([0.5, 0.5]),
        lambda: vector.restore(shadow),
        vector.project,
        vector.touch,
    ):
        change()
        seen.append(vector.epoch)
    assert len(set(seen)) == len(seen)
    vector.read(), vector.snapshot(), vector.copy_to(shadow), vector.unflatten(torch.zeros(2))
    assert vector.epoch == seen[-1]


def test_names_slices_and_description() -> None:
    vector = ParameterVector(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False)))
    assert vector.slices == {"0.weight": slice(0, 6), "0.bias": slice(6, 9), "2.weight": slice(9, 12)}
    assert vector.matching("*.weight") == ["0.weight", "2.weight"]
    assert vector.describe() == {
        "names": ["0.weight", "0.bias", "2.weight"],
        "shapes": [[3, 2], [3], [1, 3]],
        "dtypes": ["torch.float32"] * 3,
        "integer": [],
        "log": [],
    }
    assert repr(vector) == "ParameterVector(12 weights in 3 tensors, unbounded)"


@pytest.mark.parametrize("duplicate", [deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_a_copy_writes_its_own_weights(duplicate: Callable[[ParameterVector], ParameterVector]) -> None:
    """The buffer of the first write used to stay behind with the original."""
    vector = ParameterVector(torch.zeros(3))
    vector.write([1.0, 2.0, 3.0])
    other = duplicate(vector)
    other.write([4.0, 5.0, 6.0])
    assert other.read().tolist() == [4.0, 5.0, 6.0]
    assert vector.read().tolist() == [1.0, 2.0, 3.0]
