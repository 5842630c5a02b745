"""The harness of the distributed tests tells failures apart, reports each, and goes on after them."""

import os
import sys
import time
import unittest

import pytest
import torch
import torch.distributed as dist
from helpers_distributed import Env, case, group


def everybody(env: Env) -> None:
    number = torch.ones(1)
    dist.all_reduce(number)
    assert number.item() == env.world


@case(2)
def good(env: Env) -> None:
    everybody(env)


@case(2)
def bad_on_one_rank(env: Env) -> None:
    if env.rank == 1:
        raise ValueError("only here")
    everybody(env)


@case(2, answer={"right": {"answer": 42}, "wrong": {"answer": 41}})
def variants(env: Env, answer: int) -> None:
    assert answer == 42, f"{answer} is wrong"


@case(2)
def without_end(env: Env) -> None:
    if env.rank == 0:
        time.sleep(1000)
    everybody(env)


@case(2)
def dies(env: Env) -> None:
    if env.rank == 1:
        os._exit(7)
    everybody(env)


@case(2)
def left_out(env: Env) -> None:
    raise unittest.SkipTest("not today")


@case(2)
def good_at_the_end(env: Env) -> None:
    everybody(env)


two = group(sys.modules[__name__], world=2, limit=5)
EXPECTED = {
    "good": None,
    "bad_on_one_rank": ("ValueError: only here", "--- rank 1"),
    "variants[right]": None,
    "variants[wrong]": ("41 is wrong", "--- every rank"),
    "without_end": ("nothing happened for 5 s", "in without_end"),  # with the stack of the rank that sleeps
    "dies": ("exit code", "(exitcode: 7) local_rank: 1"),  # the other rank is ended with it, before or after it reports
    "left_out": ("not today",),
    "good_at_the_end": None,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_case_is_reported_as_it_went(two, name):
    expected = EXPECTED[name]
    if expected is None:
        two.check(name)
        return
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as caught:
        two.check(name)
    assert isinstance(caught.value, pytest.skip.Exception) == (name == "left_out")
    assert all(text in str(caught.value) for text in expected), str(caught.value)
