"""DTensors: steps on local shards, in one process and in two."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from hybridopt.errors import MethodError
from tests.optim.test_precision import NAMES, make

USED = "fused (numba), on local shards"


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def values(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype) for s in ((5, 4), (3,), (0, 2))]


def spread(mesh: DeviceMesh, tensors: list[torch.Tensor]) -> list[Any]:
    return [Parameter(distribute_tensor(t.clone(), mesh, [Shard(0)])) for t in tensors]


def give(params: list[Any], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = distribute_tensor(g, p.device_mesh, [Shard(0)]) if isinstance(p, DTensor) else g


def whole(t: Any) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_same(mine: Any, params: list[Any], plain: Any, references: list[Any]) -> None:
    for p, q in zip(params, references, strict=True):
        assert torch.equal(whole(p.detach()), q.detach())
        assert set(mine.state[p]) == set(plain.state[q])
        for name, value in plain.state[q].items():
            told = mine.state[p][name]
            assert isinstance(told, DTensor) == (isinstance(p, DTensor) and value.shape == q.shape)
            assert torch.equal(whole(told), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_every_rule(mesh: DeviceMesh, name: str, dtype: torch.dtype) -> None:
    """Also those that torch cannot step on DTensors (Rprop); to the bit as plain tensors; states are DTensors."""
    params, references = spread(mesh, values(dtype)), [Parameter(v.clone()) for v in values(dtype)]
    mine, plain = make(name, params), make(name, references)
    for step in range(4):
        give(params, step)
        give(references, step)
        if step == 2:
            for optimizer in (mine, plain):
                for group in optimizer.param_groups:
                    group["lr"] = 0.05
        mine.step()
        plain.step()
    assert mine._used == USED
    assert_same(mine, params, plain, references)


def test_checkpoint_and_new_memory(mesh: DeviceMesh) -> None:
    params, references = spread(mesh, values(torch.float32)), [Parameter(v) for v in values(torch.float32)]
    mine, plain = make("AdamW", params), make("AdamW", references)
    for step in range(6):
        if step == 2:
            others = spread(mesh, [whole(p.detach()) for p in params])
            saved = copy.deepcopy(mine.state_dict())
            params, mine = others, make("AdamW", others)
            mine.load_state_dict(saved)
        if step == 4:  # another local tensor, as a resharding leaves it
            params[0].data = distribute_tensor(whole(params[0].detach()).clone(), mesh, [Shard(0)])
        give(params, step)
        give(references, step)
        mine.step()
        plain.step()
    assert_same(mine, params, plain, references)


def test_gradient_with_another_placement(mesh: DeviceMesh) -> None:
    params, references = spread(mesh, values(torch.float32)), [Parameter(v) for v in values(torch.float32)]
    mine, plain = make("SGD", params), make("SGD", references)
    for placement in (Partial(), Replicate()):
        give(references, 0)
        for p, q in zip(params, references, strict=True):
            assert q.grad is not None
            p.grad = DTensor.from_local(q.grad.clone(), mesh, [placement])
        mine.step()
        plain.step()
    assert_same(mine, params, plain, references)


def test_some_weights_are_plain(mesh: DeviceMesh) -> None:
    extra, copied = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    params: list[Any] = [*spread(mesh, values(torch.float32)), extra]
    references = [*(Parameter(v) for v in values(torch.float32)), copied]
    mine, plain = make("Adam", params), make("Adam", references)
    for step in range(3):
        give(params, step)
        give(references, step)
        params[1].grad = references[1].grad = None
        mine.step()
        plain.step()
    assert params[1] not in mine.state
    assert_same(mine, params[2:], plain, references[2:])


def test_norms_are_refused(mesh: DeviceMesh) -> None:
    params = spread(mesh, values(torch.float32))
    optimizer = make("Adam", params, max_grad_norm=1.0)
    give(params, 0)
    with pytest.raises(MethodError, match="not supported for DTensors"):
        optimizer.step()


TWO = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
import hybridopt.optim
rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
tensors = [torch.randn(5, 4), torch.randn(1), torch.randn(7)]
gradients = [[torch.randn_like(t) for t in tensors] for _ in range(4)]
for name in ("AdamW", "Rprop", "Adagrad"):
    params = [Parameter(distribute_tensor(t.clone(), mesh, [Shard(0)])) for t in tensors]
    references = [Parameter(t.clone()) for t in tensors]
    mine = getattr(hybridopt.optim, name)(params, lr=0.01)
    plain = getattr(hybridopt.optim, name)(references, lr=0.01)
    for step in gradients:
        for p, q, g in zip(params, references, step):
            p.grad, q.grad = distribute_tensor(g, mesh, [Shard(0)]), g
        mine.step()
        plain.step()
    for p, q in zip(params, references):
        assert torch.equal(p.full_tensor(), q.detach()), name
        for key, value in plain.state[q].items():
            told = mine.state[p][key]
            assert torch.equal(told.full_tensor() if hasattr(told, "to_local") else told, value), (name, key)
dist.destroy_process_group()
print("same")
"""


@pytest.mark.slow
def test_two_processes_with_uneven_shards(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    store = str(tmp_path / "store")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(rank), store],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert out.strip().endswith("same")
