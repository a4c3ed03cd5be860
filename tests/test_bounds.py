"""`hybridopt.bounds`: bounds that rounding cannot leave, and scales that change nothing but the coordinates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from hybridopt.errors import BoundsError, HybridoptError
from hybridopt.vector import ParameterVector

NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=True),
    st.floats(-4, 4),
    st.sampled_from([0.0, -0.0, 0.1, 65504.0, 65520.0, 1e-8, 5e-324, 3.3895313892515355e38, -1e39]),
)


def representable(dtype: torch.dtype) -> np.ndarray:
    """All finite numbers of a 16-bit dtype, ascending."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).double().numpy()
    return np.unique(values[np.isfinite(values)])


GRID = {torch.float16: representable(torch.float16), torch.bfloat16: representable(torch.bfloat16)}


def innermost(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """The lowest and highest number of a dtype within (low, high), by looking at all, or at the neighbours."""
    if dtype in GRID:
        inside = GRID[dtype][(GRID[dtype] >= low) & (GRID[dtype] <= high)]
        if len(inside) == 0:
            return math.inf, -math.inf
        return (low if low == -math.inf else inside[0]), (high if high == math.inf else inside[-1])
    if dtype == torch.float64:
        return low, high
    with np.errstate(over="ignore"):
        down, up = np.float32(low), np.float32(high)
    if float(down) < low:  # as float64: NumPy would compare in float32
        down = np.nextafter(down, np.float32(np.inf))
    if float(up) > high:
        up = np.nextafter(up, np.float32(-np.inf))
    return float(down), float(up)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(low=NUMBERS, high=NUMBERS, data=st.data())
def test_bounds_are_tightened_to_the_dtype_and_never_left(
    dtype: torch.dtype, low: float, high: float, data: st.DataObject
) -> None:
    low, high = sorted((low, high))
    assume(low < high)
    lower, upper = innermost(low, high, dtype)
    if not lower < upper:
        with pytest.raises(BoundsError, match=rf"no two {dtype} numbers lie within the bounds of 'x'"):
            ParameterVector(torch.zeros(1, dtype=dtype), bounds=(low, high))
        return
    start = next(v for v in (lower, upper, 0.0) if math.isfinite(v))
    weight = torch.tensor([start], dtype=dtype)
    vector = ParameterVector(weight, bounds=(low, high))
    assert (vector.lower[0], vector.upper[0]) == (lower, upper)

    x = data.draw(st.floats(max(lower, -1e300), min(upper, 1e300)))
    vector.write([x])
    assert low <= weight.double().item() <= high
    assert not vector.outside(vector.read())
    for z in (np.nextafter(low, -np.inf), np.nextafter(high, np.inf)):
        if math.isfinite(z) and not low <= z <= high:
            assert vector.outside(np.array([z]))
    # an unbounded step of an in-place method is brought back to exactly these numbers
    with torch.no_grad():
        weight.fill_(data.draw(st.sampled_from([-math.inf, math.inf, -1.0, 1.0, 0.0])))
    vector.project()
    assert low <= weight.double().item() <= high


@given(
    st.lists(st.tuples(st.floats(-10, 9.9), st.floats(0.01, 10)), min_size=1, max_size=4),
    st.data(),
)
def test_bounds_are_never_left_in_solver_coordinates_either(
    boxes: list[tuple[float, float]], data: st.DataObject
) -> None:
    bounds = np.array([(low, low + width) for low, width in boxes])
    n = len(bounds)
    scale = np.array(data.draw(st.lists(st.floats(1e-9, 1e9), min_size=n, max_size=n)))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    start = torch.from_numpy(bounds.mean(axis=1)).to(dtype)
    vector = ParameterVector(start, bounds=bounds, scale=scale)
    low, high = vector.encode(vector.lower), vector.encode(vector.upper)
    for z in (low, high, *(low + data.draw(st.floats(0, 1)) * (high - low) for _ in range(3))):
        x = vector.decode(np.clip(z, low, high))
        assert not vector.outside(x)
        vector.write(x)
        assert ((bounds[:, 0] <= vector.read()) & (vector.read() <= bounds[:, 1])).all()
    x = vector.read()
    np.testing.assert_allclose(vector.decode(vector.encode(x)), x, rtol=1e-15)
    rows = np.stack([x, x])
    np.testing.assert_array_equal(vector.decode(vector.encode(rows))[1], vector.decode(vector.encode(x)))


def test_without_a_scale_solver_coordinates_are_the_weights_themselves() -> None:
    vector = ParameterVector(torch.ones(3), bounds=(-2, 2))
    x = np.array([0.1, -0.0, 5.0])
    assert vector.scale is None
    assert vector.encode(x) is x
    assert vector.decode(x) is x


def test_scale_start_is_the_size_of_each_weight_and_of_its_tensor() -> None:
    model = {"a": torch.tensor([3.0, 4.0, 0.0]), "b": torch.tensor([1e-9]), "c": torch.empty(0)}
    vector = ParameterVector(model, scale="start")
    rms = math.sqrt(25 / 3)
    # max(|x0|, root mean square of its tensor, 1e-3)
    np.testing.assert_allclose(vector.scale, [3.0, 4.0, rms, 1e-3])
    np.testing.assert_allclose(vector.encode(vector.read())[:2], [1, 1])


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (2, [2, 2, 2]),
        (np.array([1.0, 2.0, 3.0]), [1, 2, 3]),
        ({"a": 5}, [5, 5, 1]),
        ({"a": [5, 6], "b": 7}, [5, 6, 7]),
    ],
)
def test_scales_as_written(scale: Any, expected: list[float]) -> None:
    vector = ParameterVector({"a": torch.zeros(2), "b": torch.zeros(1)}, scale=scale)
    assert vector.scale is not None
    assert vector.scale.tolist() == expected


