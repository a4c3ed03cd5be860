"""What every test starts with: one thread, seeded generators, and Hypothesis examples that are always the same."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before Triton is imported

settings.register_profile(
    "seeded",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("seeded")

_NUMPY = np.random.get_bit_generator()


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same generators and thread count for every test, whatever ran before it."""
    torch.set_num_threads(1)
    np.random.set_bit_generator(_NUMPY)  # a test that failed may have left a run's own
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    drawn = random.Random(0)  # a run that is given no seed draws one: the same ones whenever the test runs
    monkeypatch.setattr("hybridopt.randomness.draw_seed", lambda: drawn.getrandbits(31))
