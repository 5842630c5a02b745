"""What computes a run: versions of the packages, and the cores that this process may use."""

import os
import platform
from importlib import metadata
from pathlib import Path

from . import __version__


def versions() -> dict[str, str]:
    """Versions of what computes."""
    packages = ("torch", "transformers", "compressed-tensors")
    own = {"python": platform.python_version(), "nvfp4-qat": __version__}
    return own | {name: metadata.version(name) for name in packages}


def available_cores() -> int:
    """Cores this process may use: its affinity, and the quota of a container where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return min(cores, int(limit))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, _, period = quota.read_text().strip().partition(" ")
        if allowed.isdigit() and period.isdigit():
            cores = min(cores, max(1, int(allowed) // int(period)))
    return cores
