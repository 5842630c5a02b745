"""Gather mode under FSDP2 on a CPU: the cases of tests/distributed/{hsdp,own_gather,traffic}.py."""

import pytest
from distributed import hsdp, own_gather, traffic
from helpers_distributed import cases, group

four = group(hsdp, traffic, own_gather, world=4)


@pytest.mark.parametrize("name", cases(hsdp, traffic, own_gather, world=4))
def test_four_processes(four, name):
    four.check(name)
