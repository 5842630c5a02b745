"""Gather mode under FSDP2 on a CPU: the cases of tests/distributed/training.py."""

import pytest
from distributed import training
from helpers_distributed import cases, group

one = group(training, world=1)
two = group(training, world=2)


@pytest.mark.parametrize("name", cases(training, world=1))
def test_one_process(one, name):
    one.check(name)


@pytest.mark.parametrize("name", cases(training, world=2))
def test_two_processes(two, name):
    two.check(name)
