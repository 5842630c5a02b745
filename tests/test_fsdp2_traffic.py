"""Gather mode under FSDP2 on a CPU: the cases of tests/distributed/traffic.py."""

import pytest
from distributed import traffic
from helpers_distributed import cases, group

two = group(traffic, world=2)


@pytest.mark.parametrize("name", cases(traffic, world=2))
def test_two_processes(two, name):
    two.check(name)
