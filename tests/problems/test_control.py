"""Cart-pole and acrobot, step by step against gymnasium, and the policies' losses against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridopt import problems
from hybridopt.problems import _control
from hybridopt.problems._control import acrobot_step, cartpole_step

# The state after 30 actions drawn by np.random.default_rng(seed).integers(0, n, 30): gymnasium 1.4.0, `env.unwrapped`
# with its `state` set to the start.
RECORDED = {
    "CartPole-v1": (
        (cartpole_step, [-1, 1], 0, [0.01, -0.02, 0.03, -0.04]),
        [0.4247994971537044, 1.9383810859510546, -0.708263933371858, -3.9875099586707035],
    ),
    "Acrobot-v1": (
        (acrobot_step, [-1, 0, 1], 1, [0.05, -0.08, 0.02, 0.09]),
        [0.13476893609338014, -0.26602039666420607, 0.6972892103377208, -1.6752880977600997],
    ),
}


@pytest.mark.parametrize("name", list(RECORDED))
def test_thirty_steps_as_gymnasium_recorded_them(name: str) -> None:
    (step, forces, seed, start), end = RECORDED[name]
    state = torch.tensor(start, dtype=torch.float64)
    for action in np.random.default_rng(seed).integers(0, len(forces), 30):
        state = step(state, torch.tensor(float(forces[action]), dtype=torch.float64))
    np.testing.assert_allclose(state.numpy(), end, rtol=1e-11)


@pytest.mark.parametrize("name", list(RECORDED))
def test_every_step_against_gymnasium(name: str) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    (step, forces, _, _), _ = RECORDED[name]
    env = gymnasium.make(name).unwrapped
    rng = np.random.default_rng(5)
    for size in (0.05, 1.0, 30.0):  # 30: angles wrap, speeds are limited
        env.reset(seed=0)
        state = rng.uniform(-size, size, 4)
        env.state = state.copy()
        ended = []
        for action in rng.integers(0, len(forces), 40):
            told = step(torch.tensor(np.array(env.state)), torch.tensor(float(forces[action])))
            _, _, terminated, _, _ = env.step(int(action))
            np.testing.assert_allclose(told.numpy(), env.state, rtol=1e-12, atol=1e-12)
            ended.append(terminated)
            env.steps_beyond_terminated = None  # it would warn
        assert size != 30.0 or any(ended)


def steps_by_loop(name: str, policy: np.ndarray, start: np.ndarray) -> int:
    state = torch.tensor(start)
    for count in range(1, 501):
        x, v, angle, turn = state.tolist()
        if name == "cartpole":
            state = cartpole_step(state, torch.tensor(1.0 if policy @ [x, v, angle, turn] > 0 else -1.0))
            ended = abs(float(state[0])) > 2.4 or abs(float(state[2])) > np.deg2rad(12)
        else:
            seen = [np.cos(x), np.sin(x), np.cos(v), np.sin(v), angle, turn]
            state = acrobot_step(state, torch.tensor(np.sign(policy @ seen)))
            first, second = state.tolist()[:2]
            ended = -np.cos(first) - np.cos(first + second) > 1
        if ended:
            return count
    return 500


@pytest.mark.parametrize(
    ("name", "starts", "size", "policies"),
    [
        ("cartpole", 16, 0.05, [[0.1, 0.4, 1.0, 0.8], [0.0, 0.0, 1.0, 0.0], [0.5, -0.2, 0.3, 0.1]]),
        ("acrobot", 8, 0.1, [[0.0, 0.0, 0.0, 0.0, 0.5, 1.0], [0.1, 0.1, 0.0, 0.0, 0.0, 0.0]]),
    ],
)
def test_losses_count_steps(name: str, starts: int, size: float, policies: list[list[float]]) -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = 2 * size * torch.rand(64 + starts, 4, dtype=torch.float64, generator=generator) - size
    count = {"cartpole": _control.cartpole_steps, "acrobot": _control.acrobot_steps}[name]
    x = torch.tensor(policies, dtype=torch.float64)
    steps = count(x, drawn[:starts])
    assert steps.shape == (len(policies), starts)
    looped = [steps_by_loop(name, np.array(policies[0]), start) for start in drawn[: starts // 2].numpy()]
    assert steps[0, : starts // 2].tolist() == looped
    assert steps[-1, 0] == steps_by_loop(name, np.array(policies[-1]), drawn[0].numpy())
    problem = problems.get(name, seed=3)
    share = steps.mean(1) / 500
    torch.testing.assert_close(problem.loss(x), 1 - share if name == "cartpole" else share)
    assert problem.target.shape == x[0].shape


def test_score_is_judged_from_other_starts() -> None:
    problem = problems.get("cartpole", seed=3)
    falls = torch.tensor([0.5, -0.2, 0.3, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    drawn = 0.1 * torch.rand(80, 4, dtype=torch.float64, generator=generator) - 0.05
    assert problem.score(falls) == pytest.approx(_control.cartpole_steps(falls, drawn[16:]).mean().item())
    assert problem.score(torch.tensor([0.1, 0.4, 1.0, 0.8], dtype=torch.float64)) == 500


def test_vmap_and_seeds() -> None:
    first, again, other = (problems.get("cartpole", seed) for seed in (0, 0, 1))
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.target, other.target)
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.func.vmap(first.loss)(x), first.loss(x))
    assert torch.equal(first.loss(x), again.loss(x))
    assert not torch.equal(first.loss(x), other.loss(x))


def test_random_policies_fall() -> None:
    problem = problems.get("cartpole", seed=1)
    x = 2 * torch.rand(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    told = problem.loss(x)
    assert problem.best_known == 0 < told.min() < 0.5 < told.median()
