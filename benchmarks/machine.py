"""The machine and the software that a run's numbers belong to."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

PACKAGES = ("tiered", "torch", "ray", "numpy", "xxhash")


def describe() -> dict[str, Any]:
    """Facts about this machine, none of which names it."""
    shared = shutil.disk_usage("/dev/shm")
    return {
        "cpu": _first_field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "available_bytes": available_bytes(),
        "shared_memory_bytes": shared.total,
        "is_virtual": "hypervisor" in (_first_field("/proc/cpuinfo", "flags") or "").split(),
        "transparent_hugepages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "load_before": load(),
        "network": "loopback: every host of the cluster is on this machine",
    }


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes."""
    return [round(n, 2) for n in os.getloadavg()]


def available_bytes() -> int:
    """Memory that can be used now without swapping, and /dev/shm has room for."""
    kib = _first_field("/proc/meminfo", "MemAvailable") or "0 kB"
    return min(int(kib.split()[0]) * 1024, shutil.disk_usage("/dev/shm").free)


def _first_field(path: str, name: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _chosen(path: str) -> str | None:
    """`always [madvise] never` -> `madvise`."""
    try:
        return Path(path).read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that is checked out, if this is a git work tree."""
    folder = Path(__file__).parent.parent / ".git"
    if folder.is_file():  # a linked work tree
        folder = Path(folder.read_text().partition(":")[2].strip())
    try:
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:12]
        common = folder / "commondir"
        base = (folder / common.read_text().strip()) if common.exists() else folder
        return (base / head.removeprefix("ref: ")).read_text().strip()[:12]
    except OSError:
        return None
