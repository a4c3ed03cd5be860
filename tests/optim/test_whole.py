"""Precision, clipping and non-finite gradients where a step is not elementwise: Adafactor, LAMB, Muon, SparseAdam."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import hybridopt.optim
from hybridopt.engines import _noise
from hybridopt.errors import MethodError, NonFiniteLoss

NAMES = ("Adafactor", "LAMB", "Muon", "SparseAdam")
HALVES = [torch.bfloat16, torch.float16]
SHAPES = ((4, 6), (4, 6), (4, 6), (6, 3), (9, 2))
STATES = {
    "Adafactor": {"row_var", "col_var"},
    "LAMB": {"exp_avg", "exp_avg_sq"},
    "Muon": {"momentum_buffer"},
    "SparseAdam": {"exp_avg", "exp_avg_sq"},
}
# torch's default eps1 is that of a weight's dtype
OPTIONS: dict[str, dict[str, Any]] = {"Adafactor": {"eps": (1e-3, 1e-3)}}
IMPLEMENTATIONS = ["auto", "reference"]


def make(name: str, params: list[Any], **options: Any) -> Any:
    return getattr(hybridopt.optim, name)(params, **{"lr": 0.05, **OPTIONS.get(name, {}), **options})


def weights(dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def give(name: str, params: list[Parameter], k: int, dtype: torch.dtype | None = None) -> None:
    """The gradients of step k, first rounded to `dtype`; sparse ones repeat a row and leave others out."""
    generator = torch.Generator().manual_seed(100 + k)
    for p in params:
        g = torch.randn(p.shape, generator=generator).to(dtype or p.dtype).to(p.dtype)
        if name == "SparseAdam":
            rows = torch.tensor([0, k % len(p), len(p) - 1])
            g = torch.sparse_coo_tensor(rows[None], g[rows], p.shape, check_invariants=True).coalesce()
        p.grad = g


def run(name: str, optimizer: Any, params: list[Parameter], steps: range) -> None:
    for k in steps:
        give(name, params, k)
        optimizer.step()


def bits(optimizer: Any, params: list[Parameter]) -> list[Tensor]:
    states = [v for p in params for _, v in sorted(optimizer.state[p].items()) if isinstance(v, Tensor)]
    return [t.detach().clone() for t in [*params, *states]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype is y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_the_float32_step_rounded(name: str, dtype: torch.dtype, implementation: str) -> None:
    params = weights(dtype)
    optimizer = make(name, params, implementation=implementation)
    run(name, optimizer, params, range(2))
    wide = [Parameter(p.detach().float()) for p in params]
    reference = make(name, wide, implementation=implementation)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in wide:  # loading casts to the weight's dtype
        assert all(reference.state[p][key].dtype is torch.float32 for key in STATES[name])
    give(name, params, 2)
    give(name, wide, 2, dtype)
    optimizer.step()
    reference.step()
    for p, q in zip(params, wide, strict=True):
        assert torch.equal(p.detach(), q.detach().to(dtype))
        for key in STATES[name]:
            assert optimizer.state[p][key].dtype is dtype
            assert torch.equal(optimizer.state[p][key], reference.state[q][key].to(dtype)), key


@pytest.mark.parametrize("name", ["Adafactor", "SparseAdam"])
@pytest.mark.parametrize("dtype", HALVES)
def test_error_is_at_most_twice_torchs(name: str, dtype: torch.dtype) -> None:
    """Against float64 (STYLE: err(ours) <= 2 err(torch in this dtype) + a unit in the last place)."""
    exact = [Parameter(p.detach().double()) for p in weights(dtype)]
    ours, theirs = weights(dtype), weights(dtype)
    options = {"lr": 0.05, **OPTIONS.get(name, {})}
    cls = getattr(torch.optim, name)
    pairs = [(make(name, ours), ours), (cls(theirs, **options), theirs), (cls(exact, **options), exact)]
    for k in range(10):
        for optimizer, params in pairs:
            give(name, params, k, dtype)
            optimizer.step()
    for p, q, e in zip(ours, theirs, exact, strict=True):
        errors = [(x.detach().double() - e.detach()).abs().mean() for x in (p, q)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps


def test_adafactors_eps_is_that_of_the_weights() -> None:
    """torch takes `eps1=None` from the dtype of the weight, not from that of the arithmetic."""
    results = []
    for eps in (None, torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float32).eps):
        params = weights(torch.bfloat16)
        optimizer = make("Adafactor", params, eps=(eps, 1e-3))
        for k in range(3):
            give("Adafactor", params, k)
            for p in params:
                assert p.grad is not None
                p.grad *= 1e-3
            optimizer.step()
        results.append(bits(optimizer, params))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("weight", "state"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float32)],
)
@pytest.mark.parametrize("name", NAMES)
def test_state_dtype_is_kept(name: str, weight: torch.dtype, state: torch.dtype, implementation: str) -> None:
    """From the first step on, and by a checkpoint, from which the run goes on bit for bit."""
    params = weights(weight)
    optimizer = make(name, params, state_dtype=state, implementation=implementation)
    run(name, optimizer, params, range(3))
    assert {optimizer.state[p][key].dtype for p in params for key in STATES[name]} == {state}
    assert not {"kahan_comp", "weight"} & set(optimizer.state[params[0]])
    others = [Parameter(p.detach().clone()) for p in params]
    second = make(name, others, state_dtype=state, implementation=implementation)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(bits(optimizer, params), bits(second, others))
    run(name, optimizer, params, range(3, 5))
    run(name, second, others, range(3, 5))
    assert same(bits(optimizer, params), bits(second, others))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("option", ["state_dtype", "stochastic_rounding", "kahan_sum"])
def test_rows_are_torchs_step_on_wide_copies(option: str, dtype: torch.dtype) -> None:
    """All but a few last digits: by the same noise, which goes by the place of an element in the whole table."""
    results: list[list[Tensor]] = []
    for implementation in IMPLEMENTATIONS:
        params = [*weights(dtype), Parameter(torch.randn(3, 5, 4).to(dtype).mT)]
        torch.manual_seed(0)
        params[-1].data = torch.randn(3, 5, 4).to(dtype).mT
        value: Any = torch.float32 if option == "state_dtype" else True
        optimizer = make("SparseAdam", params, implementation=implementation, **{option: value})
        run("SparseAdam", optimizer, params, range(4))
        if option == "kahan_sum":  # what was lost is in another last digit where the weight is
            wide = [p.detach().float() + optimizer.state[p].pop("kahan_comp").float() for p in params]
            results.append([*wide, *(optimizer.state[p]["exp_avg"] for p in params)])
        else:
            results.append(bits(optimizer, params))
        for a, b in zip(results[0], results[-1], strict=True):
            assert a.dtype is b.dtype
            if a.dtype is torch.float32:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            else:
                assert (a != b).sum() <= 1


def test_noise_of_gradients_that_index_several_dimensions() -> None:
    results = []
    for implementation in IMPLEMENTATIONS:
        p = Parameter(torch.linspace(-1, 1, 60).view(3, 4, 5).bfloat16())
        optimizer = make("SparseAdam", [p], implementation=implementation, stochastic_rounding=True)
        for k in range(3):
            at = torch.tensor([[0, 2, 2], [1, 3, k]])
            values = torch.linspace(-1, 2, 15).view(3, 5).bfloat16()
            p.grad = torch.sparse_coo_tensor(at, values, p.shape, check_invariants=True)
            optimizer.step()
        results.append(bits(optimizer, [p]))
    assert same(*results)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_small_updates_are_not_lost(name: str, half: torch.dtype) -> None:
    """Rounded to nearest they never move a weight; at random they do, on average by all; with compensation exactly."""
    moved: dict[str, float] = {}
    options: dict[str, dict[str, Any]] = {
        "nearest": {},
        "random": {"stochastic_rounding": True},
        "other seed": {"stochastic_rounding": True, "seed": 1},
        "kahan": {"kahan_sum": True},
    }
    extra: dict[str, Any] = {"weight_decay": 0.0} if name in ("LAMB", "Muon") else {}
    if name == "Adafactor":
        extra = {"eps": (1e-8, 1e-8)}
    if name == "Muon":  # its iteration makes much of the noise in a momentum that is rounded
        extra["state_dtype"] = torch.float32
    kinds: dict[str, Any] = {key: (half, value) for key, value in options.items()}
    kinds["float32"] = torch.float32, {}
    ends = {}
    for key, (dtype, given) in kinds.items():
        p = Parameter(torch.ones(64, 64, dtype=dtype))
        # a sixteenth of a digit; Muon's steps of a matrix of equal entries are 1/64 of the rate in each
        lr = torch.finfo(half).eps / 32 * (64 if name == "Muon" else 1)
        optimizer = make(name, [p], **{"lr": lr, **extra, **given})
        for _ in range(30):
            g = torch.ones(64, 64, dtype=dtype)
            p.grad = g.to_sparse(1) if name == "SparseAdam" else g
            optimizer.step()
        told = p.detach().double() + optimizer.state[p].get("kahan_comp", torch.zeros(())).double()
        moved[key] = (1 - told).mean().item()
        ends[key] = p.detach().clone()
    assert moved["nearest"] == 0
    assert moved["float32"] > 0
    assert moved["random"] == pytest.approx(moved["float32"], rel=0.06)
    assert moved["kahan"] == pytest.approx(moved["float32"], rel=0.03)
    assert not torch.equal(ends["random"], ends["other seed"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_no_noise_is_used_twice(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and states of all tensors have their own; equal weights with equal gradients go apart."""
    seen: list[tuple[int, ...]] = []
    key = _noise.key
    monkeypatch.setattr(_noise, "key", lambda *at: seen.append(at) or key(*at))  # type: ignore[func-returns-value]
    params = weights(torch.bfloat16)
    groups: Any = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = make(name, groups, stochastic_rounding=True, seed=4, implementation=implementation)
    run(name, optimizer, params, range(2))
    assert len(set(seen)) == len(seen)
    compiled = (name, implementation) == ("SparseAdam", "auto")  # the loop has its own way to the same noise
    assert {at for at in seen if at[3] == 0} == {
        (4, step, number, 0) for step in (1, 2) for number in range(0 if compiled else len(params))
    }
    twins = [Parameter(torch.linspace(1, 2, 512).view(16, 32).bfloat16()) for _ in range(2)]
    optimizer = make(name, twins, stochastic_rounding=True, implementation=implementation)
    for p in twins:
        g = torch.linspace(-1, 2, 512).view(16, 32).bfloat16()
        p.grad = g.to_sparse(1) if name == "SparseAdam" else g
    optimizer.step()
    assert not torch.equal(*twins)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{"stochastic_rounding": True, "seed": 5}, {"kahan_sum": True}])
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    params = weights(dtype)
    optimizer = make(name, params, **options)
    run(name, optimizer, params, range(3))
    others = [Parameter(p.detach().clone()) for p in params]
    second = make(name, others, **options)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied, pickled = copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))
    for ps, o in ((params, optimizer), (others, second), copied, pickled):
        run(name, o, ps, range(3, 5))
        assert same(bits(o, ps), bits(optimizer, params))


