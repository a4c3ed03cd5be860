"""Weights that no engine can step, among those that one can: torch's code for them alone, complex ones compiled."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import hybridopt.optim
from hybridopt.errors import MethodError, NonFiniteLoss
from tests.optim.side_by_side import COMPILED, NAMES, assert_same, both, carried, give, odd, pair

SPARSE = "a gradient is a Tensor with layout torch.sparse_coo"
GAPS = "the weight has gaps"


class Case:
    """A table with sparse gradients between two plain weights, in two groups."""

    def __init__(self, package: Any, name: str = "SGD", **options: Any) -> None:
        torch.manual_seed(0)
        self.params = [Parameter(torch.randn(4)), Parameter(torch.randn(6, 3)), Parameter(torch.randn(2, 2))]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.03}]
        self.optimizer = getattr(package, name)(groups, lr=0.1, **options)

    def give(self, k: int, sparse: bool = True) -> None:
        generator = torch.Generator().manual_seed(k)
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=generator)
        if sparse:
            table, rows = self.params[1], torch.tensor([[1, k % 5, 1]])
            values = torch.randn(3, 3, generator=generator)
            table.grad = torch.sparse_coo_tensor(rows, values, table.shape, check_invariants=True)

    def steps(self, steps: range, sparse: bool = True) -> None:
        for k in steps:
            self.give(k, sparse)
            self.optimizer.step()


@pytest.fixture
def first_warnings() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", RuntimeWarning)
        yield seen


def close(a: list[Parameter], b: list[Parameter], tol: float = 1e-6) -> None:
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=tol, atol=tol)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, from Adagrad
@pytest.mark.parametrize("implementation", ["auto", "fused"])
@pytest.mark.parametrize(("name", "options"), [("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {})])
def test_a_sparse_gradient_keeps_no_other_weight_from_being_compiled(
    name: str, options: dict[str, Any], implementation: Any, first_warnings: list[warnings.WarningMessage]
) -> None:
    ours = Case(hybridopt.optim, name, implementation=implementation, **options)
    theirs = Case(torch.optim, name, **options)
    ours.steps(range(6))
    theirs.steps(range(6))
    assert ours.optimizer._used == f"{COMPILED}, torch's own code: {SPARSE}"
    assert ours.optimizer._used in repr(ours.optimizer)
    close(ours.params, theirs.params)
    (said,) = [str(w.message) for w in first_warnings if w.category is RuntimeWarning]
    asked = "fused was asked for, but " if implementation == "fused" else ""
    assert said == f"{name}: {asked}{SPARSE}; torch's own code runs for 1 of 2 weights of group 0"
    assert [w.filename for w in first_warnings if w.category is RuntimeWarning] == [__file__]
    if not options:  # else torch adds a dense gradient to a sparse momentum, which is an error
        ours.steps(range(6, 9), sparse=False)
        theirs.steps(range(6, 9), sparse=False)
        assert ours.optimizer._used == COMPILED
    ours.steps(range(9, 11))
    theirs.steps(range(9, 11))
    close(ours.params, theirs.params)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_with_gaps_among_others(name: str) -> None:
    """Its state is created, saved and loaded like that of the others."""
    case = pair(name, shapes=((3, 2), (5,), (4, 2)))
    ours, params, theirs, references = case
    for optimizer, weights in ((ours, params), (theirs, references)):
        torch.manual_seed(3)
        late = Parameter(torch.randn(8, dtype=torch.float64)[::2])
        weights.append(late)
        optimizer.add_param_group({"params": [late, torch.nn.Parameter(torch.randn(3, dtype=torch.float64))]})
        weights.append(optimizer.param_groups[1]["params"][1])
    with pytest.warns(RuntimeWarning, match=f"{GAPS}; torch's own code runs for 1 of 2 weights of group 1"):
        both(case, range(4))
    assert ours._used.startswith(f"{COMPILED}, torch's own code")
    assert_same(case)
    both(case, range(4, 6), skip=3)
    assert ours._used == COMPILED
    both(case, range(6, 8))
    assert_same(case)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    both(case, range(8, 10))
    assert_same(case)


@odd
@pytest.mark.parametrize("limit", [None, 0.3])
@pytest.mark.parametrize("scaled", [False, True])
def test_norms_scales_and_skipped_steps_are_of_all_gradients(scaled: bool, limit: float | None) -> None:
    extra: dict[str, Any] = {"nonfinite": "skip"} | ({"max_grad_norm": limit} if limit else {})
    ours, plain = Case(hybridopt.optim, **extra), Case(torch.optim)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000, enabled=scaled)
    for k in range(5):
        ours.give(k)
        plain.give(k)
        if k == 3:  # one bad number: nothing at all is stepped
            assert ours.params[2].grad is not None
            ours.params[2].grad[0, 0] = torch.nan
        if scaled:
            scaler.scale(torch.ones(()))  # the scale is made
            for p in ours.params:
                p.grad = None if p.grad is None else p.grad * scaler.get_scale()
        before = [p.detach().clone() for p in ours.params]
        scaler.step(ours.optimizer)
        scaler.update()
        if k == 3:
            assert all(torch.equal(p, q) for p, q in zip(ours.params, before, strict=True))
            continue
        if limit:
            dense = [p.grad.to_dense() for p in plain.params if p.grad is not None]
            factor = min(1.0, limit / (float(torch.cat([g.reshape(-1) for g in dense]).norm()) + 1e-6))
            for p in plain.params:
                p.grad = None if p.grad is None else p.grad * factor
        plain.optimizer.step()
    assert ours.optimizer._used.startswith(COMPILED)
    assert ours.optimizer.skipped_steps == (0 if scaled else 1)  # a scaler has skipped it before us
    close(ours.params, plain.params, 2e-6)


@odd
def test_refused_before_anything_is_changed() -> None:
    ours = Case(hybridopt.optim, nonfinite="raise")
    ours.steps(range(2))
    ours.give(2)
    assert ours.params[1].grad is not None
    ours.params[1].grad = ours.params[1].grad * torch.inf
    before = [p.detach().clone() for p in ours.params]
    with pytest.raises(NonFiniteLoss, match="number 1 of group 0"):
        ours.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.params, before, strict=True))


@pytest.mark.parametrize("name", ["Adam", "Lion"])
def test_where_sparse_gradients_are_an_error_no_weight_is_stepped(name: str) -> None:
    case = Case(hybridopt.optim, name)
    case.steps(range(3), sparse=False)
    assert case.optimizer._used == COMPILED
    case.give(3)
    before = [p.detach().clone() for p in case.params]
    with pytest.raises((RuntimeError, MethodError), match=r"sparse gradients|with dense gradients"):
        case.optimizer.step()  # no warning beside
    assert all(torch.equal(p, q) for p, q in zip(case.params, before, strict=True))
    case.steps(range(4, 6), sparse=False)
    assert case.optimizer._used == COMPILED


@odd
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_noise_of_odd_weights_is_their_own(name: str) -> None:
    """The same bits as tensor by tensor, where every weight's noise is that of its position."""
    results = []
    for implementation in ("auto", "reference"):
        torch.manual_seed(0)
        params = [Parameter(torch.randn(n).bfloat16()) for n in (5, 7)]
        params.insert(1, Parameter(torch.randn(12).bfloat16()[::2]))
        cls = getattr(hybridopt.optim, name)
        optimizer = cls(params, lr=0.25, stochastic_rounding=True, implementation=implementation)
        for k in range(5):
            for i, p in enumerate(params):
                draw = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + i))
                p.grad = draw.bfloat16()
            optimizer.step()
        assert optimizer._used.startswith(COMPILED) == (implementation == "auto")
        results.append([p.detach().clone() for p in params])
    assert torch.equal(results[0][1], results[1][1])  # the odd one's step is the same code
    for a, b in zip(*results, strict=True):  # of the others all but a few roundings
        assert (a != b).sum() <= 1


