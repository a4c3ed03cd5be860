"""Autograd, threads and processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import hybridopt.optim
from hybridopt.engines import cpu
from tests.optim.side_by_side import COMPILED, OPTIONS, give

# -- autograd, threads, processes ----------------------------------------------------------------------------


def test_autograd_notices_the_write() -> None:
    for package in (torch.optim, hybridopt.optim):
        p = Parameter(torch.ones(3))
        optimizer: Any = package.Adam([p])
        for _ in range(3):
            p.grad = torch.ones(3)
            optimizer.step()
        loss = (p * p).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_inference_mode() -> None:
    for inside in (True, False):
        with torch.inference_mode(inside):
            p = torch.ones(3)
            p.grad = torch.ones(3)
        with torch.inference_mode():
            optimizer = hybridopt.optim.SGD([p], lr=0.25)
            optimizer.step()
            optimizer.step()
        assert p.tolist() == [0.5] * 3
        assert optimizer._used == COMPILED


def _big(threads: int, name: str = "Adam") -> Tensor:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shapes = (300_007, 3, 0, 70_000)
    params = [Parameter(torch.randn(s)) for s in shapes]
    optimizer = getattr(hybridopt.optim, name)(params, **OPTIONS.get(name, {}))
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    assert optimizer._used == COMPILED
    assert optimizer._plans[0].parallel
    states = [v.flatten() for p in params for v in optimizer.state[p].values()]
    return torch.cat([*(p.detach().flatten() for p in params), *states])


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "ASGD", "Rprop"])
def test_same_bits_with_any_number_of_threads(name: str) -> None:
    one = _big(1, name)
    assert torch.equal(one, _big(2, name))
    assert torch.equal(one, _big(5, name))


def test_the_pieces_of_a_step_cover_everything_once() -> None:
    """Also where large and small tensors take turns."""
    params = [Parameter(torch.zeros(n)) for n in (200_000, 10, 200_000, 10, 0, 65_536, 65_537)]
    optimizer = hybridopt.optim.SGD(params)
    give(params, 0)
    optimizer.step()
    assert optimizer._plans is not None
    pieces = optimizer._plans[0]._cut()  # type: ignore[attr-defined]
    rows = [tuple(pieces[i : i + 3]) for i in range(0, len(pieces), 3)]
    for t, p in enumerate(params):
        covered = sorted((start, start + count) for tensor, start, count in rows if tensor == t)
        assert [a for a, _ in covered] + [p.numel()] == [0] + [b for _, b in covered]
    assert max(count for *_, count in rows) <= 1 << 16


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("name", ["SGD", "Rprop"])
def test_pieces_are_stepped_once_by_torchs_threads_and_by_ours(
    name: str, openmp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, calls = cpu._openmp(), 0
    if openmp and begin is None:
        pytest.skip("torch has no threads that we know")

    def counted(*arguments: int) -> None:
        nonlocal calls
        calls += 1
        begin(*arguments)  # type: ignore[misc]

    expected = _big(1, name)
    monkeypatch.setattr(cpu, "_openmp", lambda: counted if openmp else None)
    assert torch.equal(_big(3, name), expected)
    assert calls == (2 if openmp else 0)  # the first step makes the states


@pytest.mark.slow
def test_nothing_that_a_parallel_step_reads_is_freed() -> None:
    """In a process that overwrites freed memory."""
    code = """
import torch, hybridopt
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(1 << 18))
optimizer = hybridopt.optim.Adam([p])
for step in range(1, 6):
    p.grad = torch.ones(1 << 18)
    optimizer.step()
    assert optimizer.state[p]["step"] == step, (step, optimizer.state[p]["step"])
assert optimizer._plans[0].parallel
"""
    environment = {**os.environ, "PYTHONMALLOC": "debug"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_sum_of_squares_is_the_same_for_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(n, generator=generator)) for n in (200_000, 3, 150_001)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer = hybridopt.optim.SGD(params, max_grad_norm=1e9)
    optimizer.step()
    assert optimizer._plans is not None
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(optimizer._plans[0].square_sum())
    gradients = [p.grad.double() for p in params if p.grad is not None]
    assert found[0] == pytest.approx(sum(float(g.square().sum()) for g in gradients), rel=1e-13)
    assert found[1:] == found[:1] * 2


def test_two_threads_with_their_own_optimizers() -> None:
    expected = _big(2)
    results: list[Any] = [None, None]

    def work(i: int) -> None:
        generator = torch.Generator().manual_seed(i)
        params = [Parameter(torch.randn(270_000, generator=generator)) for _ in range(2)]
        optimizer = hybridopt.optim.Adam(params)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        results[i] = (torch.cat([p.detach() for p in params]), optimizer._used)

    alone = []
    for i in range(2):
        work(i)
        alone.append(results[i][0])
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b[0]) and b[1] == COMPILED for a, b in zip(alone, results, strict=True))
    assert torch.equal(expected, _big(2))


def _one_parallel_step(params: list[Parameter], optimizer: Any) -> None:
    """torch's own threads do not survive a fork: only the step may use several."""
    for p in params:
        p.grad = torch.ones(p.shape)
    torch.set_num_threads(2)
    optimizer.step()
    torch.set_num_threads(1)


def _child(params: list[Parameter], optimizer: Any, queue: Any) -> None:
    _one_parallel_step(params, optimizer)
    queue.put((optimizer._used, params[0][-1].item()))


def test_child_steps_after_its_parent_stepped_in_parallel() -> None:
    params = [Parameter(torch.zeros(300_000))]
    optimizer = hybridopt.optim.SGD(params, lr=1.0)
    _one_parallel_step(params, optimizer)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads about
        child = context.Process(target=_child, args=(params, optimizer, queue), daemon=True)
        child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == (COMPILED, -2.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, while it traces `return loss`
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_compiled_training_step(name: str) -> None:
    """torch.compile leaves our step out of its graphs, without a warning, and the result is the same."""

    def train(compiled: bool) -> tuple[list[Tensor], str]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = getattr(hybridopt.optim, name)(model.parameters(), lr=0.1)
        x = torch.ones(4, 3)

        def one() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(x).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(one, backend="eager") if compiled else one
        for _ in range(4):
            run()
        return [p.detach() for p in model.parameters()], optimizer._used

    (eager, _), (compiled, used) = train(False), train(True)
    assert used == COMPILED
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
