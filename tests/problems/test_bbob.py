"""The BBOB functions: values of package ioh, the optimum, gradients, batches, and names with options.

bbob_ioh.json is written by benchmarks/bbob_reference.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import problems
from hybridopt.problems._bbob_instances import Instance, rotation, uniform

TABLE = json.loads(Path(__file__).with_name("bbob_ioh.json").read_text())
EVERY = pytest.mark.parametrize("f", range(1, 25))


@EVERY
def test_values_of_ioh_to_1e_9(f: int) -> None:
    rows = [row for row in TABLE["rows"] if row[0] == f]
    assert len(rows) == 16
    for _, d, instance, f_opt, *values in rows:
        problem = problems.get(f"bbob(f={f}, d={d}, instance={instance})")
        assert problem.best_known == f_opt
        points = torch.tensor(TABLE["points"][str(d)], dtype=torch.float64)
        told = problem.loss(points)
        assert told.dtype == torch.float64
        np.testing.assert_allclose(told.numpy(), values, rtol=1e-9, atol=1e-9)


@EVERY
@pytest.mark.parametrize("d", [2, 7])
def test_the_optimum_is_where_it_is_said_to_be(f: int, d: int) -> None:
    for instance in (1, 4):
        at = Instance(f, d, instance)
        problem = problems.get(f"bbob(f={f}, d={d}, instance={instance})")
        assert at.x_opt.shape == (d,)
        assert at.x_opt.abs().max() <= 5
        assert problem.loss(at.x_opt).item() == pytest.approx(at.f_opt, abs=1e-9)
        generator = torch.Generator().manual_seed(f)
        for size in (1e-3, 1e-1, 1, 10):
            near = at.x_opt + size * torch.randn(200, d, dtype=torch.float64, generator=generator)
            assert problem.loss(near.clamp(-5, 5)).min() >= at.f_opt


@EVERY
def test_gradient_is_finite_where_it_is_not_defined(f: int) -> None:
    at = Instance(f, 3, 2)
    loss = problems.get(f"bbob(f={f}, d=3, instance=2)").loss
    for x in (torch.zeros(3, dtype=torch.float64), at.x_opt.clone()):
        loss(x.requires_grad_()).backward()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("f", [f for f in range(1, 25) if f != 23])  # f23 has corners at every step of 2^-32
def test_gradient_agrees_with_differences(f: int) -> None:
    loss = problems.get(f"bbob(f={f}, d=3, instance=2)").loss
    step = 1e-8 if f in (16, 19) else 1e-6  # their waves are short
    stencil = step * torch.eye(3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(f)
    for _ in range(5):
        x = 10 * torch.rand(3, dtype=torch.float64, generator=generator) - 5
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x)
        differences = (loss(x + stencil) - loss(x - stencil)).detach() / (2 * step)
        assert torch.allclose(gradient, differences, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_the_step_function_has_no_slope_but_the_penalty() -> None:
    loss = problems.get("bbob(f=7, d=5)").loss
    x = torch.tensor([1.0, 2.0, -3.0, 4.0, 6.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(x), x)
    assert gradient.tolist() == [0, 0, 0, 0, 2]


@EVERY
def test_a_batch_and_vmap_tell_what_single_points_tell(f: int) -> None:
    loss = problems.get(f"bbob(f={f}, d=4, instance=1)").loss
    x = 10 * torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(f)) - 5
    one_by_one = torch.stack([loss(row) for row in x])
    assert one_by_one.shape == (6,)
    for told in (loss(x), torch.func.vmap(loss)(x), loss(x.view(2, 3, 4)).flatten()):
        torch.testing.assert_close(told, one_by_one, rtol=1e-12, atol=1e-10)


def test_rotations_are_orthogonal_and_numbers_uniform() -> None:
    turn = rotation(12, 7)
    np.testing.assert_allclose(turn @ turn.T, np.eye(12), atol=1e-12)
    numbers = uniform(5000, 3)
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02
    assert np.array_equal(uniform(5, 0), uniform(5, 1))  # a seed below 1 counts as 1


def test_start_depends_on_the_seed_and_lies_in_the_middle_of_the_box() -> None:
    starts = [problems.get("bbob(f=3, d=10)", seed).target for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert starts[0] is not starts[1]
    assert not torch.equal(starts[0], starts[2])
    assert max(float(s.abs().max()) for s in starts) <= 4


def test_a_method_solves_it_by_name_in_batches() -> None:
    problem = problems.get("bbob(f=1, d=5, instance=2)", seed=3)
    result = hybridopt.minimize(
        problem.loss, problem.target, "cmaes(sigma=2)", budget=2000, seed=0, bounds=problem.bounds
    )
    assert result.best_loss - problem.best_known < 1e-8
    assert (problems.bbob_targets(problem.best_known) >= result.best_loss).all()


def test_targets_run_from_100_to_1e_8_above_the_optimum() -> None:
    targets = problems.bbob_targets(0.0)
    assert targets.shape == (51,)
    np.testing.assert_allclose(targets[[0, 5, 50]], [100, 10, 1e-8])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("bbob(f=25)", "expected f to be a whole number from 1 to 24, got 25"),
        ("bbob(d=1)", "expected d to be a whole number from 2 to 40, got 1"),
        ("bbob(d=2.0)", "expected d to be a whole number"),
        ("bbob(instance=0)", "expected instance to be"),
        ("bbob(dim=2)", "has no option 'dim'; nearest: d"),
        (
            "bbob(8)",
            r"expected a name with options like bbob\(f=8, d=5\), got 'bbob\(8\)'; known: f, d, instance",
        ),
        ("bbob(f=8", "expected a name with options"),
        ("bbob(f=os)", "expected a name with options"),
        ("bbbob(f=8)", "unknown name"),
    ],
)
def test_wrong_names_and_options(name: str, what: str) -> None:
    with pytest.raises(problems.ProblemError, match=what):
        problems.get(name)
