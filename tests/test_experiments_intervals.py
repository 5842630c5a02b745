"""Intervals of ratios, differences and means, against other routes to them."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "benchmarks")]

import words  # noqa: E402
from intervals import (  # noqa: E402
    difference_of_problems,
    difference_of_runs,
    mean_of_problems,
    ratio_of_means,
    ratio_of_runs,
    ratio_of_sums,
)


def width(estimate):
    return estimate.high - estimate.low


def test_ratios_of_sums_by_another_route():
    draw = np.random.default_rng(3)
    below = draw.exponential(size=2000)
    above = 1.1 * below + draw.normal(scale=0.2, size=2000)
    found = ratio_of_sums([above[:500], above[500:]], [below[:500], below[500:]])
    assert found.value == pytest.approx(above.sum() / below.sum())
    # The delta method: the ratio's variance from the residuals.
    error = np.sqrt(np.var(above - found.value * below) / len(below)) / below.mean()
    assert width(found) == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.low < found.bound95 < found.high
    assert ratio_of_sums([above[:500], above[500:]], [below[:500], below[500:]]) == found  # the same page again


def test_ratios_of_means_by_another_route():
    draw = np.random.default_rng(8)
    sides = [(draw.exponential(30, 64), draw.integers(20, 50, 64)) for _ in range(4)]
    found = ratio_of_means(sides[:2], sides[2:])
    (a, n), (b, m) = ([sum(s[i].sum() for s in pair) for i in (0, 1)] for pair in (sides[:2], sides[2:]))
    assert found.value == pytest.approx((a / n) / (b / m))
    same = ratio_of_means(sides[:2], [(2 * total, count) for total, count in sides[:2]])
    assert [same.value, same.low, same.high] == pytest.approx([0.5] * 3)  # prompts are drawn for both at once


def test_ratios_and_differences_of_runs():
    draw = np.random.default_rng(4)
    noise = np.convolve(draw.normal(size=4003), np.ones(4) / 4, "valid")  # neighbours are alike
    found = difference_of_runs({0: noise + 2.0}, {0: np.zeros(4000)})
    assert found.value == pytest.approx(noise.mean() + 2) and found.blocks == (20,)
    assert width(found) > 1.5 * 2 * 1.96 * noise.std() / np.sqrt(4000)  # what drawing step by step would give
    apart = difference_of_runs({0: np.ones(50), 1: np.full(50, 3.0)}, {0: np.zeros(50), 1: np.zeros(50)})
    assert (apart.value, apart.low, apart.high) == (2.0, 2.0, 2.0)  # seeds are not drawn
    assert apart.blocks == (6, 6)
    trend = np.linspace(1, 5, 200)  # what both have in common
    own = ratio_of_runs({0: 3 * trend}, {0: trend})
    assert [own.low, own.value, own.high] == pytest.approx([3.0] * 3)


def test_short_curves_are_given_no_interval():
    short, long = ({0: np.arange(1.0, steps + 1)} for steps in (39, 40))
    found = ratio_of_runs(short, short)
    assert found.value == 1.0 and not found.has_interval and words.with_interval(found, words.times) == "1.00"
    assert words.blocks(found) == "no interval: it rests on fewer than 40 steps"
    assert words.blocks(ratio_of_runs(long, long)) == "blocks of 5 steps"


def test_arms_of_a_seed_are_drawn_together():
    draw = np.random.default_rng(5)
    prompts = {seed: draw.normal(size=400) for seed in (0, 1)}
    one = {seed: 5 + run + 0.01 * draw.normal(size=400) for seed, run in prompts.items()}
    other = {seed: 4 + run + 0.01 * draw.normal(size=400) for seed, run in prompts.items()}
    found = difference_of_runs(one, other)
    assert found.value == pytest.approx(1.0, abs=0.01)
    assert width(found) < 0.05 * width(
        difference_of_runs(one, {seed: np.zeros(400) for seed in one})
    )  # what both have in common is not in it
    double = {seed: 2 * run for seed, run in one.items()}
    exact = ratio_of_runs(double, one)
    assert [exact.low, exact.high] == pytest.approx([2.0, 2.0])
    with pytest.raises(ValueError, match="the same steps"):
        ratio_of_runs({0: [1.0, 2.0]}, {0: [1.0]})


def test_problems_are_drawn_with_all_their_answers():
    draw = np.random.default_rng(6)
    chance = draw.uniform(size=300)
    shares = {seed: draw.binomial(8, chance) / 8 for seed in (0, 1)}
    found = mean_of_problems(shares)
    values = (shares[0] + shares[1]) / 2
    assert found.value == pytest.approx(values.mean())
    assert width(found) == pytest.approx(2 * 1.96 * values.std() / np.sqrt(300), rel=0.1)
    same = difference_of_problems(shares, shares)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    other = {seed: draw.binomial(8, chance) / 8 for seed in (0, 1)}
    assert width(difference_of_problems(shares, other)) < 0.7 * width(found)
