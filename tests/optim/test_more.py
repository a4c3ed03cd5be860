"""AdEMAMix, AMSGrad, LAMB and SparseAdam: against slow versions written from the papers, and against torch."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import hybridopt
from hybridopt.errors import MethodError
from hybridopt.optim.adam import AMSGrad
from hybridopt.optim.ademamix import AdEMAMix
from hybridopt.optim.lamb import LAMB, _norms
from hybridopt.optim.sparse_adam import SparseAdam
from tests.optim.side_by_side import odd

SHAPES = ((5, 7), (3,), (), (0,), (200, 173))  # the last is summed in two blocks
STEPS = 20
IMPLEMENTATIONS = ("auto", "fused", "foreach", "reference")
Make = Callable[..., Any]


def gradients(steps: int = STEPS, seed: int = 0) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=s) for s in SHAPES] for _ in range(steps)]


def start(dtype: torch.dtype) -> list[Tensor]:
    rng = np.random.default_rng(1)
    return [torch.tensor(rng.normal(size=s), dtype=dtype, requires_grad=True) for s in SHAPES]


def stepped(optimizer: Any, params: list[Tensor], grads: list[list[np.ndarray]], sign: float = 1.0) -> None:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = torch.tensor(sign * g, dtype=p.dtype)
        optimizer.step()


def slow_ademamix(
    p: np.ndarray,
    grads: list[np.ndarray],
    lr: float,
    betas: tuple[float, float, float],
    eps: float,
    wd: float,
    alpha: float,
    warmup: int | None,
) -> np.ndarray:
    """Pagliardini et al. 2024, algorithm 1, and the schedulers of section 3 with beta_start = beta1."""
    b1, b2, b3 = betas
    m1, m2, nu = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        a, b = alpha, b3
        if warmup is not None:
            a = min(t * alpha / warmup, alpha)
            if t < warmup:
                mixed = (1 - t / warmup) * math.log(b3) + t / warmup * math.log(b1)
                b = min(math.exp(math.log(b1) * math.log(b3) / mixed), b3)
        m1 = b1 * m1 + (1 - b1) * g
        m2 = b * m2 + (1 - b) * g
        nu = b2 * nu + (1 - b2) * g**2
        m1_hat, nu_hat = m1 / (1 - b1**t), nu / (1 - b2**t)
        p = p - lr * ((m1_hat + a * m2) / (np.sqrt(nu_hat) + eps) + wd * p)
    return p


def slow_lamb(p: Any, grads: list[Any], lr: float, betas: tuple[float, float], eps: float, wd: float) -> Any:
    """You et al. 2020, algorithm 2, phi(z) = z, ratio 1 where a norm is zero; of arrays or tensors."""
    m, v = p * 0, p * 0
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        r = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)) ** 0.5 + eps)
        u = r + wd * p
        weight, length = (p**2).sum() ** 0.5, (u**2).sum() ** 0.5
        p = p - lr * (weight / length if weight > 0 and length > 0 else 1.0) * u
    return p


CASES: dict[str, tuple[Make, Callable[[np.ndarray, list[np.ndarray]], np.ndarray]]] = {
    "ademamix": (
        lambda ps, **k: AdEMAMix(ps, lr=0.01, weight_decay=0.1, **k),
        lambda p, g: slow_ademamix(p, g, 0.01, (0.9, 0.999, 0.9999), 1e-8, 0.1, 5.0, None),
    ),
    "ademamix, warm-up": (
        lambda ps, **k: AdEMAMix(ps, 0.01, (0.7, 0.9, 0.99), 1e-6, 0.0, 8.0, 12, **k),
        lambda p, g: slow_ademamix(p, g, 0.01, (0.7, 0.9, 0.99), 1e-6, 0.0, 8.0, 12),
    ),
    "lamb": (
        lambda ps, **k: LAMB(ps, lr=0.01, weight_decay=0.1, **k),
        lambda p, g: slow_lamb(p, g, 0.01, (0.9, 0.999), 1e-6, 0.1),
    ),
    "lamb, no decay": (
        lambda ps, **k: LAMB(ps, 0.03, (0.5, 0.9), 1e-3, 0.0, **k),
        lambda p, g: slow_lamb(p, g, 0.03, (0.5, 0.9), 1e-3, 0.0),
    ),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_paper(name: str, dtype: torch.dtype, tolerance: float, implementation: str) -> None:
    make, slow = CASES[name]
    params = start(dtype)
    optimizer = make(params, implementation=implementation)
    stepped(optimizer, params, gradients())
    used = {"foreach": "the rule over lists of tensors", "reference": "the rule, tensor by tensor"}
    assert f"-> {used.get(implementation, 'fused (llvm)')}\n" in repr(optimizer)
    for i, p in enumerate(start(torch.float64)):
        want = slow(p.detach().numpy(), [step[i] for step in gradients()])
        got = params[i].detach().double().numpy()
        assert np.abs(got - want).max(initial=0) <= tolerance * (1 + np.abs(want).max(initial=0))


# -- contracts --------------------------------------------------------------------------------------------------------

MAKES: dict[str, Make] = {
    "AdEMAMix": lambda ps, **k: AdEMAMix(ps, **{"lr": 0.01, "T_alpha_beta3": 15, **k}),
    "AMSGrad": lambda ps, **k: AMSGrad(ps, **{"lr": 0.01, **k}),
    "LAMB": lambda ps, **k: LAMB(ps, **{"lr": 0.01, **k}),
}


@pytest.mark.parametrize("implementation", ["auto", "foreach"])
@pytest.mark.parametrize("how", ["torch.save", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", MAKES)
def test_saved_mid_run_goes_on_bit_for_bit(name: str, how: str, implementation: str) -> None:
    whole = start(torch.float32)
    optimizer = MAKES[name](whole, implementation=implementation)
    stepped(optimizer, whole, gradients(10)[:4])
    if how == "torch.save":
        file = io.BytesIO()
        torch.save({"weights": whole, "state": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        others = [p.detach().requires_grad_() for p in saved["weights"]]
        other = MAKES[name](others, implementation=implementation)
        other.load_state_dict(saved["state"])
    elif how == "deepcopy":
        others, other = copy.deepcopy((whole, optimizer))
    else:
        others, other = pickle.loads(pickle.dumps((whole, optimizer)))
    stepped(optimizer, whole, gradients(10)[4:])
    stepped(other, others, gradients(10)[4:])
    assert other.implementation == implementation
    for p, q in zip(whole, others, strict=True):
        assert p is not q
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(optimizer.state[p][key], other.state[q][key]) for key in optimizer.state[p])


def test_a_state_loaded_into_a_running_optimizer_replaces_its_own() -> None:
    for name, make in MAKES.items():
        params, other = start(torch.float32), start(torch.float32)
        optimizer, saved = make(params), make(other)
        stepped(saved, other, gradients(3))
        stepped(optimizer, params, gradients(2, seed=5))
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        with torch.no_grad():
            for p, q in zip(params, other, strict=True):
                p.copy_(q)
        stepped(optimizer, params, gradients(3, seed=7))
        stepped(saved, other, gradients(3, seed=7))
        assert all(torch.equal(p, q) for p, q in zip(params, other, strict=True)), name


@pytest.mark.parametrize("name", MAKES)
def test_weights_that_join_later_or_have_no_gradient(name: str) -> None:
    """Each weight goes its way as if alone; one without gradient stays, with no state."""
    a, b, idle = (torch.ones(3, requires_grad=True) for _ in range(3))
    optimizer = MAKES[name]([a, idle])
    alone = torch.ones(3, requires_grad=True)
    single = MAKES[name]([alone], implementation="reference")
    for k in range(6):
        if k == 2:
            optimizer.add_param_group({"params": [b]})
        g = torch.tensor([1.0, -2.0, 0.5]) * (k + 1)
        a.grad, b.grad, alone.grad = g, (g if k != 3 else None), g
        before = b.detach().clone()
        optimizer.step()
        single.step()
        assert torch.equal(b, before) == (k in (0, 1, 3))
    assert [optimizer.state[p]["step"].item() for p in (a, b)] == [6, 3]
    assert torch.equal(idle, torch.ones(3))
    assert idle not in optimizer.state
    torch.testing.assert_close(a, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MAKES)
def test_maximize_is_descent_of_the_negative(name: str) -> None:
    up, down = start(torch.float64), start(torch.float64)
    for p in (*up, *down):
        p.data.abs_()  # LAMB's decay pulls to zero in both
    stepped(MAKES[name](up, maximize=True), up, gradients(5))
    stepped(MAKES[name](down), down, gradients(5), sign=-1.0)
    for p, q in zip(up, down, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", MAKES)
def test_closure_and_hooks(name: str) -> None:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = MAKES[name]([x])
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure) for _ in range(3)]
    assert seen == ["before", "after"] * 3
    assert losses[0].item() == 5
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", MAKES)
def test_schedulers_set_the_next_step(name: str) -> None:
    """As if the rate (and momentum) of each step had been written by hand."""
    schedules: list[Callable[[Any], Any]] = [
        lambda o: lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    ]
    for make in schedules:
        params, others = start(torch.float64), start(torch.float64)
        optimizer, by_hand = MAKES[name](params), MAKES[name](others, implementation="reference")
        scheduler = make(optimizer)
        rates = set()
        for step in gradients(6):
            (group,) = optimizer.param_groups
            rates.add((group["lr"], group["betas"]))
            by_hand.param_groups[0].update(lr=group["lr"], betas=group["betas"])
            stepped(optimizer, params, [step])
            stepped(by_hand, others, [step])
            scheduler.step()
        assert len(rates) >= 3
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MAKES)
def test_minimize_drives_it(name: str) -> None:
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    options = {"AdEMAMix": {"lr": 0.1, "alpha": 1.0}, "AMSGrad": {"lr": 0.2}, "LAMB": {"lr": 0.1}}[name]
    cls = {"AdEMAMix": AdEMAMix, "AMSGrad": AMSGrad, "LAMB": LAMB}[name]
    target = torch.tensor([0.5, 1.0, -1.0])
    method = hybridopt.method(cls, **options)
    result = hybridopt.minimize(lambda x: ((x - target) ** 2).sum(), x, method, budget=100, seed=0)
    assert result.best_loss < 0.3 < ((torch.tensor([1.0, -2.0, 3.0]) - target) ** 2).sum()
    assert result.evaluations == 100


WRONG = [
    (AdEMAMix, {"lr": -1.0}),
    (AdEMAMix, {"betas": (0.9, 0.999)}),
    (AdEMAMix, {"betas": (0.9, 0.999, 1.0)}),
    (AdEMAMix, {"betas": (0.9, 0.999, 0.0)}),
    (AdEMAMix, {"alpha": -1.0}),
    (AdEMAMix, {"eps": float("nan")}),
    (AdEMAMix, {"T_alpha_beta3": 0}),
    (LAMB, {"lr": -1.0}),
    (LAMB, {"betas": (1.0, 0.9)}),
    (LAMB, {"eps": -1e-8}),
    (LAMB, {"weight_decay": float("nan")}),
    (LAMB, {"implementation": "fast"}),
]


@pytest.mark.parametrize(("cls", "wrong"), WRONG)
def test_wrong_hyperparameters(cls: Any, wrong: dict[str, Any]) -> None:
    expected = (
        "expected one of" if "implementation" in wrong else f"{cls.__name__}: expected .*{next(iter(wrong))}"
    )
    with pytest.raises(MethodError, match=expected):
        cls([torch.ones(1, requires_grad=True)], **wrong)


@pytest.mark.parametrize("cls", [AdEMAMix, LAMB])
def test_complex_weights_and_sparse_gradients_are_refused(cls: Any) -> None:
    for x, grad in (
        (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64)),
        (torch.ones(2, 2), torch.eye(2).to_sparse()),
    ):
        x.requires_grad_().grad = grad
        with pytest.raises(MethodError, match=f"{cls.__name__}: expected real weights with dense gradients"):
            cls([x]).step()


# -- AdEMAMix ---------------------------------------------------------------------------------------------------------


def test_without_a_slow_moment_ademamix_is_adamw() -> None:
    params, others = start(torch.float64), start(torch.float64)
    stepped(AdEMAMix(params, lr=0.01, alpha=0.0, weight_decay=0.1), params, gradients())
    stepped(torch.optim.AdamW(others, lr=0.01, weight_decay=0.1), others, gradients())
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_ademamix_may_warm_up_from_no_memory() -> None:
    """beta1 = 0: the slow moment's memory still grows linearly, from nothing."""
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = AdEMAMix([x], betas=(0.0, 0.999, 0.99), T_alpha_beta3=4)
    x.grad = torch.ones_like(x)
    optimizer.step()
    # memory 1/4 of -1 / log(0.99), so beta3(1) = 0.99^4
    assert optimizer.state[x]["exp_avg_slow"].item() == pytest.approx(1 - 0.99**4, rel=1e-12)


