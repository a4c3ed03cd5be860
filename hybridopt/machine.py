"""What of this machine a result may depend on, and how much memory it has left."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch

from hybridopt.errors import MemoryLimit

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

MEMINFO, STATM = Path("/proc/meminfo"), Path("/proc/self/statm")
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 2**62


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


def missing(*libraries: str) -> list[str]:
    """Those that are not installed, neither as a distribution nor as a module of that name."""
    gone = []
    for library in libraries:
        try:
            version(library)
        except PackageNotFoundError:
            if importlib.util.find_spec(library.partition(".")[0]) is None:
                gone.append(library)
    return gone


def differences(saved: dict[str, str], now: dict[str, str]) -> str:
    """Text naming what differs between two fingerprints."""
    changed = [
        f"{k} {saved.get(k)!r} -> {now.get(k)!r}"
        for k in sorted({*saved, *now})
        if saved.get(k) != now.get(k)
    ]
    return ", ".join(changed) or "none of the versions and settings that are recorded"


def available_memory() -> int:
    """Bytes that can still be allocated without swapping, within the limits of a container and of the process."""
    return max(0, min(_of_machine(), _of_group(), _of_process()))


def _of_machine() -> int:
    """What is free without swapping (the whole memory where the system does not say)."""
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return UNLIMITED


def _of_group() -> int:
    """What a container (control groups of version 2 or 1) leaves; the cache of files that it would give up is free."""
    left = UNLIMITED
    for folder, limit, usage, cache in (
        (CGROUP, "memory.max", "memory.current", "inactive_file"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = (folder / limit).read_text().strip()
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most.isdigit():  # "max" = no limit
            left = min(left, int(most) - used + int(stat.get(cache, 0)))
    return left


def _of_process() -> int:
    """What `ulimit -v` leaves of the address space."""
    if resource is None:
        return UNLIMITED
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return UNLIMITED
    try:
        used = int(STATM.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        used = 0
    return int(limit) - used


def require_memory(needed: int, method: str, n: int, way_out: str) -> None:
    """Raise `MemoryLimit` if a method is bound to need more bytes than there are."""
    available = available_memory()
    if needed > available:
        raise MemoryLimit(
            f"{method}: expected to need about {needed / 2**30:.1f} GiB ({needed} bytes) for {n} weights, "
            f"{available / 2**30:.1f} GiB are available; {way_out}"
        )
