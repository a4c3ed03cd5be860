"""`hybridopt.machine`: what is recorded beside a journal, and memory that is checked before it is needed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridopt import machine
from hybridopt.errors import MemoryLimit
from hybridopt.machine import available_memory, differences, fingerprint, missing, require_memory


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


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Version 2 and version 1 of control groups; the file cache that they would give up counts as free."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    free = available_memory()
    (tmp_path / "memory.stat").write_text("anon 4000000\ninactive_file 500000\n")
    (tmp_path / "memory.current").write_text("7000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > free / 2, "no limit"
    (tmp_path / "memory.max").write_text("10000000\n")
    assert available_memory() == 3_500_000
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 200000\n")
    (old / "memory.usage_in_bytes").write_text("1000000\n")
    (old / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert available_memory() == 3_500_000, "no limit in version 1 is a large number"
    (old / "memory.limit_in_bytes").write_text("3000000\n")
    assert available_memory() == 2_200_000
    (old / "memory.limit_in_bytes").write_text("500000\n")
    assert available_memory() == 0, "already above"


def test_a_package_is_missing_if_there_is_neither_a_distribution_nor_a_module() -> None:
    assert missing() == []
    assert missing("numpy", "no-such-library", "hybridopt", "no.such.library") == [
        "no-such-library",
        "no.such.library",
    ], "the module hybridopt is of another distribution"


def test_the_limit_of_the_address_space_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    statm = tmp_path / "statm"
    statm.write_text("1000 10 10 1 0 10 0\n")
    monkeypatch.setattr(machine, "STATM", statm)
    page = os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1500 * page, resource.RLIM_INFINITY))
    assert available_memory() == 500 * page
    with pytest.raises(MemoryLimit, match="mine: expected to need about"):
        require_memory(501 * page, "mine", 10, "select fewer weights")
    statm.unlink()
    assert available_memory() == 1500 * page
