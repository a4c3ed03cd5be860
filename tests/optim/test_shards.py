"""DTensors: steps on local shards, in one process and in two."""

from __future__ import annotations

import copy
import math
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

from hybridopt.errors import NonFiniteLoss
from tests.optim.test_precision import NAMES, make

USED = "fused (llvm), on local shards"


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


@pytest.mark.parametrize("name", ["Adam", "NAdam"])
def test_states_stay_the_same_objects(mesh: DeviceMesh, name: str) -> None:
    """Also those that were loaded; making new DTensors takes ten times as long as the step."""
    params = spread(mesh, values(torch.float32))
    optimizer = make(name, params)
    for load in (False, True):
        give(params, 0)
        optimizer.step()
        if load:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = [value for p in params for value in optimizer.state[p].values()]
        for _ in range(2):
            optimizer.step()
        after = [value for p in params for value in optimizer.state[p].values()]
        assert all(a is b for a, b in zip(before, after, strict=True))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"kahan_sum": True}, {"stochastic_rounding": True, "seed": 3}])
def test_late_gradients_and_late_groups(
    mesh: DeviceMesh, options: dict[str, Any], dtype: torch.dtype
) -> None:
    params = spread(mesh, values(dtype))
    references = [Parameter(v) for v in values(dtype)]
    mine, plain = make("AdamW", params[:2], **options), make("AdamW", references[:2], **options)
    for step in range(7):
        if step == 3:
            mine.add_param_group({"params": params[2:], "lr": 0.1})
            plain.add_param_group({"params": references[2:], "lr": 0.1})
        give(params, step)
        give(references, step)
        if step < 2:
            params[0].grad = references[0].grad = None
        mine.step()
        plain.step()
    assert mine._used == USED
    assert_same(mine, params, plain, references)


def test_counters_of_weights_without_dimensions_stay_plain(mesh: DeviceMesh) -> None:
    p: Any = Parameter(distribute_tensor(torch.tensor(2.0), mesh, [Replicate()]))
    for name in ("Adam", "NAdam", "ASGD"):
        optimizer = make(name, [p])
        for _ in range(2):
            p.grad = distribute_tensor(torch.tensor(1.0), mesh, [Replicate()])
            optimizer.step()
        for key, value in optimizer.state[p].items():
            assert isinstance(value, DTensor) == (key not in ("step", "mu_product", "eta", "mu")), key


def test_states_that_were_taken_away_begin_anew(mesh: DeviceMesh) -> None:
    params, references = spread(mesh, values(torch.float32)), [Parameter(v) for v in values(torch.float32)]
    mine, plain = make("Adam", params), make("Adam", references)
    for step in range(4):
        give(params, step)
        give(references, step)
        if step == 2:
            mine.state.clear()
            plain.state.clear()
        mine.step()
        plain.step()
    assert_same(mine, params, plain, references)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_clipping_and_skipping(mesh: DeviceMesh, name: str, implementation: str) -> None:
    """As plain tensors do; what is left out is counted by the optimizer that the user holds."""
    params, references = spread(mesh, values(torch.float64)), [Parameter(v) for v in values(torch.float64)]
    options: dict[str, Any] = {"max_grad_norm": 1.0, "nonfinite": "skip", "implementation": implementation}
    mine, plain = make(name, params, **options), make(name, references, **options)
    for step in range(5):
        give(params, step)
        give(references, step)
        if step == 2:
            mine.add_param_group({"params": spread(mesh, [torch.ones(3, dtype=torch.float64)])})
            plain.add_param_group({"params": [Parameter(torch.ones(3, dtype=torch.float64))]})
        if step in (1, 3):
            for p in (params[0], references[0]):
                p.grad[1, 2] = math.nan
        mine.step()
        plain.step()
    assert mine.skipped_steps == plain.skipped_steps == 2
    for p, q in zip(params, references, strict=True):
        torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-12, atol=1e-12)


