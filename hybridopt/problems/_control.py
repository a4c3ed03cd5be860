"""Cart-pole and acrobot: policies judged by simulation, many policies and starts at once.

The dynamics are those of gymnasium's CartPole-v1 and Acrobot-v1 (`tests/problems/test_control.py` compares them step by
step): Barto, Sutton, Anderson, IEEE SMC 13 (1983), with Florian's correction, and Sutton and Barto's book version of
the acrobot (Sutton, NIPS 1995).
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from hybridopt.problems._problem import Problem

STEPS = 500


def cartpole(seed: int = 42) -> Problem:
    """A linear policy of four weights that balances a pole on a cart: push right where w · (x, ẋ, θ, θ̇) > 0.

    The loss is 1 − (mean number of steps before the pole falls or the cart leaves) / 500, over 16 starts; 0 = all stand
    for 500 steps. Piecewise constant: no gradient. Half of all policies in the box fall within 30 steps. `loss` takes
    many policies at once, shape (..., 4), for about the price of one. `score` is the mean number of steps from 64
    other starts.

    Args:
        seed: of the policy at the start, normal with deviation 0.1, and of the simulated starts, uniform ±0.05.

    Example:
        >>> import torch
        >>> from hybridopt.problems import cartpole
        >>> problem = cartpole()
        >>> problem.loss(torch.tensor([0.1, 0.4, 1.0, 0.8], dtype=torch.float64)).item()
        0.0
    """
    generator = torch.Generator().manual_seed(seed)
    starts = 0.1 * torch.rand(80, 4, dtype=torch.float64, generator=generator) - 0.05

    return Problem(
        name="cartpole",
        loss=lambda x: 1 - cartpole_steps(x, starts[:16]).mean(-1) / STEPS,
        target=0.1 * torch.randn(4, dtype=torch.float64, generator=generator),
        bounds=(-1.0, 1.0),
        best_known=0.0,
        score=lambda x: cartpole_steps(x.detach(), starts[16:]).mean().item(),
        description="a linear policy that balances a pole on a cart",
    )


def acrobot(seed: int = 42) -> Problem:
    """A linear policy of six weights that swings a two-link arm up by the torque of its elbow: sign(w · observation).

    The observation is cos θ₁, sin θ₁, cos θ₂, sin θ₂, θ̇₁, θ̇₂. The loss is (mean number of steps until the tip is one
    link's length above the shoulder) / 500, over 8 starts, at most 500 steps of 0.2 s; from the start policy mostly 1.
    Piecewise constant: no gradient. One evaluation takes tenths of a second, one of a hundred
    policies, shape (100, 6), little more. `score` is minus the mean number of steps from 64 other starts.

    Args:
        seed: of the policy at the start, normal with deviation 0.1, and of the simulated starts, uniform ±0.1.

    Example:
        >>> import torch
        >>> from hybridopt.problems import acrobot
        >>> problem = acrobot()
        >>> problem.loss(torch.tensor([0.0, 0, 0, 0, 0.5, 1], dtype=torch.float64)).item() < 0.5
        True
    """
    generator = torch.Generator().manual_seed(seed)
    starts = 0.2 * torch.rand(72, 4, dtype=torch.float64, generator=generator) - 0.1

    return Problem(
        name="acrobot",
        loss=lambda x: acrobot_steps(x, starts[:8]).mean(-1) / STEPS,
        target=0.1 * torch.randn(6, dtype=torch.float64, generator=generator),
        bounds=(-1.0, 1.0),
        score=lambda x: -acrobot_steps(x.detach(), starts[8:]).mean().item(),
        description="a linear policy that swings up a two-link arm",
    )


def cartpole_steps(policy: Tensor, starts: Tensor) -> Tensor:
    """How long each start stands, shape (..., starts), at most 500; policy: (..., 4); starts: (starts, 4)."""
    state = starts.expand(*policy.shape[:-1], *starts.shape)
    alive = torch.ones_like(state[..., 0])
    steps = torch.zeros_like(alive)
    for _ in range(STEPS):
        steps = steps + alive
        state = cartpole_step(state, torch.where((state * policy[..., None, :]).sum(-1) > 0, 1.0, -1.0))
        alive = alive * ((state[..., 0].abs() <= 2.4) & (state[..., 2].abs() <= pi / 15))
    return steps


def acrobot_steps(policy: Tensor, starts: Tensor) -> Tensor:
    """How long each start needs, shape (..., starts), at most 500; policy: (..., 6); starts: (starts, 4)."""
    state = starts.expand(*policy.shape[:-1], *starts.shape)
    below = torch.ones_like(state[..., 0])
    steps = torch.zeros_like(below)
    for _ in range(STEPS):
        steps = steps + below
        angles, speeds = state[..., :2], state[..., 2:]
        seen = torch.stack([angles.cos(), angles.sin()], -1).flatten(-2)  # cos θ₁, sin θ₁, cos θ₂, sin θ₂
        state = acrobot_step(state, (torch.cat([seen, speeds], -1) * policy[..., None, :]).sum(-1).sign())
        height = -torch.cos(state[..., 0]) - torch.cos(state[..., 0] + state[..., 1])
        below = below * (height <= 1)
    return steps


def cartpole_step(state: Tensor, push: Tensor) -> Tensor:
    """0.02 s later, by Euler's method.

    Args:
        state: x, ẋ, θ, θ̇ in m and rad, shape (..., 4).
        push: −1 or 1 times 10 N, shape (...).
    """
    x, speed, angle, turn = state.unbind(-1)
    cart, pole, half = 1.0, 0.1, 0.5  # kg, kg, m
    mass = cart + pole
    sine, cosine = angle.sin(), angle.cos()
    force = (10 * push + pole * half * turn**2 * sine) / mass
    turning = (9.8 * sine - cosine * force) / (half * (4 / 3 - pole * cosine**2 / mass))
    moving = force - pole * half * turning * cosine / mass
    change = torch.stack([speed, moving, turn, turning], -1)
    after: Tensor = state + 0.02 * change
    return after


def acrobot_step(state: Tensor, torque: Tensor) -> Tensor:
    """0.2 s later, by one step of the classical Runge-Kutta method; angles in ±π, speeds limited.

    Args:
        state: θ₁ (0 = hanging), θ₂ (0 = straight), θ̇₁, θ̇₂, shape (..., 4).
        torque: of the elbow, N·m, shape (...).
    """
    h = 0.2
    k1 = _acrobot_change(state, torque)
    k2 = _acrobot_change(state + h / 2 * k1, torque)
    k3 = _acrobot_change(state + h / 2 * k2, torque)
    k4 = _acrobot_change(state + h * k3, torque)
    after = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    angles = torch.remainder(after[..., :2] + pi, 2 * pi) - pi
    return torch.cat(
        [angles, after[..., 2:3].clamp(-4 * pi, 4 * pi), after[..., 3:].clamp(-9 * pi, 9 * pi)], -1
    )


def _acrobot_change(state: Tensor, torque: Tensor) -> Tensor:
    """The derivative in time; both links: 1 kg, 1 m, centre of mass at 0.5 m, moment of inertia 1 kg·m²."""
    first, second, turn1, turn2 = state.unbind(-1)
    g = 9.8
    cosine, sine = second.cos(), second.sin()
    d1 = 0.25 + (1 + 0.25 + cosine) + 2
    d2 = 0.25 + 0.5 * cosine + 1
    phi2 = 0.5 * g * torch.sin(first + second)  # cos(a − π/2) = sin a
    phi1 = -0.5 * turn2**2 * sine - turn2 * turn1 * sine + 1.5 * g * first.sin() + phi2
    speeding2 = (torque + d2 / d1 * phi1 - 0.5 * turn1**2 * sine - phi2) / (1.25 - d2**2 / d1)
    speeding1 = -(d2 * speeding2 + phi1) / d1
    return torch.stack([turn1, turn2, speeding1, speeding2], -1)
