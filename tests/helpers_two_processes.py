"""The cases of a test file in two processes: on the CPU, and on two GPUs where they are.

In a test file, below its cases::

    two, two_gpus, test_two_processes, test_two_gpus = of_two(sys.modules[__name__])
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from helpers_distributed import cases, group


def of_two(module: ModuleType) -> tuple[Any, Any, Any, Any]:
    """Fixtures that start two processes with the cases of a module, and the tests; pytest wants these four names."""
    named = pytest.mark.parametrize("name", cases(module, world=2))

    @named
    def test_two_processes(two: Any, name: str) -> None:
        two.check(name)

    @pytest.mark.multigpu
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    @named
    def test_two_gpus(two_gpus: Any, name: str) -> None:
        two_gpus.check(name)

    return group(module, world=2), group(module, world=2, device="cuda"), test_two_processes, test_two_gpus