@odd
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on(how: str) -> None:
    case, other = Case(hybridopt.optim, momentum=0.9), Case(hybridopt.optim, momentum=0.9)
    case.steps(range(3))
    other.steps(range(3))
    other.params, other.optimizer = carried(how, other.params, other.optimizer)
    case.steps(range(3, 6))
    other.steps(range(3, 6))
    assert other.optimizer._used.startswith(COMPILED)
    assert all(torch.equal(p, q) for p, q in zip(case.params, other.params, strict=True))


@odd
def test_an_optimizer_with_odd_weights_is_freed_at_once() -> None:
    case = Case(hybridopt.optim)
    case.steps(range(3))
    gone = weakref.ref(case.optimizer)
    gc.disable()
    try:
        del case
        assert gone() is None
    finally:
        gc.enable()


@odd
def test_a_weight_listed_twice_is_stepped_twice() -> None:
    ends = []
    for package in (hybridopt.optim, torch.optim):
        p = Parameter(torch.ones(4, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of duplicates
            optimizer = package.SGD([p, p], lr=0.1)
        p.grad = torch.ones(2, 4).t()
        optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


@odd
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_that_are_expanded_or_another_weights_too(scaled: bool) -> None:
    p, q = Parameter(torch.zeros(8)[::2]), Parameter(torch.zeros(4))
    r = Parameter(torch.zeros(4))
    optimizer = hybridopt.optim.SGD([p, q, r], lr=0.1, max_grad_norm=100.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    scaler.scale(torch.ones(()))
    p.grad = q.grad = torch.full((4,), 8.0 if scaled else 1.0)
    # a GradScaler itself takes no expanded gradient
    r.grad = torch.full((4,), 8.0) if scaled else torch.tensor(1.0).expand(4)
    version = r.grad._version
    scaler.step(optimizer)
    for weight in (p, q, r):
        torch.testing.assert_close(weight.detach(), torch.full((4,), -0.1))
    assert scaled or r.grad._version == version


def test_a_warning_that_is_an_error_leaves_a_whole_step() -> None:
    p, q = Parameter(torch.ones(8)[::2]), Parameter(torch.ones(3))
    optimizer = hybridopt.optim.SGD([p, q], lr=0.1)
    p.grad, q.grad = torch.ones(4), torch.ones(3)
    with pytest.raises(RuntimeWarning, match="has gaps"):  # as everywhere in these tests
        optimizer.step()
    assert p.tolist() == pytest.approx([0.9] * 4)
    assert q.tolist() == pytest.approx([0.9] * 3)


@odd
def test_gradients_that_are_sparse_in_turn_are_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(hybridopt.optim)
    made = []
    parts = hybridopt.optim.SGD._parts
    monkeypatch.setattr(hybridopt.optim.SGD, "_parts", lambda self: made.append(1) or parts(self))  # type: ignore[func-returns-value]
    for k in range(8):
        case.steps(range(k, k + 1), sparse=k % 2 == 0)
    assert len(made) == 2


@odd
def test_what_is_said_follows_the_reason() -> None:
    case = Case(hybridopt.optim)
    case.steps(range(2))
    assert SPARSE in case.optimizer._used
    case.give(2, sparse=False)
    case.params[1].grad = torch.randn(3, 6).t()
    case.optimizer.step()
    assert "laid out unlike" in case.optimizer._used


@odd
def test_a_compensated_odd_weight_keeps_its_states_memory() -> None:
    p = Parameter(torch.ones(8).bfloat16()[::2])
    optimizer = hybridopt.optim.AdamW([p, Parameter(torch.ones(3))], kahan_sum=True)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
        kept = optimizer.state[p]["kahan_comp"]
    optimizer.step()
    assert optimizer.state[p]["kahan_comp"] is kept


# -- complex weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("name", NAMES)
def test_complex_weights_are_compiled_as_pairs_of_real_ones(name: str, dtype: torch.dtype) -> None:
    decay = {} if name == "Rprop" else {"weight_decay": 0.1}
    case = pair(name, shapes=((3, 2), (70_000,), ()), dtype=dtype, **decay)
    both(case, range(6))
    assert case[0]._used == COMPILED
    assert_same(case, 1e-12 if dtype is torch.complex128 else 1e-5)


def test_complex_weights_clipped_and_flat() -> None:
    case = pair("Adam", shapes=((3, 2), (65,)), dtype=torch.complex128)
    torch.manual_seed(1)
    flat = [Parameter(p.detach().clone()) for p in case[1]]
    ours = hybridopt.optim.Adam(flat, flatten=True, max_grad_norm=0.5)
    for k in range(4):
        give(flat, k)
        give(case[3], k)
        norm = torch.nn.utils.clip_grad_norm_(case[3], 0.5)
        assert norm > 0.5
        ours.step()
        case[2].step()
    assert ours._used == COMPILED
    assert flat[0].untyped_storage().data_ptr() == flat[1].untyped_storage().data_ptr()
    assert_same((ours, flat, *case[2:]))


@odd
def test_what_is_conjugated_or_of_another_kind_is_not() -> None:
    def conjugated(g: Tensor) -> Tensor:
        return g.conj()

    case = pair("SGD", dtype=torch.complex128)  # others of torch take no such gradient
    both(case, range(3))
    for change in (conjugated, lambda g: g.conj().resolve_conj()):
        for params in (case[1], case[3]):
            give(params, 7)
            assert params[0].grad is not None
            params[0].grad = change(params[0].grad)
        case[0].step()
        case[2].step()
        assert (case[0]._used == COMPILED) == (change is not conjugated)
        assert_same(case)
