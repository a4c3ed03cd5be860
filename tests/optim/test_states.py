"""Constructors and state dicts are those of torch.optim."""

from __future__ import annotations

import copy
import inspect

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
