"""Gather mode under FSDP2 on a CPU: the cases of tests/distributed/{experts,features}.py."""

import pytest
from distributed import experts, features
from helpers_distributed import cases, group

two = group(features, experts, world=2)


@pytest.mark.parametrize("name", cases(features, experts, world=2))
def test_two_processes(two, name):
    two.check(name)
