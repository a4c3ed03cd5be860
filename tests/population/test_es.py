"""OpenAI-ES and PGPE: what they estimate, their mirrored pairs, and the optimizers that they feed."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import Reason, Run, method
from hybridopt.errors import MethodError
from hybridopt.optim import Adam
from hybridopt.population._large import weighted_moments
from hybridopt.population.es import PGPE, OpenAIES, centered_ranks
from hybridopt.testing import OptimizerContract
from tests.population.drive import begin, bowl, first, generations, solved, valley

BOX = (-2.0, 2.0)
OPTIMIZERS = ["adam(lr=0.05)", "sgd(lr=1.0)", "lion(lr=0.05)"]


class TestContractOpenAIES(OptimizerContract):
    method = OpenAIES(sigma=0.1)
    random = True


class TestContractOpenAIESBounded(OptimizerContract):
    method = OpenAIES("sgd(lr=0.1, momentum=0.9)", popsize=6)
    bounds = BOX
    random = True


class TestContractPGPE(OptimizerContract):
    method = PGPE()
    random = True


class TestContractPGPEBounded(OptimizerContract):
    method = PGPE("lion(lr=0.02)", popsize=6)
    bounds = BOX
    random = True


def test_the_estimate_for_a_linear_loss_is_its_slope() -> None:
    """(1 / (λ sigma)) Σ F z, with mirrored pairs and the losses themselves; its error falls as 1/sqrt(λ)."""
    slope = np.array([3.0, -1.0, 0.5])
    errors = []
    for popsize in (100, 10000):
        strategy, rng = begin(OpenAIES(sigma=0.2, popsize=popsize), [1.0, 2.0, 3.0], loss=0.0)
        x = strategy.ask(rng)
        moments, _ = weighted_moments(x, strategy.mu, strategy.sigma, (x @ slope + 50) / popsize)
        errors.append(np.abs(strategy.gradient(moments, strategy.sigma) - slope).max())
    assert errors[1] < 0.15
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("kind", [OpenAIES, PGPE])
def test_pairs_are_mirrored_exactly(kind: Any) -> None:
    strategy, rng = begin(kind(popsize=8), np.zeros(5), loss=0.0)
    x = strategy.ask(rng)
    np.testing.assert_array_equal(x[:4], -x[4:])
    assert len(np.unique(np.abs(x))) == 20


def test_centered_ranks() -> None:
    assert centered_ranks(5).tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]


def test_openai_es_generations_written_out() -> None:
    """Algorithm 2 of Salimans et al. 2017 with ranks, fed to plain gradient descent."""
    strategy, rng = begin(OpenAIES("sgd(lr=0.3)", sigma=0.5, popsize=6), [1.0, -1.0], loss=0.0)
    other = np.random.Generator(np.random.PCG64(3))
    theta = np.array([1.0, -1.0])
    for _ in range(5):
        eps = other.standard_normal((3, 2))
        x = np.concatenate([theta + 0.5 * eps, theta - 0.5 * eps])
        asked = strategy.ask(rng)
        np.testing.assert_allclose(asked, x, rtol=1e-12)
        rank = np.argsort(np.argsort(valley(x))) / 5 - 0.5
        gradient = sum((rank[i] - rank[i + 3]) * eps[i] for i in range(3)) / (6 * 0.5)
        theta = theta - 0.3 * gradient
        strategy.tell(asked, valley(asked), rng)
        np.testing.assert_allclose(strategy.mu, theta, rtol=1e-12)


def test_pgpe_generations_written_out() -> None:
    """Sehnke et al. 2010: the center by Σ ε (r+ - r-) / 2, sigma by Σ (ε² - sigma²) / sigma (r+ + r-) / 2."""
    strategy, rng = begin(PGPE("sgd(lr=2.0)", sigma=0.5, popsize=6, lr_sigma=0.1), [1.0, -1.0], loss=0.0)
    other = np.random.Generator(np.random.PCG64(3))
    mu, sigma = np.array([1.0, -1.0]), np.array([0.5, 0.5])
    for _ in range(5):
        eps = sigma * other.standard_normal((3, 2))
        x = np.concatenate([mu + eps, mu - eps])
        asked = strategy.ask(rng)
        np.testing.assert_allclose(asked, x, rtol=1e-12)
        reward = 0.5 - np.argsort(np.argsort(valley(x))) / 5
        plus, minus = reward[:3], reward[3:]
        T = eps.T
        S = ((eps**2 - sigma**2) / sigma).T
        mu = mu + 2.0 * T @ ((plus - minus) / 2) / 3
        sigma = sigma + 0.1 * S @ ((plus + minus) / 2) / 3
        strategy.tell(asked, valley(asked), rng)
        np.testing.assert_allclose(strategy.mu, mu, rtol=1e-12)
        np.testing.assert_allclose(strategy.sigma, sigma, rtol=1e-12)


def test_sigma_changes_by_a_fifth_at_most() -> None:
    strategy, rng = begin(PGPE(popsize=2, lr_sigma=1e6), [0.0, 0.0, 0.0], loss=0.0)
    x = strategy.ask(rng)
    x[1] = 3 * x[0]  # the worse point is the wider one
    strategy.tell(x, np.array([0.0, 1.0]), rng)
    np.testing.assert_allclose(strategy.sigma, 0.5 * 0.8)


@pytest.mark.parametrize("kind", [OpenAIES, PGPE])
def test_only_the_order_of_losses_counts(kind: Any) -> None:
    plain = first(20, kind(), valley, [-1.2, 1.0])
    bent = first(20, kind(), lambda x: np.log1p(valley(x)) ** 3 - 7, [-1.2, 1.0])
    for a, b in zip(plain, bent, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [OpenAIES, PGPE])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_does_what_it_does_elsewhere(kind: Any, optimizer: str) -> None:
    """The center walks as a tensor does whose gradients are the estimates."""
    strategy, rng = begin(kind(optimizer, sigma=0.2), [1.0, -1.0])
    twin = torch.tensor([1.0, -1.0], dtype=torch.float64)
    chosen: Any = method(optimizer)
    plain = chosen.cls([twin], **chosen.options())
    for _ in range(8):
        x = strategy.ask(rng)
        strategy.tell(x, valley(x), rng)
        twin.grad = strategy.weights[0].grad.clone()
        plain.step()
        assert torch.equal(twin, strategy.weights[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pgpe_solves_with(optimizer: str) -> None:
    assert solved(PGPE(optimizer), bowl, 5, 1600, 0.1, seeds=5) == 5


def test_solves() -> None:
    assert solved(OpenAIES("adam(lr=0.05)", sigma=0.1), bowl, 5, 1600, 0.1, seeds=5) == 5
    assert solved(OpenAIES("adam(lr=0.05)", sigma=0.1), valley, 2, 4000, 0.1, seeds=5) >= 4
    assert solved(PGPE("sgd(lr=5.0)", lr_sigma=0.5), bowl, 5, 3000, 1e-4, seeds=5) == 5


def test_the_center_stays_in_the_box() -> None:
    strategy, rng = begin(OpenAIES("sgd(lr=100.0)"), [1.0, -1.0], BOX)
    for _ in range(5):
        x = strategy.ask(rng)
        assert np.abs(x).max() <= 2
        strategy.tell(x, x[:, 0], rng)
    assert strategy.mu[0] == -2
    assert strategy.ask(rng)[:, 0].max() > -2, "half of the points on the wall, the other half inside"


@pytest.mark.parametrize("kind", [OpenAIES, PGPE])
def test_the_start_is_evaluated_beside_the_first_generation(kind: Any) -> None:
    unknown, rng = begin(kind(), [1.0, 2.0])
    known, other = begin(kind(), [1.0, 2.0], loss=3.0)
    x, y = unknown.ask(rng), known.ask(other)
    assert x[0].tolist() == [1.0, 2.0]
    np.testing.assert_array_equal(x[1:], y)
    unknown.tell(x, valley(x), rng)
    known.tell(y, valley(y), other)
    np.testing.assert_array_equal(unknown.mu, known.mu)


def test_ends() -> None:
    *_, last = generations(PGPE("sgd(lr=5.0)", lr_sigma=0.5, tolx=1e-2), bowl, [1.0, 1.0])
    assert last[2].reason is Reason.CONVERGED
    assert "tolx" in last[2].message
    for kind in (OpenAIES, PGPE):
        flat = list(generations(kind(patience=7), lambda x: np.full(len(x), 3.0), [1.0, 1.0]))
        assert len(flat) == 7
        assert flat[-1][2].reason is Reason.STALLED
        np.testing.assert_allclose(np.concatenate([x for x, _, _ in flat]).mean(axis=0), 1.0, atol=0.02)


def test_the_optimizer_in_any_form() -> None:
    """Text, a method, a class: one method, whose text reads back."""
    forms = ["adam(lr=0.1)", "adam( lr = .1 )", method("adam", lr=0.1), method(Adam, lr=0.1)]
    assert {OpenAIES(form) for form in forms} == {OpenAIES("adam(lr=0.1)")}
    assert str(OpenAIES(forms[2])) == "openai_es(optimizer='adam(lr=0.1)')"
    assert method(str(OpenAIES(forms[2]))) == OpenAIES("adam(lr=0.1)")
    assert (str(OpenAIES()), method("openai_es(optimizer=None)")) == ("openai_es", OpenAIES())
    assert OpenAIES(Adam).optimizer == "adam"


def test_refuses() -> None:
    with pytest.raises(MethodError, match=r"adm"):
        PGPE("adm(lr=0.1)")
    with pytest.raises(MethodError, match=r"pgpe: expected an even popsize \(mirrored pairs\), got 7"):
        PGPE(popsize=7)
    for wrong in ("cma.cmaes", "scipy.slsqp", "torch.lbfgs", "adam(steps=3)", "adam(steps=3) > sgd(lr=0.1)"):
        with pytest.raises(MethodError, match=r"openai_es: expected one torch optimizer .* got '"):
            OpenAIES(wrong)
    with pytest.raises(MethodError, match=r"learning rate: -1.0"):
        hybridopt.minimize(lambda x: float((x**2).sum()), np.ones(2), OpenAIES("adam(lr=-1.0)"), budget=50)


def test_unfinished_numbers_never_reach_the_center() -> None:
    strategy, rng = begin(OpenAIES(popsize=4), [1.0, 2.0], loss=0.0)
    x = strategy.ask(rng)
    strategy.tell(x, np.array([math.inf, 1.0, math.inf, 2.0]), rng)
    assert np.isfinite(strategy.mu).all()
    assert strategy.mu.tolist() != [1.0, 2.0]


@pytest.mark.parametrize("kind", [OpenAIES, PGPE])
def test_by_default_steps_follow_sigma(kind: Any) -> None:
    """The same loss in a box of any size is searched on the same path up to scale, each weight in its own."""

    def path(width: Any) -> Any:
        box: Any = np.stack([-width, width], axis=1)
        return np.concatenate(first(25, kind(popsize=6), lambda x: bowl(x / width), 0.3 * width, box)) / width

    middle = path(np.ones(2))
    assert np.abs(middle[-6:].mean(0) - 0.3).max() > 0.1
    for width in (np.full(2, 1e-3), np.full(2, 1e3), np.array([1e-3, 1e3])):
        np.testing.assert_allclose(path(width), middle, rtol=1e-9, atol=1e-12)
    # sigma of an unbounded weight is 0.5
    free, given = (first(10, kind(optimizer), valley, [-1.2, 1.0]) for optimizer in (None, "adam(lr=0.05)"))
    for a, b in zip(free, given, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [OpenAIES, PGPE])
@pytest.mark.parametrize("optimizer", ["torch.sparse_adam(lr=0.05)", "torch.muon(lr=0.05)"])
def test_optimizers_of_other_gradients_are_refused_at_the_start(kind: Any, optimizer: str) -> None:
    with pytest.raises(
        MethodError, match=rf"{kind.name}: expected an optimizer that takes dense gradients .*got"
    ):
        Run(bowl, np.zeros(3), kind(optimizer), budget=100)


class TwoMatrices(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = torch.nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64))
        self.b = torch.nn.Parameter(10 * torch.randn(2, 4, generator=generator, dtype=torch.float64))


def far(model: torch.nn.Module) -> torch.Tensor:
    return sum((p - 1).square().sum() for p in model.parameters())  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [OpenAIES, PGPE])
@pytest.mark.parametrize(
    "optimizer", ["muon(lr=0.05)", "lamb(lr=0.05)", "adafactor(lr=0.05)", "adam(lr=0.1, flatten=True)"]
)
def test_optimizers_see_the_weights_as_the_model_has_them(kind: Any, optimizer: str) -> None:
    """A generation's step is that of the optimizer on tensors of these shapes, given the same gradients."""
    model = TwoMatrices()
    run = Run(far, model, kind(optimizer, sigma=0.1), budget=400, seed=1)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    name, _, rest = optimizer.partition("(")
    options = {
        key: float(value)
        for key, _, value in (o.partition("=") for o in rest[:-1].split(", "))
        if key == "lr"
    }
    cls = {"muon": "Muon", "lamb": "LAMB", "adafactor": "Adafactor", "adam": "Adam"}[name]
    theirs = getattr(hybridopt.optim, cls)(twins, **options)
    with run:
        strategy: Any = run.optimizer.strategy  # type: ignore[attr-defined]
        given: list[np.ndarray[Any, Any]] = []
        gradient = strategy.gradient
        strategy.gradient = lambda *at: given.append(gradient(*at)) or given[-1]  # type: ignore[func-returns-value]
        for _ in range(6):
            run.step()
            for twin, part in zip(twins, np.split(given[-1], [6]), strict=True):
                twin.grad = torch.from_numpy(part.copy()).view(twin.shape)
            theirs.step()
            flat = torch.cat([twin.detach().reshape(-1) for twin in twins]).numpy()
            np.testing.assert_allclose(strategy.mu, flat, rtol=1e-12, atol=1e-12)
        state = copy.deepcopy(run.optimizer.state_dict())
        for _ in range(3):
            run.step()
        end = strategy.mu.copy()
    again = Run(far, TwoMatrices(), kind(optimizer, sigma=0.1), budget=400, seed=1)
    with again:
        again.optimizer.load_state_dict(state)
        for _ in range(3):
            again.step()
        np.testing.assert_array_equal(again.optimizer.strategy.mu, end)  # type: ignore[attr-defined]
