"""Gather mode under FSDP2 on a CPU: see tests/distributed/sync.py."""

import pytest
from distributed import sync
from helpers_distributed import cases, group

two = group(sync, world=2)


@pytest.mark.parametrize("name", cases(sync, world=2))
def test_two_processes(two, name):
    two.check(name)