def test_raise_names_the_weight(mesh: DeviceMesh) -> None:
    params = spread(mesh, values(torch.float32))
    optimizer = make("Adam", params, nonfinite="raise")
    give(params, 0)
    params[1].grad[0] = math.inf
    with pytest.raises(NonFiniteLoss, match="that of weight number 1 of group 0"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor(mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Which torch cannot step: to the bit as plain tensors one by one; its states are whole, and load."""
    params, references = spread(mesh, values(dtype)[:2]), [Parameter(v) for v in values(dtype)[:2]]
    params.append(Parameter(torch.ones(3, 2, dtype=dtype)))
    references.append(Parameter(torch.ones(3, 2, dtype=dtype)))
    mine, plain = make("Adafactor", params), make("Adafactor", references)
    for step in range(4):
        give(params, step)
        give(references, step)
        if step == 2:
            params[0].grad = references[0].grad = None
            saved = copy.deepcopy(mine.state_dict())
            mine = make("Adafactor", params)
            mine.load_state_dict(saved)
        mine.step()
        plain.step()
    assert "weights gathered one by one" in repr(mine)
    for p, q in zip(params, references, strict=True):
        assert torch.equal(whole(p.detach()), q.detach())
        assert all(torch.equal(mine.state[p][key], value) for key, value in plain.state[q].items())


@pytest.mark.parametrize("options", [
    {}, {"state_dtype": torch.float32}, {"kahan_sum": True}, {"stochastic_rounding": True, "seed": 3},
    {"max_grad_norm": 0.5, "nonfinite": "skip"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Adafactor", "LAMB", "Muon"])
def test_steps_of_whole_tensors(
    mesh: DeviceMesh, name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """To the bit as plain tensors, whatever is asked for; the states, too."""
    shapes = ((5, 4), (2, 3), (3, 2))
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    params, references = spread(mesh, first[:2]), [Parameter(v.clone()) for v in first]
    params.append(Parameter(first[2]))
    options = {**options, "implementation": "reference"}
    mine, plain = make(name, params, **options), make(name, references, **options)
    for step in range(4):
        give(params, step)
        give(references, step)
        if step == 1:
            params[1].grad = references[1].grad = None
        if step == 2 and "nonfinite" in options:
            for p in (params[0], references[0]):
                p.grad[1, 2] = math.nan
        mine.step()
        plain.step()
    assert mine.skipped_steps == plain.skipped_steps == ("nonfinite" in options)
    for p, q in zip(params, references, strict=True):
        assert torch.equal(whole(p.detach()), q.detach())
        assert set(mine.state[p]) == set(plain.state[q])
        for key, value in plain.state[q].items():
            told = mine.state[p][key]
            assert told.dtype == value.dtype, key
            assert torch.equal(whole(told), value), key
            if name != "Adafactor":
                assert isinstance(told, DTensor) == (isinstance(p, DTensor) and value.shape == q.shape)


def test_sparse_gradients_there_are_none(mesh: DeviceMesh) -> None:
    params = spread(mesh, values(torch.float32)[:1])
    optimizer = make("SparseAdam", params, max_grad_norm=1.0)
    give(params, 0)
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        optimizer.step()


TWO = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import Parameter
import hybridopt.optim
rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
tensors = [torch.randn(5, 4), torch.randn(1), torch.randn(7)]
gradients = [[torch.randn_like(t) for t in tensors] for _ in range(4)]
for name in ("AdamW", "Rprop", "Adagrad", "Adafactor"):
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
def whole(t):
    return t.full_tensor() if hasattr(t, "to_local") else t
sixteen = {"state_dtype": torch.float32}
for name, options in [
    *((name, {"max_grad_norm": 0.5, "nonfinite": "skip"}) for name in ("Adafactor", "LAMB", "Muon")),
    *((name, {"kahan_sum": True, **sixteen}) for name in ("Adafactor", "LAMB", "Muon")),
    ("Adafactor", {"stochastic_rounding": True, "seed": 3}),
]:
    dtype = torch.float32 if "nonfinite" in options else torch.bfloat16
    params = [Parameter(distribute_tensor(torch.full((5, 4), k + 1.0).to(dtype), mesh, [Shard(k)])) for k in (0, 1)]
    references = [Parameter(torch.full((5, 4), k + 1.0).to(dtype)) for k in (0, 1)]
    mine, plain = (getattr(hybridopt.optim, name)(ps, lr=0.01, **options) for ps in (params, references))
    for step, given in enumerate(gradients):
        for k, (p, q) in enumerate(zip(params, references)):
            g = (given[0] * (k + 1)).to(dtype)
            if step == 2 and k == 1 and "nonfinite" in options:
                g[4, 3] = float("nan")  # in the second shard
            p.grad, q.grad = distribute_tensor(g, mesh, [Shard(k)]), g
            if step in (0, 3):  # not yet summed
                p.grad = DTensor.from_local(g / 2, mesh, [Partial()])
        mine.step()
        plain.step()
    assert mine.skipped_steps == plain.skipped_steps == ("nonfinite" in options), name
    near = {"rtol": 1e-5, "atol": 1e-6}
    if name == "Muon":
        near = {"rtol": 1e-2, "atol": 1e-3}  # torch iterates in bfloat16, and sums shard by shard
    elif name == "Adafactor" and "nonfinite" not in options:
        near = {"rtol": 0, "atol": 0}
    for p, q in zip(params, references):
        lost = mine.state[p].get("kahan_comp"), plain.state[q].get("kahan_comp")
        assert (lost[0] is None) == (lost[1] is None) == ("kahan_sum" not in options), name
        a, b = whole(p).double(), q.double()
        if lost[0] is not None:
            assert any(map(torch.Tensor.any, map(whole, lost))), name
            a, b = a + whole(lost[0]).double(), b + lost[1].double()
        torch.testing.assert_close(a, b, msg=lambda text: name + str(options) + text, **near)
for name in ("LAMB", "Muon"):  # one process finds what is wrong, and does not wait for the other to look on
    params = [Parameter(distribute_tensor(tensors[0].clone(), mesh, [Shard(0)])) for _ in range(2)]
    mine = getattr(hybridopt.optim, name)(params, nonfinite="raise")
    g = torch.ones(5, 4)
    g[4, 3] = float("nan")
    params[0].grad = distribute_tensor(g, mesh, [Shard(0)])
    params[1].grad = DTensor.from_local(torch.ones(5, 4), mesh, [Partial()])
    try:
        mine.step()
        raise AssertionError(name)
    except hybridopt.errors.NonFiniteLoss as error:
        assert ("weight number 0" if rank else "on another process") in str(error), error
hybrid = init_device_mesh("cpu", (2, 1))  # replicas on both, each of one shard
def spread(tensors):
    first, second, third = tensors
    return [distribute_tensor(first, mesh, [Shard(0)]), distribute_tensor(second, mesh, [Replicate()]),
            distribute_tensor(third, hybrid, [Replicate(), Shard(0)])]
for name in ("SGD", "AdamW"):
    for nonfinite in ("skip", "raise"):
        options = {"lr": 0.1, "max_grad_norm": 0.7, "nonfinite": nonfinite, "implementation": sys.argv[3]}
        own, copied = Parameter(torch.ones(2)), Parameter(torch.ones(2))
        params = [*map(Parameter, spread([t.clone() for t in tensors])), own]
        references = [*(Parameter(t.clone()) for t in tensors), copied]
        mine = getattr(hybridopt.optim, name)(params, **options)
        plain = getattr(hybridopt.optim, name)(references, **options)
        for k, step in enumerate(gradients):
            step = [*(g.clone() for g in step), torch.full((2,), k + 1.0)]
            if k == 2:
                step[0][4, 0] = float("nan")  # in the second shard
            for p, q, g in zip(params, references, [*spread(step[:3]), step[3]]):
                p.grad, q.grad = g, step[[id(r) for r in references].index(id(q))]
            if k == 3:
                params[0].grad = references[0].grad = None
            texts = []
            for optimizer in (mine, plain):
                try:
                    optimizer.step()
                except hybridopt.errors.NonFiniteLoss as error:
                    texts.append(str(error))
            assert len(texts) == (2 if k == 2 and nonfinite == "raise" else 0), texts
            assert not texts or ("weight number 0" if rank else "on another process") in texts[0], texts
        assert mine.skipped_steps == plain.skipped_steps == (nonfinite == "skip")
        for p, q in zip(params, references):
            torch.testing.assert_close(p.full_tensor() if p is not own else p, q, rtol=1e-6, atol=1e-6)
for name, lr, dtype in (("SGD", 1.0, torch.bfloat16), ("LAMB", 1e-3, torch.bfloat16), ("SGD", 1 / 8, torch.float16)):
    noisy = torch.ones(4096, dtype=dtype)
    params = [Parameter(distribute_tensor(noisy.clone(), mesh, [kind])) for kind in (Shard(0), Replicate())]
    plain = Parameter(noisy.clone())
    options = {"stochastic_rounding": True, "implementation": sys.argv[3]}
    mine = getattr(hybridopt.optim, name)([*params, plain], lr=lr, **options)
    for _ in range(2):
        for p in params:
            p.grad = distribute_tensor(torch.full((4096,), 1e-3).to(dtype), mesh, p.placements)
        plain.grad = torch.full((4096,), 1e-3).to(dtype)
        mine.step()
    a, b = params[0].full_tensor().chunk(2)
    assert 0.3 < (a == b).float().mean() < 0.6, f"{name}: shards have their own noise"
    for replica in (params[1].to_local().detach(), plain.detach()):
        copies = [torch.empty_like(replica) for _ in range(2)]
        dist.all_gather(copies, replica)
        assert torch.equal(*copies), "replicas share it"
        assert replica.unique().numel() > 1
dist.barrier()
print("same", flush=True)
os._exit(0)  # gloo's threads may still run when the interpreter takes them down, which aborts the process
"""


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_two_processes(tmp_path: Path, implementation: str) -> None:
    """Uneven shards step as plain tensors do; noise differs between shards and is one for replicas."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    store = str(tmp_path / "store")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(rank), store, implementation],
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
