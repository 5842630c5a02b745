"""Gather mode under FSDP2 on a CPU: see tests/distributed/experts.py."""

import pytest
from distributed import experts
from helpers_distributed import cases, group

two = group(experts, world=2)


@pytest.mark.parametrize("name", cases(experts, world=2))
def test_two_processes(two, name):
    two.check(name)
