"""Optimizers that torch lacks, against slow versions written from the papers; and users' own rules."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch

from hybridopt.errors import MethodError
from hybridopt.optim import ADOPT, Adan, Lion, from_rule
from hybridopt.rules import xp
from hybridopt.rules.lion import RULE as LION

SHAPES = ((5, 7), (3,), (), (0,))
IMPLEMENTATIONS = ("auto", "fused", "foreach", "reference")


def gradients(steps: int, seed: int = 0) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=s) for s in SHAPES] for _ in range(steps)]


def start(dtype: torch.dtype) -> list[torch.Tensor]:
    rng = np.random.default_rng(1)
    return [torch.tensor(rng.normal(size=s), dtype=dtype, requires_grad=True) for s in SHAPES]


def run(make, dtype: torch.dtype, steps: int = 20) -> list[np.ndarray]:
    params = start(dtype)
    optimizer = make(params)
    for grads in gradients(steps):
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
    return [p.detach().double().numpy() for p in params]


def slow_lion(p, grads, lr, betas, wd):  # Chen et al. 2023, algorithm 2
    m = np.zeros_like(p)
    for g in grads:
        update = np.sign(betas[0] * m + (1 - betas[0]) * g)
        p = p - lr * (update + wd * p)
        m = betas[1] * m + (1 - betas[1]) * g
    return p


def slow_adopt(
    p, grads, lr, betas, eps, wd, decouple
):  # Taniguchi et al. 2024, algorithm 2 with clipping t^(1/4)
    m = np.zeros_like(p)
    v = None
    for t, g in enumerate(grads):
        if wd and not decouple:
            g = g + wd * p
        if v is None:
            v = g * g
            continue
        if wd and decouple:
            p = p - lr * wd * p
        scaled = np.clip(g / np.maximum(np.sqrt(v), eps), -(t**0.25), t**0.25)
        m = betas[0] * m + (1 - betas[0]) * scaled
        p = p - lr * m
        v = betas[1] * v + (1 - betas[1]) * g * g
    return p


def slow_adan(p, grads, lr, betas, eps, wd):  # Xie et al. 2022, algorithm 1, bias-corrected
    b1, b2, b3 = betas
    m, d, n = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    before = None
    for t, g in enumerate(grads, 1):
        change = np.zeros_like(p) if before is None else g - before
        m = b1 * m + (1 - b1) * g
        d = b2 * d + (1 - b2) * change
        n = b3 * n + (1 - b3) * (g + b2 * change) ** 2
        root = np.sqrt(n / (1 - b3**t)) + eps
        p = (p - lr * (m / (1 - b1**t) + b2 * d / (1 - b2**t)) / root) / (1 + lr * wd)
        before = g
    return p


CASES = {
    "lion": (lambda **k: (lambda ps: Lion(ps, lr=0.01, weight_decay=0.1, **k)),
             lambda p, g: slow_lion(p, g, 0.01, (0.9, 0.99), 0.1)),
    "adopt": (lambda **k: (lambda ps: ADOPT(ps, lr=0.01, weight_decay=0.1, **k)),
              lambda p, g: slow_adopt(p, g, 0.01, (0.9, 0.9999), 1e-6, 0.1, False)),
    "adopt decoupled": (lambda **k: (lambda ps: ADOPT(ps, lr=0.01, weight_decay=0.1, decouple=True, **k)),
                        lambda p, g: slow_adopt(p, g, 0.01, (0.9, 0.9999), 1e-6, 0.1, True)),
    "adan": (lambda **k: (lambda ps: Adan(ps, lr=0.01, weight_decay=0.1, **k)),
             lambda p, g: slow_adan(p, g, 0.01, (0.98, 0.92, 0.99), 1e-8, 0.1)),
}  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_paper(name, dtype, tolerance, implementation):
    make, slow = CASES[name]
    got = run(make(implementation=implementation), dtype)
    for i, p in enumerate(start(torch.float64)):
        want = slow(p.detach().numpy(), [step[i] for step in gradients(20)])
        assert np.abs(got[i] - want).max(initial=0) <= tolerance * (1 + np.abs(want).max(initial=0))


@pytest.mark.parametrize("name", CASES)
def test_the_compiled_loop_runs_when_asked_for(name):
    make, _ = CASES[name]
    params = start(torch.float32)
    optimizer = make(implementation="fused")(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert "fused (llvm)" in repr(optimizer)


@pytest.mark.parametrize("name", CASES)
def test_state_saved_mid_run_goes_on_bit_for_bit(name):
    make, _ = CASES[name]

    def stepped(optimizer, params, grads):
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = torch.tensor(g, dtype=p.dtype)
            optimizer.step()

    whole = start(torch.float32)
    optimizer = make()(whole)
    stepped(optimizer, whole, gradients(10)[:4])
    file = io.BytesIO()
    torch.save({"weights": whole, "state": optimizer.state_dict()}, file)
    copied = copy.deepcopy(optimizer)
    stepped(optimizer, whole, gradients(10)[4:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    loaded = [p.detach().requires_grad_() for p in saved["weights"]]
    other = make()(loaded)
    other.load_state_dict(saved["state"])
    stepped(other, loaded, gradients(10)[4:])
    twins = [p for group in copied.param_groups for p in group["params"]]
    stepped(copied, twins, gradients(10)[4:])
    for a, b, c in zip(whole, loaded, twins, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_weights_that_join_later_have_their_own_step():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = Adan([a, b], lr=0.1)
    a.grad = torch.ones(2)
    optimizer.step()
    b.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (a, b)] == [3, 2]
    alone = torch.ones(2, requires_grad=True)
    single = Adan([alone], lr=0.1, implementation="reference")
    alone.grad = torch.ones(2)
    single.step()
    single.step()
    assert torch.equal(b, alone)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"weight_decay": -0.1}])
def test_wrong_hyperparameters(wrong):
    with pytest.raises(MethodError, match="Lion: expected lr >= 0"):
        Lion([torch.ones(1, requires_grad=True)], **wrong)


def test_complex_weights_are_refused():
    x = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    x.grad = torch.ones_like(x)
    with pytest.raises(MethodError, match="real weights"):
        Lion([x]).step()


def signum(p, g, momentum, lr, beta, *, nesterov):
    momentum = momentum * beta + g * (1 - beta)
    if nesterov:
        return p - xp.sign(momentum * beta + g) * lr, momentum
    return p - xp.sign(momentum) * lr, momentum


DEFAULTS = {"lr": 0.01, "beta": 0.9, "nesterov": False}
Signum = from_rule(signum, state=["momentum"], defaults=DEFAULTS, name="Signum")
Elsewhere = from_rule(  # its equation is another module's
    LION.update,
    state=["exp_avg"],
    defaults={"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "maximize": False},
    scalars=LION.scalars,
    name="Elsewhere",
)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_users_rule_runs_on_every_engine(implementation, nesterov):
    got = run(lambda ps: Signum(ps, nesterov=nesterov, implementation=implementation), torch.float64)
    for i, p in enumerate(start(torch.float64)):
        want, m = p.detach().numpy(), np.zeros(SHAPES[i])
        for g in (step[i] for step in gradients(20)):
            m = m * 0.9 + g * (1 - 0.9)
            want = want - 0.01 * np.sign(m * 0.9 + g if nesterov else m)
        np.testing.assert_allclose(got[i], want, rtol=1e-13, atol=1e-13)


def cooled(p, g, rate):
    return (p - g * rate,)


def cubic(p, g, m, lr, *, up):
    m = m * 0.5 + xp.exp(-xp.abs(g)) * 0.5
    m = xp.where((g > 0) & (m != 0.3) | ~(p <= 2) ^ (m > 1), m, +m % 0.7)
    return p - lr * m**3 * (2.0**m) * xp.log(1 + g**2), m


def squashed(p, g, m, lr, *, up):
    m = 0.5 * m + torch.tanh(g)
    return p - lr * m.clamp(-1, 1), m


@pytest.mark.parametrize("update", [cubic, squashed])
@pytest.mark.parametrize("weights", [1, 3])
def test_one_weight_or_many_from_the_first_step_on(update, weights):
    """What a list of tensors cannot do is done tensor by tensor."""
    kind = from_rule(update, state=["m"], defaults={"lr": 0.1, "up": True})
    results = []
    for implementation in ("auto", "reference"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(weights)]
        optimizer = kind(params, implementation=implementation)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append(torch.cat(params).detach())
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


def test_lists_that_were_asked_for_and_cannot_be():
    kind = from_rule(squashed, state=["m"], defaults={"lr": 0.1, "up": True})
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(2)
    optimizer = kind(params, implementation="foreach")
    with pytest.warns(
        RuntimeWarning, match="cannot run over lists of tensors .*tensor by tensor runs instead"
    ):
        optimizer.step()
    optimizer.step()
    assert "the rule, tensor by tensor" in repr(optimizer)
    assert params[0].tolist() == params[1].tolist() != [1, 1]


def test_a_fault_of_the_rule_is_raised_as_it_is():
    def broken(p, g, lr):
        return (p - lr * g.no_such_thing,)

    optimizer = from_rule(broken, defaults={"lr": 0.1})([torch.nn.Parameter(torch.ones(2)) for _ in range(2)])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones(2)
    with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'no_such_thing'"):
        optimizer.step()
    assert all(p.tolist() == [1, 1] for p in optimizer.param_groups[0]["params"])


Cooled = from_rule(cooled, defaults={"lr": 1.0}, scalars=lambda step, lr: (lr / step,), name="Cooled")


@pytest.mark.parametrize("implementation", ["foreach", "reference"])
def test_scalars_see_the_step(implementation):
    x = torch.zeros(1, requires_grad=True)
    optimizer = Cooled([x], implementation=implementation)
    for _ in range(3):
        x.grad = torch.ones(1)
        optimizer.step()
    assert x.item() == pytest.approx(-(1 + 1 / 2 + 1 / 3))


def test_a_rule_that_cannot_be_compiled_says_why_once():
    x = torch.zeros(1, requires_grad=True)
    optimizer = Cooled([x], implementation="fused")  # its scalars are a lambda: no plain `def` to read
    x.grad = torch.ones(1)
    optimizer.step()
    with pytest.warns(RuntimeWarning, match="fused was asked for, but it is not a plain `def`"):
        optimizer.step()
    optimizer.step()
    assert x.item() == pytest.approx(-(1 + 1 / 2 + 1 / 3))


def decides(p, g, lr):
    return (p - lr if g > 0 else p + lr,)


def untupled(p, g, momentum, lr):
    return p - g * lr


@pytest.mark.parametrize(
    ("update", "state", "message"),
    [
        (decides, [], "use xp.where"),
        (untupled, ["momentum"], r"expected its update to return the tuple \(p, momentum\)"),
    ],
)
def test_rules_that_are_no_rules_are_refused(update, state, message):
    """Over two weights a condition on values would silently take one branch for all of them."""
    made = from_rule(update, state=state, defaults={"lr": 0.1})
    params = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    for p in params:
        p.grad = torch.tensor([1.0, -1.0])
    with pytest.raises(MethodError, match=message):
        made(params).step()
    assert all(p.eq(0).all() for p in params)


def test_from_rule_checks_the_arguments():
    with pytest.raises(MethodError, match=r"expected update\(p, g, momentum, lr\)"):
        from_rule(signum, state=["momentum"], defaults={"lr": 0.01})
    with pytest.raises(MethodError, match="unknown option"):
        Signum([torch.ones(1, requires_grad=True)], learning_rate=1)


@pytest.mark.parametrize("cls", [Signum, Elsewhere])
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_of_a_users_optimizer_go_on_bit_for_bit(cls, how):
    def copied(x):
        if how == "deepcopy":
            return copy.deepcopy(x)
        if how == "pickle":
            return pickle.loads(pickle.dumps(x))
        file = io.BytesIO()
        torch.save(x, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    def step(optimizer):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.linspace(-1, 2, p.numel()).view_as(p) + p.detach()
        optimizer.step()

    optimizer = cls(start(torch.float32), lr=0.02, implementation="fused")
    for _ in range(3):
        step(optimizer)
    twin = copied(optimizer)
    assert type(twin) is cls
    for _ in range(3):
        step(optimizer)
        step(twin)
    assert twin._used == optimizer._used == "fused (llvm)"
    for p, q in zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def test_a_users_optimizer_takes_hyperparameters_by_name_or_in_order():
    def options(*args, **more):
        (group,) = Signum([torch.ones(1, requires_grad=True)], *args, **more).param_groups
        return [group[key] for key in DEFAULTS]

    assert options() == [0.01, 0.9, False]
    assert options(0.5) == options(lr=0.5) == [0.5, 0.9, False]
    assert options(0.5, 0.8, nesterov=True) == options(beta=0.8, lr=0.5, nesterov=True) == [0.5, 0.8, True]
    assert str(inspect.signature(Signum)) == (
        "(params, lr=0.01, beta=0.9, *, nesterov=False, foreach=None, fused=None, **options)"
    )
    with pytest.raises(TypeError, match="Signum: too many positional arguments"):
        options(0.5, 0.8, True)
    with pytest.raises(TypeError, match="Signum: multiple values for argument 'lr'"):
        options(0.5, lr=0.5)


@pytest.mark.parametrize("taken", ["self", "params", "fused", "seed", "options", "lambda", "weight decay"])
def test_names_that_no_hyperparameter_can_have(taken):
    def plain(p, g):
        return (p - g,)

    with pytest.raises(MethodError, match=f"expected hyperparameters with names .* got {taken}; choose"):
        from_rule(plain, defaults={taken: 0.1}, scalars=lambda step, value: ())


def test_a_function_that_rules_lack_is_named() -> None:
    made = from_rule(lambda p, g, lr: p - lr * xp.sin(g), defaults={"lr": 0.1})
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(
        MethodError, match=r"xp\.sin: a rule has no such function; it may use xp\.abs, .*xp\.sqrt"
    ):
        made([p]).step()