# -- AMSGrad ----------------------------------------------------------------------------------------------------------


def test_amsgrad_has_torchs_arguments_but_the_flag() -> None:
    mine = dict(inspect.signature(AMSGrad).parameters)
    torchs = dict(inspect.signature(torch.optim.Adam).parameters)
    del torchs["amsgrad"], mine["options"]
    assert list(mine) == list(torchs)
    assert [p.default for p in mine.values()] == [p.default for p in torchs.values()]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_amsgrad_is_torchs_adam_with_amsgrad(implementation: str) -> None:
    options: dict[str, Any] = {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.1}
    options.update(decoupled_weight_decay=True, maximize=True)
    params, others = start(torch.float64), start(torch.float64)
    ours = AMSGrad(params, implementation=implementation, **options)
    theirs = torch.optim.Adam(others, amsgrad=True, **options)
    shrinking = [[g / (k + 1) for g in step] for k, step in enumerate(gradients())]
    stepped(ours, params, shrinking[:10])
    stepped(theirs, others, shrinking[:10])
    mine, torchs = ours.state_dict(), theirs.state_dict()
    assert [set(g) for g in mine["param_groups"]] == [set(g) for g in torchs["param_groups"]]
    assert mine["param_groups"][0]["amsgrad"] is True
    assert {k: list(v) for k, v in mine["state"].items()} == {k: list(v) for k, v in torchs["state"].items()}
    ours.load_state_dict(copy.deepcopy(torchs))
    theirs.load_state_dict(copy.deepcopy(mine))
    stepped(ours, params, shrinking[10:])
    stepped(theirs, others, shrinking[10:])
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        for key, value in theirs.state[q].items():
            torch.testing.assert_close(ours.state[p][key], value, rtol=1e-12, atol=1e-12)


