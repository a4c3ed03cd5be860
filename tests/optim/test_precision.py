"""16-bit weights, chosen state dtypes, rounding at random, Kahan compensation."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import hybridopt.optim
from hybridopt.engines import _noise
from hybridopt.errors import MethodError
from tests.optim.side_by_side import COMPILED, odd
from tests.optim.side_by_side import NAMES as ELEMENTWISE

HALVES = [torch.bfloat16, torch.float16]
NAMES = [*ELEMENTWISE, "Lion", "ADOPT", "Adan"]
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "Adagrad": {"lr": 0.1}}


def make(name: str, params: list[Tensor], **options: Any) -> Any:
    return getattr(hybridopt.optim, name)(params, **{"lr": 0.01, **OPTIONS.get(name, {}), **options})


def weights(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 7), (3,), (1,), (64, 33)]
    return [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer: Any, params: list[Tensor], steps: range) -> None:
    for step in steps:
        give(params, step)
        optimizer.step()


def bits(params: list[Tensor], optimizer: Any) -> list[Tensor]:
    states = [v for p in params for k, v in sorted(optimizer.state[p].items()) if isinstance(v, Tensor)]
    return [t.detach().clone() for t in [*params, *states]]


# -- arithmetic in float32 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_the_float32_step_rounded(name: str, dtype: torch.dtype) -> None:
    """From any 16-bit state a step gives exactly torch's float32 step of the same numbers, rounded once."""
    mine = weights(dtype)
    optimizer = make(name, mine)
    run(optimizer, mine, range(3))
    for step in range(3, 6):
        wide = [Parameter(p.detach().float()) for p in mine]
        reference = make(name, wide, implementation="reference")
        for p, q in zip(mine, wide, strict=True):
            for key, value in optimizer.state[p].items():
                reference.state[q][key] = value.float() if value.shape == p.shape else value.clone()
        give(mine, step)
        for p, q in zip(mine, wide, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
        assert optimizer._used == COMPILED
        for p, q in zip(mine, wide, strict=True):
            close(p, q, dtype)
            for key, value in optimizer.state[p].items():
                close(value, reference.state[q][key], dtype)


def close(stored: Tensor, wide: Tensor, dtype: torch.dtype) -> None:
    """Equal after rounding, up to ties that float32's last digit turned over (at most one number in 500)."""
    wrong = stored.detach() != wide.detach().to(stored.dtype)
    assert wrong.sum() <= max(1, stored.numel() // 500)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(stored.float(), wide.detach().float(), rtol=1.01 * eps, atol=1e-7)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_wide_copies(name: str, dtype: torch.dtype) -> None:
    """The compiled loop and torch's code on float32 copies do the same; both are reached by `implementation`."""
    results = []
    for implementation in ("auto", "reference"):
        params = weights(dtype)
        optimizer = make(name, params, implementation=implementation)
        run(optimizer, params, range(5))
        results.append(params)
        assert (optimizer._used == COMPILED) == (implementation == "auto")
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", ["Adam", "SGD", "Lion", "Rprop"])
def test_special_numbers_survive(name: str) -> None:
    """Infinite and nan weights and gradients stay what float32 makes of them."""
    for dtype in HALVES:
        p = Parameter(torch.tensor([1.0, float("inf"), float("nan"), 2.0, -1.0, 1.0], dtype=dtype))
        optimizer = make(name, [p], stochastic_rounding=True)
        for _ in range(3):
            p.grad = torch.tensor([1.0, 1.0, 1.0, float("nan"), float("inf"), 0.0], dtype=dtype)
            optimizer.step()
        assert optimizer._used == COMPILED
        assert bool(torch.isnan(p[2]))
        assert bool(torch.isinf(p[1]))
        assert bool(torch.isfinite(p[0]))
        assert bool(torch.isfinite(p[5]))
        if name in ("Adam", "SGD"):  # the others go by signs, and nan has none
            assert not bool(torch.isfinite(p[3]))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("name", [*NAMES[:11], "Adafactor", "Muon"])
def test_error_is_at_most_twice_torchs(name: str, dtype: torch.dtype) -> None:
    """Against float64 from the same start and gradients, over odd, empty and non-contiguous weights."""
    if name == "Muon":  # matrices alone; its iteration is in bfloat16 for all dtypes, as torch's is
        sizes = [torch.randn(n, m) for n, m in ((1, 1), (1, 127), (63, 29))] + [torch.randn(33, 65).t()]
    else:
        sizes = [torch.randn(n) for n in (1, 127, 1823)] + [torch.randn(33, 65).t()]
        sizes += [torch.randn(0)] if name != "Adafactor" else []  # on which torch's divides by zero

    def run_in(package: Any, kind: torch.dtype) -> list[Tensor]:
        params = [Parameter(t.to(dtype).to(kind)) for t in sizes]
        optimizer = getattr(package, name)(params, **{"lr": 0.01, **OPTIONS.get(name, {})})
        for step in range(10):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator).to(dtype))
            optimizer.step()
        return [p.detach().double() for p in params]

    exact = run_in(torch.optim, torch.float64)
    mine, torchs = (
        sum((a - b).square().sum().item() for a, b in zip(run_in(package, dtype), exact, strict=True)) ** 0.5
        for package in (hybridopt.optim, torch.optim)
    )
    assert mine <= 2 * torchs + 1e-9


