"""Gather mode under FSDP2 on a CPU: the cases of tests/distributed/own_gather.py."""

import pytest
from distributed import own_gather
from helpers_distributed import cases, group

two = group(own_gather, world=2)


@pytest.mark.parametrize("name", cases(own_gather, world=2))
def test_two_processes(two, name):
    two.check(name)