@pytest.mark.parametrize(
    ("bounds", "lower", "upper"),
    [
        (None, [-np.inf] * 3, [np.inf] * 3),
        ((-1, 2), [-1] * 3, [2] * 3),
        ([(-1, 1), (-2, 2), (-3, 3)], [-1, -2, -3], [1, 2, 3]),
        ({"a": (-1, 1)}, [-1, -1, -np.inf], [1, 1, np.inf]),
        ({"a": [(-1, 1), (-2, np.inf)], "b": (-np.inf, 5)}, [-1, -2, -np.inf], [1, np.inf, 5]),
        ({"?": (-1, 1)}, [-1] * 3, [1] * 3),
        ((None, 1), [-np.inf] * 3, [1] * 3),
        ({"a": [(-1, None), (None, None)], "b": (None, 5)}, [-1, -np.inf, -np.inf], [np.inf, np.inf, 5]),
    ],
)
def test_bounds_as_written(bounds: Any, lower: list[float], upper: list[float]) -> None:
    vector = ParameterVector({"a": torch.zeros(2), "b": torch.zeros(1)}, bounds=bounds)
    assert vector.lower.tolist() == lower
    assert vector.upper.tolist() == upper
    assert vector.bounded == (bounds is not None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"bounds": (1, -1)},
            r"bounds: expected low < high, got \(1, -1\) for 'weight'\[0\]; to hold a weight fixed",
        ),
        ({"bounds": (1, 1)}, r"expected low < high, got \(1, 1\)"),
        ({"bounds": (np.inf, np.inf)}, r"expected low < high"),
        ({"bounds": {"bias": [(-1, 1), (2, 0)]}}, r"expected low < high, got \(2, 0\) for 'bias'\[1\]"),
        (
            {"bounds": (-1, 0.1)},
            r"the start lies outside for 'bias': value 0\.5 at flat index 0 is not in \(-1, 0\.1\)",
        ),
        ({"bounds": {"bias": (0.6, 1)}}, r"the start lies outside for 'bias'"),
        ({"bounds": 1.0}, r"bounds: expected one pair \(low, high\), or shape \(6, 2\).*got 1\.0"),
        (
            {"bounds": [(-1, 1)] * 5},
            r"expected one pair \(low, high\), or shape \(6, 2\).*got shape \(5, 2\)",
        ),
        ({"bounds": np.zeros((2, 6))}, r"got shape \(2, 6\)"),
        ({"bounds": "(-1, 1)"}, r"got '\(-1, 1\)'"),
        ({"bounds": [(-1, 1), (2, 3, 4)]}, r"expected one pair"),
        ({"bounds": (math.nan, 1)}, r"expected numbers, got nan; write -inf or inf where there is no bound"),
        ({"bounds": [("x", None)] * 6}, r"expected one pair"),
        (
            {"bounds": {"bias": [(None, 1), (math.nan, None)]}},
            r"bounds\['bias'\]: expected numbers, got nan; write -inf or inf",
        ),
        ({"bounds": {"bias": [(-1, 1)] * 3}}, r"bounds\['bias'\]: expected one pair.*shape \(2, 2\)"),
        (
            {"bounds": {"baias": (-1, 1)}},
            r"bounds: the pattern 'baias' matches no weight; nearest names: bias",
        ),
        ({"bounds": {"*": (-1, 1), "b*": (-1, 1)}}, r"bounds: the patterns '\*' and 'b\*' both match 'bias'"),
        ({"scale": "auto"}, r'scale: expected None, "start", a number'),
        ({"scale": 0}, r"scale: expected positive finite numbers"),
        ({"scale": -1.0}, r"scale: expected positive finite numbers"),
        ({"scale": math.nan}, r"scale: expected positive finite numbers"),
        ({"scale": [1, 2]}, r"scale: expected one number or shape \(6,\).*got shape \(2,\)"),
        ({"scale": ["a"]}, r"scale: expected one number or shape \(6,\), got \['a'\]"),
        (
            {"scale": {"bias": [1, 2, 3]}},
            r"scale\['bias'\]: expected one number or shape \(2,\).*got shape \(3,\)",
        ),
        ({"scale": {"bias": None}}, r"scale: expected positive finite numbers"),
        ({"scale": {"biass": 1}}, r"scale: the pattern 'biass' matches no weight; nearest names: bias"),
    ],
)
def test_wrong_bounds_and_scales_are_said_clearly(arguments: dict[str, Any], message: str) -> None:
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias, 0.5)
    with pytest.raises(HybridoptError, match=message) as caught:
        ParameterVector(model, **arguments)
    assert isinstance(caught.value, ValueError)