# -- state dtype ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "state"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Rprop", "NAdam", "Lion", "Adagrad"])
def test_state_dtype_is_kept(name: str, weight: torch.dtype, state: torch.dtype, implementation: str) -> None:
    """By the first step, the compiled ones, a checkpoint, and torch's own cast on loading."""
    params = weights(weight)
    optimizer = make(name, params, state_dtype=state, implementation=implementation)
    run(optimizer, params, range(3))
    assert (optimizer._used == COMPILED) == (implementation == "auto")
    kept = [v for p in params for v in optimizer.state[p].values() if v.shape == p.shape and v.dim() > 1]
    assert kept
    assert all(v.dtype is state for v in kept)
    others = [Parameter(p.detach().clone()) for p in params]
    second = make(name, others, state_dtype=state, implementation=implementation)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(bits(params, optimizer), bits(others, second), strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)
    run(optimizer, params, range(3, 6))
    run(second, others, range(3, 6))
    for a, b in zip(bits(params, optimizer), bits(others, second), strict=True):
        assert torch.equal(a, b)


def test_wide_states_of_narrow_weights_are_not_cut_by_loading() -> None:
    """torch would cast the float32 states of a bfloat16 weight to bfloat16."""
    params = weights(torch.bfloat16)
    optimizer = make("Adam", params, state_dtype=torch.float32)
    run(optimizer, params, range(3))
    plain = make("Adam", [Parameter(p.detach().clone()) for p in params])
    plain.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, plain.param_groups[0]["params"], strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], plain.state[q]["exp_avg"])
    torchs = torch.optim.Adam(params)
    torchs.load_state_dict(optimizer.state_dict())
    assert torchs.state[params[0]]["exp_avg"].dtype is torch.bfloat16


# -- rounding at random ---------------------------------------------------------------------------------------


def edges() -> Tensor:
    """float32 numbers of any bits, and those around each at which something about float16 changes."""
    generator = torch.Generator().manual_seed(0)
    places = [
        0.0,
        *(2.0**k for k in (-126, -41, -40, -26, -25, -24, -15, -14, 0, 16)),
        65504,
        65520,
        math.inf,
    ]
    around = torch.tensor(places).view(torch.int32)[:, None] + torch.arange(-9, 10)
    bits = [around[around >= 0], torch.randint(0, 1 << 31, (2000,), generator=generator)]
    spread = torch.tensor([2.0**-22, 2.0**-13, 4.0, 66_000.0])[:, None] * torch.rand(
        4, 500, generator=generator
    )
    sizes = torch.cat([*bits, spread.view(torch.int32).ravel()]).to(torch.int32)
    return torch.cat([sizes, sizes | -(1 << 31)]).view(torch.float32)


def _keep(p: Any, g: Any, kept: Any, lr: Any) -> tuple[Any, ...]:
    return p, g * lr


