"""Gather mode under FSDP2 on a CPU: see tests/distributed/features.py."""

import pytest
from distributed import features
from helpers_distributed import cases, group

two = group(features, world=2)


@pytest.mark.parametrize("name", cases(features, world=2))
def test_two_processes(two, name):
    two.check(name)