def test_amsgrad_refuses_what_torch_refuses() -> None:
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}):
        with pytest.raises(ValueError, match="Invalid") as theirs:
            torch.optim.Adam([torch.ones(1)], **wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
            AMSGrad([torch.ones(1)], **wrong)  # type: ignore[arg-type]


# -- LAMB -------------------------------------------------------------------------------------------------------------


def test_a_step_of_lamb_is_as_long_as_the_rate_times_the_norm() -> None:
    params = start(torch.float64)
    optimizer = LAMB(params, lr=0.03, weight_decay=0.2)
    for step in gradients(3):
        before = [p.detach().clone() for p in params]
        stepped(optimizer, params, [step])
        for p, old in zip(params, before, strict=True):
            assert (p - old).norm().item() == pytest.approx(0.03 * old.norm().item(), rel=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lambs_ratio_is_one_where_a_norm_is_zero(implementation: str) -> None:
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    still = torch.ones(2, dtype=torch.float64, requires_grad=True)
    zero.grad, still.grad = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.zeros_like(still)
    LAMB([zero, still], lr=0.1, weight_decay=0.0, implementation=implementation).step()
    assert zero.tolist() == pytest.approx([-0.1, 0.1], rel=1e-5)
    assert torch.equal(still, torch.ones_like(still))


def test_lamb_has_the_same_bits_for_any_number_of_threads() -> None:
    """Above what torch sums, and our loop steps, with several threads (here as many as asked for, cores or not)."""

    def run(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        p = torch.randn(700, 801, generator=generator).requires_grad_()
        optimizer = LAMB([p], lr=0.1)
        for _ in range(3):
            p.grad = torch.randn(700, 801, generator=generator)
            optimizer.step()
        return p.detach()

    one = run(1)
    assert all(torch.equal(one, run(threads)) for threads in (2, 3))


def test_the_norms_of_large_tensors_are_right() -> None:
    x = torch.randn(1000, 1003)
    (norm,) = _norms([x])
    assert norm.item() == pytest.approx(x.double().norm().item(), rel=1e-6)


def test_lamb_steps_weights_of_several_dtypes_as_if_alone() -> None:
    dtypes = (torch.float64, torch.float32)
    together = [torch.ones(3, dtype=d, requires_grad=True) for d in dtypes]
    alone = [torch.ones(3, dtype=d, requires_grad=True) for d in dtypes]
    for p, q in zip(together, alone, strict=True):
        p.grad = q.grad = torch.tensor([1.0, -2.0, 3.0], dtype=p.dtype)
        LAMB([q], lr=0.1).step()
    LAMB(together, lr=0.1).step()
    for p, q, tolerance in zip(together, alone, (1e-14, 1e-6), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_lamb_takes_over_options_that_change() -> None:
    changed = {"betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.3, "maximize": True}
    params = start(torch.float64)
    optimizer = LAMB(params, lr=0.1)
    stepped(optimizer, params, gradients(2))
    others = [p.detach().clone().requires_grad_() for p in params]
    other = LAMB(others, lr=0.1, **changed)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(changed)
    other.load_state_dict(saved)
    optimizer.param_groups[0].update(changed)
    stepped(optimizer, params, gradients(2, seed=3))
    stepped(other, others, gradients(2, seed=3))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_lamb_leaves_gradients_alone_and_keeps_none() -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = LAMB([p])
    for _ in range(2):
        p.grad = torch.tensor([1.0, 2.0, 3.0])
        optimizer.step()
        assert p.grad.tolist() == [1.0, 2.0, 3.0]
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    kept = optimizer._directions
    assert kept is not None
    assert all(u.grad is None for group in kept.param_groups for u in group["params"])


def test_lamb_follows_a_state_that_was_replaced() -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = LAMB([p], betas=(0.5, 0.9))
    for value in (1.0, 2.0):
        p.grad = torch.full((3,), value)
        optimizer.step()
        optimizer.state[p]["exp_avg"] = torch.zeros(3)
    p.grad = torch.full((3,), 4.0)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].tolist() == [2.0, 2.0, 2.0]


def test_lamb_follows_weights_that_change_their_memory_or_dtype() -> None:
    p, q = torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer, other = LAMB([p], lr=0.1), LAMB([q], lr=0.1)
    for k in range(4):
        if k == 2:
            p.data = p.data.double()
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][key] = optimizer.state[p][key].double()
        p.grad = torch.tensor([1.0, -2.0, 3.0], dtype=p.dtype)
        q.grad = torch.tensor([1.0, -2.0, 3.0], dtype=q.dtype)
        optimizer.step()
        other.step()
    assert p.dtype == torch.float64
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@odd
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("implementation", ["auto", "foreach", "reference"])
def test_lambs_error_is_at_most_twice_that_of_plain_code(implementation: str, dtype: torch.dtype) -> None:
    """Against float64 from the same start and gradients, over odd and non-contiguous weights."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(n, generator=generator) for n in (1, 127, 1823)]
    starts = [t.to(dtype) for t in [*starts, torch.randn(33, 65, generator=generator).t()]]
    gradients = [[torch.randn(t.shape, generator=generator).to(dtype) for _ in range(10)] for t in starts]
    params = [t.clone().requires_grad_() for t in starts]
    optimizer = LAMB(params, lr=0.01, weight_decay=0.1, implementation=implementation)
    for k in range(10):
        for p, grads in zip(params, gradients, strict=True):
            p.grad = grads[k].clone()
        optimizer.step()
    mine = plain = 0.0
    for p, start, grads in zip(params, starts, gradients, strict=True):
        settings = 0.01, (0.9, 0.999), 1e-6, 0.1
        exact = slow_lamb(start.double(), [g.double() for g in grads], *settings)
        mine += float((p.detach().double() - exact).square().sum())
        plain += float((slow_lamb(start, grads, *settings).double() - exact).square().sum())
    assert mine**0.5 <= 2 * plain**0.5 + 1e-9


# -- SparseAdam -------------------------------------------------------------------------------------------------------


def sparse(
    k: int, size: tuple[int, ...], dims: int, count: int, coalesced: bool, dtype: torch.dtype
) -> Tensor:
    """A gradient with `count` entries in the first `dims` dimensions, some of them repeated."""
    generator = torch.Generator().manual_seed(k)
    at = torch.stack([torch.randint(0, max(1, n // 2), (count,), generator=generator) for n in size[:dims]])
    values = torch.randn(count, *size[dims:], generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.sparse_coo_tensor(at, values, size, check_invariants=True)
    return grad.coalesce() if coalesced else grad


SPARSE: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all": {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "maximize": True},
    "tensor lr": {"lr": torch.tensor([0.05], dtype=torch.float64)},
    "no betas": {"betas": (0.0, 0.0)},
}


def same(a: Tensor, b: Tensor) -> None:
    tol = 1e-12 if a.dtype is torch.float64 else 1e-6
    torch.testing.assert_close(a.detach(), b.detach(), rtol=tol, atol=tol, check_dtype=False)


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", SPARSE)
def test_sparse_adam_gives_torchs_results(
    options: str, implementation: str, dtype: torch.dtype, coalesced: bool
) -> None:
    """Rows, single entries and blocks; a gradient without entries, and none at all; through checkpoints both ways.

    In float64, also of float32 weights: without betas torch's second moment, v + (g² - v), loses small gradients behind
    large ones (weights are 1e-5 off then).
    """
    torchs_dtype = dtype if implementation == "reference" else torch.float64
    cases = (((12, 5), 1), ((6, 4), 2), ((6, 4, 3), 2), ((9,), 1))
    torch.manual_seed(0)
    params = [torch.randn(size, dtype=dtype).requires_grad_() for size, _ in cases]
    others = [p.detach().to(torchs_dtype, copy=True).requires_grad_() for p in params]
    ours = SparseAdam(params, implementation=implementation, **SPARSE[options])
    theirs = torch.optim.SparseAdam(others, **SPARSE[options])
    for k in range(8):
        for i, (size, dims) in enumerate(cases):
            count = 0 if k == 2 else 7
            grad = sparse(10 * k + i, size, dims, count, coalesced, dtype)
            params[i].grad, others[i].grad = (
                (None, None) if k == i + 3 else (grad, grad.to(torchs_dtype, copy=True))
            )
        ours.step()
        theirs.step()
        if k == 4:
            mine, torchs = copy.deepcopy(ours.state_dict()), copy.deepcopy(theirs.state_dict())
            assert mine["state"].keys() == torchs["state"].keys()
            assert mine["param_groups"] == torchs["param_groups"]
            ours.load_state_dict(torchs)
            theirs.load_state_dict(mine)
    gathered = implementation == "foreach"
    assert ours._used == {"reference": "torch's own code", "foreach": "gathered rows"}.get(
        implementation, "fused (llvm)"
    )
    assert len(ours._loops) == (0 if gathered or implementation == "reference" else len(params))
    for p, q in zip(params, others, strict=True):
        same(p, q)
        a, b = ours.state[p], theirs.state[q]
        assert a["step"] == b["step"] == 7
        assert isinstance(a["step"], int)
        same(a["exp_avg"], b["exp_avg"])
        same(a["exp_avg_sq"], b["exp_avg_sq"])


def test_sparse_adam_serves_weights_that_are_not_contiguous_and_gradients_without_index() -> None:
    for make in (lambda: torch.arange(12.0).view(3, 4).t(), lambda: torch.arange(4.0)):
        weights: list[Tensor] = []
        for cls in (SparseAdam, torch.optim.SparseAdam):
            p = make().clone(memory_format=torch.preserve_format).requires_grad_()
            optimizer = cls([p], lr=0.1)
            for k in range(3):
                if p.dim() == 2:
                    p.grad = sparse(k, (4, 3), 1, 5, False, torch.float32)
                else:
                    values = torch.arange(8.0).view(2, 4) - k
                    p.grad = torch.sparse_coo_tensor(
                        torch.zeros(0, 2, dtype=torch.long), values, (4,), check_invariants=True
                    )
                optimizer.step()
            weights.append(p.detach())
        same(*weights)
        assert optimizer is not None


def test_sparse_adam_leaves_the_gradient_alone() -> None:
    p = torch.ones(5, 2, requires_grad=True)
    for coalesced in (False, True):
        grad = sparse(1, (5, 2), 1, 4, coalesced, torch.float32)
        p.grad = grad.clone()
        SparseAdam([p], maximize=True).step()
        assert torch.equal(p.grad.to_dense(), grad.to_dense())
        assert p.grad.is_coalesced() == coalesced


def test_sparse_adam_says_what_runs() -> None:
    said = {
        "auto": "fused (llvm)",
        "foreach": "gathered rows",
        "fused": "fused (llvm)",
        "reference": "torch's own code",
    }
    for implementation, text in said.items():
        p = torch.ones(2, 2, requires_grad=True)
        p.grad = torch.eye(2).to_sparse(1)
        optimizer = SparseAdam([p], implementation=implementation)  # type: ignore[arg-type]
        optimizer.step()
        assert f"implementation: {implementation} -> {text}\n" in repr(optimizer)


def test_sparse_adam_refuses_what_torch_refuses() -> None:
    p = torch.ones(2, 2, requires_grad=True)
    for params, wrong in (
        ([p], {"lr": 0.0}),
        ([p], {"eps": 0.0}),
        ([p], {"betas": (1.0, 0.9)}),
        ([p], {"lr": torch.ones(2)}),
        ([torch.eye(2).to_sparse()], {}),
        ([torch.ones(2, dtype=torch.complex64)], {}),
    ):
        with pytest.raises(ValueError, match=r"Invalid|must be|params") as theirs:
            torch.optim.SparseAdam(params, **wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
            SparseAdam(params, **wrong)  # type: ignore[arg-type]
    p.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="does not support dense gradients, please consider Adam instead"):
        SparseAdam([p]).step()


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_sparse_adam_with_an_embedding_a_scheduler_a_closure_hooks_and_copies(implementation: str) -> None:
    torch.optim.SparseAdam([torch.ones(1)])  # torch wraps its class's step when its first instance is made
    weights = []
    for cls, options in ((SparseAdam, {"implementation": implementation}), (torch.optim.SparseAdam, {})):
        torch.manual_seed(0)
        table = torch.nn.Embedding(20, 3, sparse=True)
        extra = torch.nn.Embedding(4, 3, sparse=True)
        optimizer = cls(table.parameters(), lr=0.1, **options)
        optimizer.add_param_group({"params": extra.parameters(), "lr": 0.01})
        scheduler = lr_scheduler.StepLR(optimizer, 2, 0.5)
        seen: list[int] = []
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append(1))
        for k in range(6):
            if k == 3 and cls is SparseAdam:
                table, extra, optimizer = pickle.loads(pickle.dumps((table, extra, optimizer)))
                assert optimizer.implementation == implementation
                scheduler.optimizer = optimizer

            def closure(
                k: int = k, table: Any = table, extra: Any = extra, optimizer: Any = optimizer
            ) -> Tensor:
                optimizer.zero_grad()
                rows = table(torch.tensor([k, k, 2 * k]))
                loss: Tensor = (rows.pow(2).sum() + extra(torch.tensor([k % 4])).sum()) ** 2
                loss.backward()
                return loss

            assert optimizer.step(closure).requires_grad
            scheduler.step()
        assert len(seen) == (6 if cls is torch.optim.SparseAdam else 3)
        weights.append([table.weight.detach(), extra.weight.detach()])
    for a, b in zip(*weights, strict=True):
        same(a, b)


def test_minimize_drives_sparse_adam() -> None:
    torch.manual_seed(0)
    table = torch.nn.Embedding(5, 2, sparse=True)
    method = hybridopt.method(SparseAdam, lr=0.2)
    result = hybridopt.minimize(
        lambda m: (m(torch.arange(5)) - 1).pow(2).mean(), table, method, budget=60, seed=0
    )
    assert result.best_loss < 0.05
    assert result.evaluations == 60


def test_sparse_adam_fused_warns_once() -> None:
    table = torch.nn.Parameter(torch.ones(3, 4).t())
    optimizer = SparseAdam([table], fused=True)
    table.grad = sparse(0, (4, 3), 1, 5, False, torch.float32)
    with pytest.warns(
        RuntimeWarning, match="fused was asked for, but a row of a weight does not stand"
    ) as seen:
        optimizer.step()
    assert [w.filename for w in seen] == [__file__]
    optimizer.step()  # a second warning would be an error
    assert "fused -> gathered rows: a row of a weight does not stand in one piece" in repr(optimizer)


@pytest.mark.parametrize("threads", [1, 2])
def test_sparse_adam_steps_many_rows_on_several_threads(threads: int) -> None:
    """Rows of several dimensions, and so many that threads share them."""
    torch.set_num_threads(threads)
    weights = []
    for cls in (SparseAdam, torch.optim.SparseAdam):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(3000, 7, 40))
        optimizer = cls([p], lr=0.1)
        for k in range(3):
            p.grad = sparse(k, (3000, 7, 40), 2, 20_000, False, torch.float32)
            optimizer.step()
        weights.append(p)
    same(*weights)


def test_sparse_adam_notices_what_moves() -> None:
    """A weight or state with other memory, states loaded, another precision, another option."""
    results = []
    for cls in (SparseAdam, torch.optim.SparseAdam):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(6, 3))
        optimizer = cls([p], lr=0.1)
        for k in range(12):
            p.grad = sparse(k, (6, 3), 1, 4, False, p.dtype)
            if k == 2:
                p.data = p.data.clone()
            elif k == 4:
                optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()
            elif k == 6:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            elif k == 8:
                optimizer.param_groups[0].update(lr=0.01, maximize=True, betas=(0.8, 0.9))
            elif k == 10:
                p.data, p.grad = p.data.double(), None
                for name in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[p][name] = optimizer.state[p][name].double()
                p.grad = sparse(k, (6, 3), 1, 4, False, torch.float64)
            optimizer.step()
        assert cls is not SparseAdam or optimizer._used == "fused (llvm)"
        results.append((p.detach(), *(optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq"))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row", [-1, 5, 2**40, 2**62])
def test_sparse_adam_writes_nowhere_but_into_its_weight(row: int) -> None:
    p = torch.nn.Parameter(torch.zeros(3, 5, 2))
    optimizer = SparseAdam([p])
    at, values = torch.tensor([[0, 0], [1, row]]), torch.ones(2, 2)  # the next row of another index, perhaps
    bad = torch.sparse_coo_tensor(at, values, (3, 5, 2), check_invariants=False, is_coalesced=True)
    p.grad = bad
    with pytest.raises(IndexError, match="indices"):
        optimizer.step()
    assert torch.equal(p, torch.zeros(3, 5, 2))
    assert optimizer.state[p]["step"] == 0


def test_sparse_adam_has_torchs_arguments() -> None:
    mine, torchs = (dict(inspect.signature(c).parameters) for c in (SparseAdam, torch.optim.SparseAdam))
    assert list(mine)[: len(torchs)] == list(torchs)
    assert set(mine) - set(torchs) == {"foreach", "fused", "options"}