def stored(x: Tensor, dtype: torch.dtype, implementation: str, seed: int) -> tuple[Tensor, str]:
    """What the second step of an engine stores for given float32 numbers, and what ran it."""
    cls: Any = hybridopt.optim.from_rule(_keep, state=["kept"], defaults={"lr": 1.0})
    p = Parameter(torch.zeros_like(x))
    options: dict[str, Any] = {"state_dtype": dtype, "seed": seed, "implementation": implementation}
    optimizer = cls([p], stochastic_rounding=True, **options)
    for _ in range(2):
        p.grad = x.clone()
        optimizer.step()
    return optimizer.state[p]["kept"], optimizer._used


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """But for which nan it is."""
    assert a.dtype is b.dtype
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(
        *(x.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).view(torch.int16) for x in (a, b))
    )


@pytest.mark.parametrize(("dtype", "flush"), [*((dtype, False) for dtype in HALVES), (torch.float16, True)])
def test_every_number_is_rounded_alike_in_all_engines(dtype: torch.dtype, flush: bool) -> None:
    """In float16 also where the processor takes float32's smallest numbers (below 1e-38) for 0."""
    x = edges()
    told = _noise.rounded(x, dtype, _noise.key(3, 2, 0, 1))
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this processor does not")
    try:
        assert_same_bits(told, _noise.rounded(x, dtype, _noise.key(3, 2, 0, 1)))
        for implementation in ("auto", "foreach", "reference"):
            kept, used = stored(x, dtype, implementation, seed=3)
            assert (used == COMPILED) == (implementation == "auto")
            assert_same_bits(told, kept)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", HALVES)
def test_hash_is_the_same_in_all_engines(dtype: torch.dtype) -> None:
    """The compiled loop's bits are the Python ones: weights and states, several tensors, several steps."""
    results = []
    for implementation in ("auto", "reference", "foreach"):
        params = weights(dtype)
        optimizer = make(
            "SGD",
            params,
            momentum=0.5,
            lr=0.25,
            stochastic_rounding=True,
            seed=7,
            implementation=implementation,
        )
        run(optimizer, params, range(6))
        results.append(bits(params, optimizer))
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_key_depends_on_everything() -> None:
    keys = {_noise.key(*k) for k in np.ndindex(4, 5, 6, 3)}
    for seed, step, tensor, column in ((0, 1, 2, 0), (2**32 - 1, 2**30, 7 + 3 * _noise.GOLDEN, 2)):
        counted = _noise.key(seed, torch.tensor(step), tensor, column)
        assert int(counted) == _noise.key(seed, step, tensor, column)
    assert len(keys) == 4 * 5 * 6 * 3
    x = torch.full((4000,), 1 + 2**-9)
    streams = [_noise.rounded(x, torch.bfloat16, _noise.key(0, 1, 2, c)) for c in range(2)]
    same = (streams[0] == streams[1]).double().mean().item()
    assert abs(same - 0.625) < 0.04  # independent: .75² + .25²


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers of a dtype below and above, and how far they are from each other."""
    info = torch.finfo(dtype)
    spacing = info.eps * max(info.tiny, 2.0 ** (math.frexp(x)[1] - 1))
    return math.floor(x / spacing) * spacing, spacing


BETWEEN = [
    *((torch.bfloat16, x) for x in (1 + 2**-9, -(1 + 2**-9), 3.1415927, -1e-30, 7e30)),
    *((torch.float16, x) for x in (1 + 2**-12, -(1 + 2**-12), 3.1415927, 65_490.0, -6.2e-5)),
    *(
        (torch.float16, x)
        for x in (6.1e-5, -6.1e-5, 1e-6, -1e-7, 3e-8, 2.0**-25, -(2.0**-30), 1.1 * 2.0**-38)
    ),
]


@pytest.mark.parametrize(("dtype", "value"), BETWEEN)
def test_right_on_average(dtype: torch.dtype, value: float) -> None:
    n = 1 << 16
    x = torch.full((n,), value)
    told = _noise.rounded(x, dtype, _noise.key(3, 1, 0, 0)).double()
    below, spacing = neighbours(x[0].item(), dtype)
    assert {*told.tolist()} <= {below, below + spacing}
    wanted = (x[0].item() - below) / spacing
    share = (told != below).double().mean().item()
    assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / n) ** 0.5 + 2**-16


@pytest.mark.parametrize(("dtype", "value"), BETWEEN)
def test_exact_mean_over_all_noise(dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every 16-bit number once; what is below float16's smallest normal number to 2**-16 of its spacing."""
    monkeypatch.setattr(_noise, "mix", lambda x: x)
    x = torch.full((1 << 16,), value)
    told = _noise.rounded(x, dtype, 0).double()
    _, spacing = neighbours(x[0].item(), dtype)
    exact = dtype is torch.bfloat16 or abs(value) >= 2**-14
    assert abs(told.mean().item() - x[0].item()) <= (0 if exact else 2**-16 * spacing)


