"""`hybridopt.population._base`: what holds for every native method."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridopt import ParameterVector
from hybridopt import population as native
from hybridopt.errors import BoundsError
from hybridopt.population._base import PopulationMethod

METHODS = [
    found()
    for name in native.__all__
    if issubclass(found := getattr(native, name), PopulationMethod) and found is not PopulationMethod
]
LARGEST = float(np.finfo(np.float64).max)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_bounds_too_far_apart_to_subtract_are_refused(method: PopulationMethod) -> None:
    """Their distance is inf, and points computed from it are nan."""
    vector = ParameterVector(torch.ones(2).double(), bounds=[(-1, 1), (-LARGEST, LARGEST)])
    with pytest.raises(BoundsError, match=rf"{method.name}: expected bounds .* weight 1 has \(-1.79.*inf"):
        method.start(vector, 0)
    near = ParameterVector(torch.ones(2).double(), bounds=(-LARGEST / 4, LARGEST / 4))
    x = method.start(near, 0).ask().x
    assert x is not None
    assert np.isfinite(x).all()
