"""Gather mode under FSDP2 on a CPU: see tests/distributed/own_gather.py."""

import pytest
from distributed import own_gather
from helpers_distributed import cases, group

two, four = group(own_gather, world=2), group(own_gather, world=4)


@pytest.mark.parametrize("name", cases(own_gather, world=2))
def test_two_processes(two, name):
    two.check(name)


@pytest.mark.parametrize("name", cases(own_gather, world=4))
def test_four_processes(four, name):
    four.check(name)
