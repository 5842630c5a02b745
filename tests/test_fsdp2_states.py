"""Gather mode under FSDP2 on a CPU: the cases of tests/distributed/{checkpoints,sync}.py."""

import pytest
from distributed import checkpoints, sync
from helpers_distributed import cases, group

two = group(checkpoints, sync, world=2)


@pytest.mark.parametrize("name", cases(checkpoints, sync, world=2))
def test_two_processes(two, name):
    two.check(name)
