"""Gather mode under FSDP2 on a CPU: the cases of tests/distributed/{misuse,parameters,settling,writes}.py."""

import pytest
from distributed import misuse, parameters, settling, writes
from helpers_distributed import cases, group

two = group(misuse, parameters, settling, writes, world=2)


@pytest.mark.parametrize("name", cases(misuse, parameters, settling, writes, world=2))
def test_two_processes(two, name):
    two.check(name)
