"""`hybridopt.selection`: which tensors are weights, by what name, and what cannot be one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hybridopt.errors import SelectionError
from hybridopt.vector import ParameterVector


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


def tied() -> nn.Module:
    model = nn.Module()
    model.encode, model.decode = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model.decode.weight = model.encode.weight
    return model


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (None, ("0.weight", "0.bias", "2.weight", "2.bias")),
        ("*", ("0.weight", "0.bias", "2.weight", "2.bias")),
        ("2.*", ("2.weight", "2.bias")),
        ("?.bias", ("0.bias", "2.bias")),
        (["2.bias", "0.*"], ("0.weight", "0.bias", "2.bias")),  # the model's order, not the patterns'
        (lambda name, t: t.ndim == 2, ("0.weight", "2.weight")),
        (lambda name, t: name.startswith("2"), ("2.weight", "2.bias")),
    ],
)
def test_select_by_pattern_patterns_and_predicate(select: Any, names: tuple[str, ...]) -> None:
    assert ParameterVector(mlp(), select).names == names


def test_frozen_weights_are_left_out_unless_selected() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    assert ParameterVector(model).names == ("2.weight", "2.bias")
    assert ParameterVector(model, "0.*").names == ("0.weight", "0.bias")
    assert len(ParameterVector(model, lambda name, t: True).names) == 4
    # a frozen Parameter is frozen in whatever it comes, a plain tensor never was
    assert ParameterVector(dict(model.named_parameters())).names == ("2.weight", "2.bias")
    assert ParameterVector(model.named_parameters()).names == ("2.weight", "2.bias")
    assert ParameterVector(model.parameters()).names == ("2", "3")
    groups = ParameterVector(
        [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[2].parameters()}]
    )
    assert groups.groups == [{"params": ["1.0", "1.1"]}]
    assert ParameterVector({"a": torch.ones(2), "b": torch.ones(2, requires_grad=True)}).names == ("a", "b")
    assert ParameterVector(model[0].bias).names == ("x",)
    assert not model[0].bias.requires_grad
    model.requires_grad_(False)
    with pytest.raises(SelectionError, match=r"all of them are frozen \(requires_grad=False\).*select="):
        ParameterVector(model)


def test_tied_weights_answer_to_each_of_their_names() -> None:
    for select in (None, "*", "decode.*", "encode.*", ["encode.*", "decode.*"]):
        assert ParameterVector(tied(), select).names == ("encode.weight",)
    assert ParameterVector(tied(), bounds={"decode.weight": (-1, 1)}).upper.tolist() == [1] * 4
    assert ParameterVector(tied(), scale={"decode.*": 3}).scale.tolist() == [3] * 4
    with pytest.raises(
        SelectionError,
        match=r"bounds: the patterns 'encode\.\*' and 'decode\.\*' both match 'encode\.weight'",
    ):
        ParameterVector(tied(), bounds={"encode.*": (-1, 1), "decode.*": (-2, 2)})


def test_sources_and_their_names() -> None:
    a, b = torch.ones(2), torch.ones(3)
    assert ParameterVector(a).names == ("x",)
    assert ParameterVector([a, b]).names == ("0", "1")
    assert ParameterVector(t for t in (a, b)).names == ("0", "1")
    assert ParameterVector({"w": a, "v": b}).names == ("w", "v")
    assert ParameterVector([("w", a), ("v", b)]).names == ("w", "v")
    # a dict of tensors may well have an entry called "params"
    assert ParameterVector({"params": a, "other": b}).names == ("params", "other")
    assert ParameterVector({"params": [a, b]}).names == ("0.0", "0.1")


def test_torch_parameter_groups_plain_and_named() -> None:
    a, b, c = (nn.Parameter(torch.ones(k)) for k in (1, 2, 3))
    plain = ParameterVector([{"params": [a, b], "lr": 0.1}, {"params": c}])
    assert plain.names == ("0.0", "0.1", "1.0")
    assert plain.groups == [{"params": ["0.0", "0.1"], "lr": 0.1}, {"params": ["1.0"]}]
    named = ParameterVector([{"params": [("a", a), ("b", b)], "lr": 0.1}, {"params": [("c", c)]}], "b")
    assert named.groups == [{"params": ["b"], "lr": 0.1}]
    # the groups of a living torch optimizer, its names included
    optimizer = torch.optim.SGD([{"params": [("a", a), ("b", b)], "lr": 0.5}, {"params": [("c", c)]}], lr=1.0)
    vector = ParameterVector(optimizer.param_groups)
    assert vector.names == ("a", "b", "c")
    assert vector.groups is not None
    assert [g["lr"] for g in vector.groups] == [0.5, 1.0]
    assert "param_names" in optimizer.param_groups[0], "the caller's groups are left alone"
    assert optimizer.param_groups[0]["params"] == [a, b]


def _slice_pair() -> list[Tensor]:
    base = torch.ones(4, 4)
    return [base[:, :3], base[:, 2:]]


def _expanded() -> Tensor:
    return torch.ones(1).expand(3)


def _nonleaf() -> Tensor:
    return torch.ones(2, requires_grad=True) * 2


def _inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(2)


@pytest.mark.parametrize(
    ("source", "select", "message"),
    [
        # empty selection, patterns that match nothing or overlap
        (mlp, [], r"select: expected at least one weight, \[\] leaves none of \[0\.weight, 0\.bias"),
        (mlp, lambda n, t: False, r"select: expected at least one weight"),
        (nn.ReLU, None, r"select: expected at least one weight, None leaves none of \[\]"),
        (mlp, "0.wieght", r"select: the pattern '0\.wieght' matches no weight; nearest names: 0\.weight"),
        (
            mlp,
            ["0.*", "*.bias"],
            r"select: the patterns '0\.\*' and '\*\.bias' both match '0\.bias'; make them disj",
        ),
        (mlp, ["0.*", "0.*"], r"both match '0\.weight'"),
        (mlp, 3, r"select: expected a pattern, several, or a predicate \(name, tensor\) -> bool, got 3"),
        (mlp, [3], r"select: expected patterns for names, got 3"),
        # what cannot be a weight
        (
            lambda: torch.ones(2, dtype=torch.complex64),
            None,
            r"'x' is complex \(torch\.complex64\).*view_as_real",
        ),
        (
            lambda: torch.ones(2, dtype=torch.int64),
            None,
            r"'x' holds torch\.int64; expected a floating dtype",
        ),
        (lambda: torch.ones(2, dtype=torch.bool), None, r"'x' holds torch\.bool; expected a floating dtype"),
        (
            lambda: torch.ones(2).to(torch.float8_e5m2),
            None,
            r"'x' holds torch\.float8_e5m2; expected one of torch\.fl",
        ),
        (lambda: torch.ones(2, device="meta"), None, r"'x' is on the meta device.*materialise"),
        (lambda: torch.eye(2).to_sparse(), None, r"'x' has layout torch\.sparse_coo; expected a dense"),
        (
            lambda: nn.LazyLinear(3),
            None,
            r"'weight' is not initialized \(a lazy module\); call the model once",
        ),
        (_inference, None, r"'x' was made under torch\.inference_mode.*clone\(\)"),
        (_nonleaf, None, r"'x' is computed from other tensors \(not a leaf\)"),
        # memory that cannot be written one weight at a time
        (_expanded, None, r"'x' is an expanded view.*clone\(\)"),
        (lambda: torch.ones(9).as_strided((2, 2), (3, 3)), None, r"'x' is an expanded view"),
        (lambda: (t := torch.ones(3), t.detach()), None, r"'0' and '1' share memory"),
        (lambda: (t := torch.ones(4), t[1:3]), None, r"'0' and '1' share memory.*select only one"),
        (lambda: (t := torch.ones(6), t[::2]), None, r"share memory"),
        (_slice_pair, None, r"'0' and '1' share memory"),
        (lambda: (t := torch.ones(4), t.view(torch.bfloat16)[3:5]), None, r"share memory"),
        # sources
        (lambda: 3.0, None, r"weights: expected a torch\.nn\.Module, a tensor.*got float"),
        (lambda: "model", None, r"weights: expected a torch\.nn\.Module.*got str"),
        (lambda: {torch.ones(1)}, None, r"weights: expected.*got set"),
        (lambda: [torch.ones(1), 3.0], None, r"weights: '1' is a float, expected a torch\.Tensor"),
        (lambda: {"w": np.ones(2)}, None, r"weights: 'w' is a ndarray, expected a torch\.Tensor"),
        (lambda: {0: torch.ones(2)}, None, r"weights: expected names as keys, got 0"),
        (lambda: [("w", torch.ones(1)), ("w", torch.ones(1))], None, r"the name 'w' is given twice"),
        (lambda: [{"lr": 1}], None, r"parameter group 0: expected a 'params' entry as in torch\.optim.*'lr'"),
        (
            lambda: (lambda p: [{"params": [p]}, {"params": [p]}])(torch.ones(1)),
            None,
            r"'1\.0' is in group 0 and again in group 1",
        ),
    ],
)
def test_what_cannot_be_selected_is_said_clearly(
    source: Callable[[], Any], select: Any, message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        ParameterVector(source(), select)


def test_a_weight_that_is_not_selected_may_be_anything() -> None:
    base = torch.ones(4)
    named = {
        "w": base,
        "view": base[1:],
        "complex": torch.ones(1, dtype=torch.complex64),
        "count": torch.tensor(3),
    }
    assert ParameterVector(named, "w").n == 4
    assert ParameterVector(named, "view").n == 3


def test_neighbours_in_memory_share_nothing() -> None:
    flat = torch.zeros(9)
    vector = ParameterVector([flat[:4].view(2, 2), flat[4:6], flat[6:], torch.empty(0)])
    vector.write(np.arange(9.0))
    assert flat.tolist() == list(range(9))


BLOCK = st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 3))  # first, length, step


@given(st.lists(BLOCK, min_size=1, max_size=4))
def test_memory_is_shared_or_not_exactly(blocks: list[tuple[int, int, int]]) -> None:
    base = torch.zeros(40)
    views = [base[first : first + length * step : step] for first, length, step in blocks]
    entries = [set(range(first, first + length * step, step)) for first, length, step in blocks]
    shared = any(a & b for i, a in enumerate(entries) for b in entries[i + 1 :])
    if shared:
        with pytest.raises(SelectionError, match="share memory"):
            ParameterVector(views)
    else:
        vector = ParameterVector(views)
        x = np.arange(1.0, vector.n + 1)
        vector.write(x)
        assert vector.read().tolist() == x.tolist()


@given(st.sets(st.text("ab.", min_size=1, max_size=3), min_size=1, max_size=5), st.text("ab.*?", max_size=4))
def test_a_pattern_selects_what_it_matches_and_no_more(names: set[str], pattern: str) -> None:
    source = {name: torch.zeros(1) for name in sorted(names)}
    regex = re.compile("".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in pattern))
    expected = tuple(name for name in source if regex.fullmatch(name))
    if expected:
        assert ParameterVector(source, pattern).names == expected
    else:
        with pytest.raises(SelectionError, match="matches no weight"):
            ParameterVector(source, pattern)
