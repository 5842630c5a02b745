"""What computes a run: code, packages, GPU and date, and the cores that this process may use."""

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import __version__

CHECKOUT = Path(__file__).resolve().parents[2]
"""Where this code lies in its repository; of an installed package something else."""

PACKAGES = ("torch", "triton", "transformers", "compressed-tensors", "vllm")
"""Whose versions a row names, where they are installed."""


def versions() -> dict[str, str]:
    """Versions of what computes."""
    packages = ("torch", "transformers", "compressed-tensors")
    own = {"python": platform.python_version(), "nvfp4-qat": __version__}
    return own | {name: metadata.version(name) for name in packages}


def circumstances(
    device: torch.device, checkout: Path = CHECKOUT, packages: Sequence[str] = PACKAGES
) -> dict[str, Any]:
    """With what and when something runs, to be kept with what comes of it.

    Args:
        device: where it computes.
        checkout: see `commit`.
        packages: whose versions are told.

    Returns:
        ``commit``; ``date`` (UTC); ``gpu``, None on a CPU; ``versions`` by package.
    """
    return {
        "commit": commit(checkout),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": {name: version for name in packages if (version := _version(name)) is not None},
    }


def commit(checkout: Path = CHECKOUT) -> str | None:
    """The commit of the code, "+" behind it where code differs from it.

    The variable ``NVFP4_QAT_COMMIT`` has the first word, for copies of the code without its repository.

    Args:
        checkout: the repository's directory.

    Returns:
        None: neither of them says it.
    """
    if told := os.environ.get("NVFP4_QAT_COMMIT"):
        return told
    if (checkout / ".git").exists():
        head = _git(checkout, "rev-parse", "--short=10", "HEAD")
        # Rows are no code: they change while they are collected.
        changes = _git(checkout, "status", "--porcelain", "--", *CODE, ":(exclude)*/results/*")
        if head:
            return head + ("+" if changes else "")
    return None


CODE = ("src", "experiments", "benchmarks")
"""Directories of a checkout that results depend on."""


def _git(checkout: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
