"""Constructors and state dicts are those of torch.optim."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import hybridopt.optim
from hybridopt.errors import MethodError
from tests.optim.side_by_side import COMPILED, NAMES, assert_same, both, carried, give, pair

# -- constructors and state dicts ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    mine = inspect.signature(getattr(hybridopt.optim, name).__init__).parameters
    torchs = inspect.signature(getattr(torch.optim, name).__init__).parameters
    kept = {key: p for key, p in mine.items() if key in torchs}
    assert list(kept) == list(torchs)
    assert [(p.kind, p.default) for p in kept.values()] == [(p.kind, p.default) for p in torchs.values()]
    assert set(mine) - set(torchs) <= {"fused", "options"}
    assert mine["options"].kind is inspect.Parameter.VAR_KEYWORD
    assert "fused" in torchs or mine["fused"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_go_both_ways(name: str) -> None:
    """ours -> torch -> ours, each continuing where the other stopped; no group key that torch lacks."""
    case = pair(name)
    ours, params, theirs, references = case
    both(case, range(3))
    assert ours._used == COMPILED
    mine, torchs = ours.state_dict(), theirs.state_dict()
    assert [set(g) for g in mine["param_groups"]] == [set(g) for g in torchs["param_groups"]]
    assert {k: set(v) for k, v in mine["state"].items()} == {k: set(v) for k, v in torchs["state"].items()}
    theirs.load_state_dict(copy.deepcopy(mine))
    ours.load_state_dict(copy.deepcopy(torchs))
    both(case, range(3, 6))
    assert ours._used == COMPILED
    assert_same(case)


def test_hooks_of_a_load() -> None:
    """What a hook before made of the state dict is what is loaded, in its precision; one after has the last word."""
    narrow = [Parameter(torch.zeros(2, 3).bfloat16()), Parameter(torch.zeros(4).bfloat16())]
    saved = hybridopt.optim.Adam(narrow, amsgrad=True)
    for p in narrow:
        p.grad = torch.full_like(p, 0.3)
    saved.step()
    for entry in saved.state.values():
        entry["exp_avg"] = entry["exp_avg"].float() + 2**-20
    loaded = hybridopt.optim.Adam([Parameter(torch.zeros_like(p)) for p in reversed(narrow)])

    def turned(_: object, told: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "amsgrad": False} for group in told["param_groups"]]
        entries = {
            1 - i: {k: v for k, v in e.items() if k != "max_exp_avg_sq"} for i, e in told["state"].items()
        }
        return {"state": entries, "param_groups": groups}

    def doubled(optimizer: Any) -> None:
        for entry in optimizer.state.values():
            entry["exp_avg"] *= 2

    loaded.register_load_state_dict_pre_hook(turned)
    loaded.register_load_state_dict_post_hook(doubled)
    loaded.load_state_dict(saved.state_dict())
    for p, q in zip(reversed(narrow), loaded.param_groups[0]["params"], strict=True):
        told = loaded.state[q]
        assert set(told) == {"step", "exp_avg", "exp_avg_sq"}
        assert told["exp_avg"].dtype is torch.float32
        assert torch.equal(told["exp_avg"], 2 * saved.state[p]["exp_avg"])
        q.grad = torch.ones_like(q)
    for _ in range(2):
        loaded.step()
    assert loaded._used == COMPILED


@pytest.mark.parametrize("name", ["ASGD", "NAdam"])
def test_numbers_that_torch_narrowed(name: str) -> None:
    """torch gives them the dtype of the weight when it resumes; they are single numbers, and are taken as float32."""
    references = [Parameter(torch.ones(3).bfloat16())]
    theirs = getattr(torch.optim, name)(references, lr=0.1)
    for _ in range(2):
        references[0].grad = torch.ones_like(references[0])
        theirs.step()
        theirs.load_state_dict(copy.deepcopy(theirs.state_dict()))
    params = [Parameter(references[0].detach().clone())]
    ours = getattr(hybridopt.optim, name)(params, lr=0.1)
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        params[0].grad = torch.ones_like(params[0])
        ours.step()
    assert ours._used == COMPILED


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "numbers"), [("ASGD", ("eta", "mu")), ("NAdam", ("mu_product",))])
def test_numbers_that_loading_widens(name: str, numbers: tuple[str, ...], default: torch.dtype) -> None:
    """torch casts them, but not `step`, to float64; it then rounds those of ASGD anew, and those of NAdam no more."""
    options = {"t0": 2, "lambd": 0.1, "lr": 0.1} if name == "ASGD" else {"momentum_decay": 0.3}
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        case = pair(name, **options)
        both(case, range(3))
        case[0].load_state_dict(copy.deepcopy(case[2].state_dict()))
        case[2].load_state_dict(copy.deepcopy(case[2].state_dict()))
        both(case, range(3, 30))
    finally:
        torch.set_default_dtype(before)
    entry = case[0].state[case[1][0]]
    assert {entry[key].dtype for key in numbers} == {torch.float64}
    assert entry["step"].dtype is default
    assert case[0]._used == COMPILED
    assert_same(case)


@pytest.mark.parametrize("how", ["torch.save", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_between_steps(name: str, how: str) -> None:
    """The identical path, bit for bit."""
    ours, params, _, _ = pair(name, dtype=torch.float32)
    for k in range(3):
        give(params, k)
        ours.step()
    others, other = carried(how, params, ours)
    assert other.implementation == "auto"
    for k in range(3, 6):
        for optimizer, weights in ((ours, params), (other, others)):
            give(weights, k)
            optimizer.step()
    assert other._used == COMPILED
    for p, q in zip(params, others, strict=True):
        assert p is not q
        assert torch.equal(p, q)
        assert all(torch.equal(ours.state[p][key], other.state[q][key]) for key in ours.state[p])


@pytest.mark.parametrize("implementation", ["reference", "foreach"])
def test_chosen_implementation_survives(implementation: str) -> None:
    """load_state_dict and add_param_group bring torch's flags; what was asked for stays."""
    ours, params, theirs, _ = pair("Adam")
    ours = hybridopt.optim.Adam(params, implementation=implementation)
    ours.load_state_dict(theirs.state_dict())
    assert [g["foreach"] for g in ours.param_groups] == [implementation == "foreach"]
    ours.add_param_group({"params": [Parameter(torch.ones(2))], "lr": 0.5})
    again = copy.deepcopy(ours)
    for optimizer in (ours, again):
        assert optimizer.implementation == implementation
        assert [g["foreach"] for g in optimizer.param_groups] == [implementation == "foreach"] * 2
    give(params, 1)
    ours.step()
    assert ours._used == {"reference": "torch's for-loop", "foreach": "torch's foreach"}[implementation]


def test_implementation_errors() -> None:
    p = [Parameter(torch.ones(1))]
    with pytest.raises(MethodError, match="expected one of auto, reference, foreach, fused, got 'fast'"):
        hybridopt.optim.RMSprop(p, implementation="fast")
    with pytest.raises(MethodError, match="contradicts foreach=True"):
        hybridopt.optim.RMSprop(p, foreach=True, implementation="fused")
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        hybridopt.optim.RMSprop(p, foreach=True, fused=True)


@pytest.mark.parametrize("change", ["lr", "state"])
@pytest.mark.parametrize("name", NAMES)
def test_what_changes_after_loading_into_a_running_optimizer_is_seen(name: str, change: str) -> None:
    """The dicts of before, which nobody writes to any more, are not what is watched; nor are they kept."""
    case = pair(name)
    ours, _, theirs, _ = case
    both(case, range(3))
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    both(case, range(3, 5))
    for optimizer in (ours, theirs):
        if change == "lr":
            optimizer.param_groups[0]["lr"] = 1e-3
        else:
            for entry in optimizer.state.values():
                for key, value in entry.items():
                    entry[key] = value * 0.5 if value.numel() > 1 else value
    both(case, range(5, 8))
    assert ours._used == COMPILED
    assert_same(case)
