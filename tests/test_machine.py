"""`hybridopt.machine`: what is recorded beside a journal, and memory that is checked before it is needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridopt.errors import MemoryLimit
from hybridopt.machine import available_memory, differences, fingerprint, require_memory


def test_a_fingerprint_names_what_a_replay_depends_on() -> None:
    found = fingerprint("scipy", "no-such-library")
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["numpy"] == np.__version__
    assert found["no-such-library"] == "unknown"
    assert found["torch_threads"] == "1"
    assert found["cpu_capability"]
    assert fingerprint() == fingerprint()
    assert all(isinstance(v, str) for v in found.values()), "plain text, for a checkpoint"


def test_differences_are_named_with_both_values() -> None:
    now = fingerprint("scipy")
    saved = {**now, "numpy": "1.0", "gone": "x"}
    text = differences(saved, now)
    assert text == f"gone 'x' -> None, numpy '1.0' -> {now['numpy']!r}"
    assert differences(now, now) == "none of the versions and settings that are recorded"


def test_memory_is_checked_before_and_the_error_names_bytes_and_the_way_out() -> None:
    available = available_memory()
    assert 2**20 < available < 2**50
    require_memory(1000, "mine", 10, "select fewer weights")
    with pytest.raises(
        MemoryLimit, match=r"mine: .*\(1125899906842624 bytes\) for 10 weights, .*; select fewer weights"
    ):
        require_memory(2**50, "mine", 10, "select fewer weights")
    assert issubclass(MemoryLimit, MemoryError)