# -- clipping and numbers that are not finite ---------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_torchs(name: str, dtype: torch.dtype, limit: float, implementation: str) -> None:
    """As after clip_grad_norm_ (which refuses sparse gradients: by hand), over two groups; gradients stay."""
    results = []
    for inside in (True, False):
        params = weights(dtype)
        groups: Any = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
        extra = {"max_grad_norm": limit} if inside else {}
        optimizer = make(name, groups, implementation=implementation, **extra)
        for k in range(3):
            give(name, params, k)
            kept = [p.grad.clone() for p in params if p.grad is not None]
            if not inside:
                grads = [p.grad for p in params if p.grad is not None]
                dense = [g.to_dense().double() for g in grads]
                norm = math.sqrt(sum(g.square().sum().item() for g in dense))
                for p, g in zip(params, grads, strict=True):
                    p.grad = g * min(1.0, limit / (norm + 1e-6))
            optimizer.step()
            if inside:
                assert all(
                    torch.equal(p.grad.to_dense(), g.to_dense())
                    for p, g in zip(params, kept, strict=True)
                    if p.grad is not None
                )
        results.append(params)
    tol = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    if name == "Muon":  # its iteration is in bfloat16, where gradients that differ in the last bit go apart
        tol = max(tol, 2e-3)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", NAMES)