@pytest.mark.parametrize("dtype", HALVES)
def test_nan_of_any_bits_stays_nan(dtype: torch.dtype) -> None:
    """Added noise would carry all ones into the sign, and cutting would make some an infinity."""
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1] * 50, dtype=torch.int32)
    assert bool(_noise.rounded(bits.view(torch.float32), dtype, 5).isnan().all())
    p = Parameter(torch.zeros(150))
    optimizer = make("SGD", [p], stochastic_rounding=True, state_dtype=dtype)
    for step in range(2):
        p.grad = torch.zeros(150) if step == 0 else bits.view(torch.float32).clone()
        optimizer.step()
    assert optimizer._used == COMPILED
    assert bool(optimizer.state[p]["momentum_buffer"].isnan().all())


def test_float16_overflows_where_nearest_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 65520 it is 65504 at most, whatever the noise."""
    x = torch.linspace(65_472, 65_600, 4097)
    x = torch.cat([x, -x, torch.tensor([math.inf, -math.inf])])
    for noise in (0, 0xFFFF):
        monkeypatch.setattr(_noise, "mix", lambda x, noise=noise: torch.full_like(x, noise))
        told = _noise.rounded(x, torch.float16, 0)
        assert torch.equal(told.isinf(), x.half().isinf())
        assert torch.equal(told.sign(), x.half().sign())
        assert torch.equal(told[x.abs() >= 65_504], x.half()[x.abs() >= 65_504])


def test_noise_is_the_same_for_any_number_of_threads() -> None:
    """Also in the second piece of a tensor."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # the fixture of all tests puts it back
        p = Parameter(torch.ones(300_001, dtype=torch.bfloat16))
        optimizer = make("SGD", [p], lr=1.0, momentum=0.0, stochastic_rounding=True)
        for _ in range(2):
            p.grad = torch.full_like(p, 1e-3)
            optimizer.step()
        assert optimizer._used == COMPILED
        results.append(p.detach().clone())
    torch.set_num_threads(1)
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, infinities and -0 too."""
    halves = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    assert_same_bits(_noise.rounded(halves.float(), dtype, 5), halves)
    monkeypatch.setattr(_noise, "mix", lambda x: torch.full_like(x, 0xFFFF))
    assert_same_bits(_noise.rounded(halves.float(), dtype, 0), halves)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
def test_small_updates_are_not_lost(name: str, dtype: torch.dtype) -> None:
    """Updates of a sixteenth of a digit: rounding to nearest never moves, at random it does, on average by all."""
    moved, lr = [], torch.finfo(dtype).eps / 32
    for stochastic in (False, True):
        p = Parameter(torch.ones(4096, dtype=dtype))
        optimizer = make(
            name,
            [p],
            lr=lr,
            stochastic_rounding=stochastic,
            **({"momentum": 0.0} if name == "SGD" else {"weight_decay": 0.0}),
        )
        for _ in range(40):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved.append((1 - p.detach().double()).mean().item())
    assert moved[0] == 0
    assert moved[1] == pytest.approx(40 * lr, rel=0.05)


@pytest.mark.parametrize("dtype", HALVES)
def test_seed_and_checkpoint(dtype: torch.dtype) -> None:
    def path(seed: int, stop: int | None = None) -> list[Tensor]:
        params = weights(dtype)
        optimizer = make("SGD", params, stochastic_rounding=True, seed=seed)
        for step in range(8):
            if step == stop:
                params = [Parameter(p.detach().clone()) for p in params]
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = make("SGD", params, stochastic_rounding=True, seed=seed)
                optimizer.load_state_dict(saved)
            run(optimizer, params, range(step, step + 1))
        return bits(params, optimizer)

    first = path(1)
    assert all(torch.equal(a, b) for a, b in zip(first, path(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, path(2), strict=True))
    for stop in (1, 2, 5):
        assert all(torch.equal(a, b) for a, b in zip(first, path(1, stop), strict=True))


# -- Kahan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("dtype", HALVES)
def test_kahan_follows_float32(dtype: torch.dtype, implementation: str) -> None:
    """Weight plus compensation walks with float32 weights whose gradients are the same, to 16 digits."""
    narrow, wide = weights(dtype), [Parameter(p.detach().float()) for p in weights(dtype)]
    options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
    mine = make(
        "SGD", narrow, kahan_sum=True, state_dtype=torch.float32, implementation=implementation, **options
    )
    reference = torch.optim.SGD(wide, **options)
    plain_params = weights(dtype)
    plain = make("SGD", plain_params, state_dtype=torch.float32, **options)
    for step in range(60):
        give(narrow, step)
        for p, q, r in zip(narrow, wide, plain_params, strict=True):
            assert p.grad is not None
            q.grad, r.grad = p.grad.float(), p.grad.clone()
        for optimizer in (mine, reference, plain):
            optimizer.step()
    assert mine.state[narrow[0]]["kahan_comp"].dtype is dtype
    errors, lost = [], []
    for p, q, r in zip(narrow, wide, plain_params, strict=True):
        told = p.detach().float() + mine.state[p]["kahan_comp"].float()
        errors.append((told - q.detach()).abs().max().item())
        lost.append((r.detach().float() - q.detach()).abs().max().item())
    assert max(errors) < 3e-4
    assert max(lost) > 10 * max(errors)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("dtype", HALVES)
def test_overflow_under_kahan_is_infinite(dtype: torch.dtype, implementation: Any) -> None:
    """As without it, not nan: what an overflow took is nothing that could be added back."""
    p = Parameter(torch.full((3,), torch.finfo(dtype).max).to(dtype))
    optimizer = hybridopt.optim.SGD([p], lr=1.0, kahan_sum=True, implementation=implementation)
    for _ in range(4):
        p.grad = torch.full_like(p, -torch.finfo(dtype).max)
        optimizer.step()
    assert p.isposinf().all()
    assert not optimizer.state[p]["kahan_comp"].any()


def test_kahan_survives_a_checkpoint() -> None:
    params = weights(torch.bfloat16)
    optimizer = make("AdamW", params, kahan_sum=True)
    run(optimizer, params, range(4))
    others = [Parameter(p.detach().clone()) for p in params]
    second = make("AdamW", others, kahan_sum=True)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, range(4, 7))
    run(second, others, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(bits(params, optimizer), bits(others, second), strict=True))


# -- around it ------------------------------------------------------------------------------------------------


def test_error_restores_weights_gradients_and_states(monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights(torch.bfloat16)
    optimizer = make("Adam", params, implementation="reference")
    run(optimizer, params, range(2))
    before = bits(params, optimizer)
    give(params, 2)
    grads = [p.grad for p in params]

    def fail() -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].add_(1)
        raise RuntimeError("torch's own step")

    monkeypatch.setattr(optimizer, "_torch_step", fail)
    with pytest.raises(RuntimeError, match="own step"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, bits(params, optimizer), strict=True))
    assert all(p.dtype is torch.bfloat16 for p in params)
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))


def test_hooks_on_gradients_survive() -> None:
    """DDP's hang on the node that writes `.grad`, of which autograd makes another if a weight changes its dtype."""
    for options in ({}, {"implementation": "reference"}, {"max_grad_norm": 1.0, "kahan_sum": True}):
        p = Parameter(torch.ones(3, dtype=torch.bfloat16))
        node = p.expand_as(p).grad_fn.next_functions[0][0]
        called = []
        node.register_hook(lambda *_, called=called: called.append(1))
        optimizer = make("Adam", [p], **options)
        for step in range(3):
            optimizer.zero_grad()
            (p.float() ** 2).sum().backward()
            optimizer.step()
            assert len(called) == step + 1


