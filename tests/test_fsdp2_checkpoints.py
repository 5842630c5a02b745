"""Gather mode under FSDP2 on a CPU: see tests/distributed/checkpoints.py."""

import pytest
from distributed import checkpoints
from helpers_distributed import cases, group

two = group(checkpoints, world=2)


@pytest.mark.parametrize("name", cases(checkpoints, world=2))
def test_two_processes(two, name):
    two.check(name)