def test_clipping_changes_the_path(name: str) -> None:
    """Adam's kin divide a constant factor out; where it changes from step to step they cannot."""
    ends = []
    for options in ({}, {"max_grad_norm": 2.0}):
        params = weights(torch.float32)
        optimizer = make(name, params, **options)
        for k in range(3):
            give(name, params, k)
            for p in params:
                assert p.grad is not None
                p.grad = p.grad * 10.0**k
            optimizer.step()
        ends.append(params)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(*ends, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_skip_and_count(name: str, bad: float, implementation: str) -> None:
    params = weights(torch.float32)
    optimizer = make(name, params, nonfinite="skip", implementation=implementation)
    run(name, optimizer, params, range(2))
    before = bits(optimizer, params)
    give(name, params, 2)
    assert params[1].grad is not None
    params[1].grad = params[1].grad * bad
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same(before, bits(optimizer, params))
    assert pickle.loads(pickle.dumps(optimizer)).skipped_steps == 1
    run(name, optimizer, params, range(3, 4))
    assert optimizer.skipped_steps == 1
    assert not torch.equal(before[0], params[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_raise_names_the_weight(name: str, implementation: str) -> None:
    params = weights(torch.float32)
    named = [(f"layer{i}", p) for i, p in enumerate(params)]
    optimizer = make(name, named, nonfinite="raise", implementation=implementation)
    run(name, optimizer, params, range(2))
    before = bits(optimizer, params)
    give(name, params, 2)
    assert params[3].grad is not None
    params[3].grad = params[3].grad * math.nan
    with pytest.raises(NonFiniteLoss, match=f"{name}: expected finite gradients, that of weight 'layer3'"):
        optimizer.step()
    assert same(before, bits(optimizer, params))


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_refused(name: str) -> None:
    params = weights(torch.float32)
    with pytest.raises(
        MethodError, match=f"{name}: flatten is for steps that are elementwise, and this one is not"
    ):
        make(name, params, flatten=True)
    with pytest.raises(MethodError, match=f"{name}: unknown option rounding"):
        make(name, params, rounding=True)
    with pytest.raises(MethodError, match=f"{name}: expected max_grad_norm > 0, got -1"):
        make(name, params, max_grad_norm=-1)