@odd
def test_sparse_gradients_of_16_bit_weights() -> None:
    """As torch's step on float32 copies, rounded."""
    dense = [Parameter(torch.linspace(-1, 1, 10).reshape(5, 2).bfloat16()) for _ in range(2)]
    mine, plain = make("SGD", dense[:1], momentum=0.0), make("SGD", dense[1:], momentum=0.0)
    for _ in range(3):
        rows, values = torch.tensor([[1, 1, 3]]), torch.randn(3, 2).bfloat16()
        g = torch.sparse_coo_tensor(rows, values, (5, 2), check_invariants=True)
        dense[0].grad = g
        dense[1].grad = g.float().to_dense().bfloat16()
        mine.step()
        plain.step()
    assert "sparse" in mine._used
    torch.testing.assert_close(dense[0], dense[1], rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam", "ASGD", "Lion"])
def test_gradients_that_come_late(name: str) -> None:
    """A frozen weight joins, another leaves, a group is added: every engine's bits, and each weight's own count."""
    results = []
    for implementation in ("auto", "reference"):
        params = [*weights(torch.bfloat16), Parameter(torch.tensor(0.5, dtype=torch.bfloat16))]
        optimizer = make(
            name, params[1:], kahan_sum=True, stochastic_rounding=True, implementation=implementation
        )
        for step in range(8):
            if step == 4:
                optimizer.add_param_group({"params": [params[0]], "lr": 0.02})
            give(params, step)
            if step < 2:
                params[1].grad = None
            if step >= 6:
                params[2].grad = None
            optimizer.step()
        if implementation == "auto":
            assert optimizer._used == COMPILED
        assert [optimizer.state[p]["step"].item() for p in params] == [4, 6, 6, 8, 8]
        results.append(bits(params, optimizer))
    for a, b in zip(*results, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-6, atol=1e-5)
        assert (a != b).sum() <= max(1, a.numel() // 200)


@odd
@pytest.mark.parametrize("dtype", HALVES)
def test_places_are_places_in_memory(dtype: torch.dtype) -> None:
    """channels_last, transposed: the same noise in all engines; with gaps, which only copies can do: as without."""
    results = []
    layouts = [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(1, 3),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
        lambda x: x,
    ]
    for implementation in ("auto", "reference"):
        for layout in layouts:
            start = torch.randn(2, 3, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
            p = Parameter(layout(start.clone()))
            optimizer = make("SGD", [p], lr=0.25, stochastic_rounding=True, implementation=implementation)
            for step in range(4):
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
                p.grad = torch.empty_like(p).copy_(g)
                optimizer.step()
            results.append(p.detach().clone())
    gaps, plain = results[2], results[3]
    assert torch.equal(gaps, plain)
    for a, b in zip(results[:4], results[4:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_options_that_change_nothing_cost_nothing(dtype: torch.dtype) -> None:
    """Rounding at random is for 16 bits: steps of other weights are the same, and compiled from the second on."""
    results = []
    for stochastic in (False, True):
        params = weights(dtype)
        optimizer = make("SGD", params, stochastic_rounding=stochastic)
        run(optimizer, params, range(3))
        assert optimizer._used == COMPILED
        results.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compensation_that_is_not_asked_for_stays() -> None:
    """Loaded from an optimizer with kahan_sum into one without."""
    params = weights(torch.bfloat16)
    optimizer = make("Adam", params, kahan_sum=True)
    run(optimizer, params, range(2))
    for implementation in ("auto", "reference"):
        others = [Parameter(p.detach().clone()) for p in params]
        second = make("Adam", others, implementation=implementation)
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(second, others, range(2, 4))
        for p, q in zip(params, others, strict=True):
            told = second.state[q]["kahan_comp"]
            assert told.dtype is torch.bfloat16
            assert torch.equal(told, optimizer.state[p]["kahan_comp"])


def test_checkpoints_between_torch_and_stochastic_sgd() -> None:
    """torch ignores the further `step`; from torch's states the count begins at 0."""
    params = weights(torch.bfloat16)
    optimizer = make("SGD", params, stochastic_rounding=True)
    run(optimizer, params, range(3))
    torchs: Any = torch.optim.SGD([Parameter(p.detach().clone()) for p in params], lr=0.01, momentum=0.9)
    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(torchs, torchs.param_groups[0]["params"], range(3, 5))
    others = [Parameter(p.detach().clone()) for p in params]
    plain: Any = torch.optim.SGD(others, lr=0.01, momentum=0.9)
    run(plain, others, range(2))
    back = make("SGD", others, stochastic_rounding=True)
    back.load_state_dict(copy.deepcopy(plain.state_dict()))
    run(back, others, range(2, 5))
    assert back._used == COMPILED
    assert all(back.state[p]["step"].item() == 3 for p in others)


def test_differentiable() -> None:
    """torch's own code, also of 16-bit weights; refused where copies would cut the graph."""
    lr = torch.tensor(0.5, requires_grad=True)
    for dtype in (torch.bfloat16, torch.float32):
        p = torch.ones(2, dtype=dtype, requires_grad=True)
        q = p.clone()
        optimizer = make("SGD", [p], differentiable=True)
        optimizer.param_groups[0].update(params=[q], lr=lr, foreach=False, momentum=0.0)
        q.grad = p * 2
        optimizer.step()
        (gradient,) = torch.autograd.grad(q.sum(), [lr])
        assert gradient.item() == -4
    for options in ({"max_grad_norm": 1.0}, {"kahan_sum": True}, {"state_dtype": torch.bfloat16}):
        optimizer = make("SGD", weights(torch.float32), differentiable=True, **options)
        give(optimizer.param_groups[0]["params"], 0)
        with pytest.raises(MethodError, match="differentiable=True cannot be joined"):
            optimizer.step()


def test_no_group_key_is_added() -> None:
    mine = make("Adam", weights(torch.bfloat16), state_dtype=torch.float32, kahan_sum=True, seed=3)
    theirs = torch.optim.Adam(weights(torch.bfloat16), lr=0.01)
    assert set(mine.state_dict()["param_groups"][0]) == set(theirs.state_dict()["param_groups"][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": torch.int32}, "expected state_dtype to be a torch float dtype"),
        ({"max_grad_norm": 0.0}, "expected max_grad_norm > 0"),
        ({"max_grad_norm": math.inf}, "expected max_grad_norm > 0"),
        ({"max_grad_norm": True}, "expected max_grad_norm > 0, got True"),
        ({"max_grad_norm": "1"}, "expected max_grad_norm > 0, got '1'"),
        ({"max_grad_norm": [1.0]}, "expected max_grad_norm > 0, got \\[1.0\\]"),
        ({"seed": True}, "expected seed to be a whole number"),
        ({"nonfinite": "stop"}, "expected nonfinite to be ignore, skip or raise"),
        ({"seed": 0.5}, "expected seed to be a whole number"),
        ({"seed": -1}, "expected 0 <= seed < 2\\*\\*32, got -1"),
        ({"seed": 1 << 32}, "expected 0 <= seed < 2\\*\\*32, got 4294967296"),
        ({"stochastic_rounding": "no"}, "expected stochastic_rounding to be True or False, got 'no'"),
        ({"kahan_sum": 1}, "expected kahan_sum to be True or False, got 1"),
        ({"rounding": "stochastic"}, "unknown option rounding"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make("Adam", weights(torch.float32), **options)


def test_every_class_takes_them() -> None:
    for name in NAMES:
        parameters = inspect.signature(getattr(hybridopt.optim, name).__init__).parameters
        assert parameters["options"].kind is inspect.Parameter.VAR_KEYWORD
