"""Gather mode under FSDP2 on a CPU: see tests/distributed/safety.py."""

import pytest
from distributed import safety
from helpers_distributed import cases, group

two = group(safety, world=2)


@pytest.mark.parametrize("name", cases(safety, world=2))
def test_two_processes(two, name):
    two.check(name)
