"""Gather mode under FSDP2 on a CPU: see tests/distributed/hsdp.py and traffic.py."""

import pytest
from distributed import hsdp
from helpers_distributed import cases, group

four = group(hsdp, world=4)


@pytest.mark.parametrize("name", cases(hsdp, world=4))
def test_four_processes(four, name):
    four.check(name)
