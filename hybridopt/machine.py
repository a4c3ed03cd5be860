"""What of this machine a result may depend on, and how much memory it has left."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hybridopt.errors import MemoryLimit


def fingerprint(*libraries: str) -> dict[str, str]:
    """Versions, CPU capability and thread counts: what must agree for a bit-identical replay."""
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": str(torch.get_num_threads()),
    }
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "MKL_NUM_THREADS"):
        found[name] = os.environ.get(name, "")
    for library in ("torch", "numpy", *libraries):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "unknown"
    return found


def differences(saved: dict[str, str], now: dict[str, str]) -> str:
    """Text naming what differs between two fingerprints."""
    changed = [
        f"{k} {saved.get(k)!r} -> {now.get(k)!r}"
        for k in sorted({*saved, *now})
        if saved.get(k) != now.get(k)
    ]
    return ", ".join(changed) or "none of the versions and settings that are recorded"


def available_memory() -> int:
    """Bytes that can still be allocated without swapping (the whole memory where the system does not say)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**62


def require_memory(needed: int, method: str, n: int, way_out: str) -> None:
    """Raise `MemoryLimit` if a method is bound to need more bytes than there are."""
    available = available_memory()
    if needed > available:
        raise MemoryLimit(
            f"{method}: expected to need about {needed / 2**30:.1f} GiB ({needed} bytes) for {n} weights, "
            f"{available / 2**30:.1f} GiB are available; {way_out}"
        )
