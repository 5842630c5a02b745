"""Means, ratios and differences with 95 % intervals, by bootstrap.

What is drawn anew decides what an interval is about:

- Curves: only ratios and differences of two runs are given an interval. A mean of one curve has a trend, which would be
  counted as noise. Steps of a run follow from each other, so they are drawn in blocks of neighbouring steps (circular
  block bootstrap, Politis and Romano 1992). Arms of one seed are given the same prompts at a step (dynamic sampling may
  ask one for more of them): the same blocks are drawn for both, so that what changes both alike, a trend too, leaves
  the interval. Where the ratio or difference itself changes over the steps, that does count as noise.
- Responses and answers: prompts are drawn, with all their responses, as responses to one prompt are alike.

Seeds are not drawn: two of them would give an interval that holds the truth about every other time. An interval says
how sure a mean over *these* runs is; how far runs differ is told by each seed's own value beside it.

Random numbers are seeded: a page that is made again is the same page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
BLOCK, BLOCKS = 20, 8
"""Steps that are drawn together: at most so many, and no more than makes so many blocks of a curve."""

LEAST_STEPS = 40
"""Curves of fewer steps are given no interval: too few blocks to draw from."""

Values = NDArray[np.float64]

BySeed = Mapping[int, Sequence[float]]
"""A value for each step, or for each problem, by seed."""


Counted = tuple[Sequence[float], Sequence[float]]
"""Of each prompt the sum over its tokens, and how many these are."""


@dataclass(frozen=True)
class Estimate:
    """A number, the middle 95 % of its bootstrap distribution, and the 95th percentile.

    Args:
        value: the number.
        low, high, bound95: NaN where there is no interval.
        blocks: how many neighbouring steps were drawn together, of each seed's curve; empty where it is no curve.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    bound95: float = math.nan
    blocks: tuple[int, ...] = ()

    @classmethod
    def of(cls, value: float, draws: Values, blocks: tuple[int, ...] = ()) -> Estimate:
        low, high, bound = np.percentile(draws, [2.5, 97.5, 95.0])
        return cls(float(value), float(low), float(high), float(bound), blocks)

    @property
    def has_interval(self) -> bool:
        return not math.isnan(self.low)


def shared(a: Mapping[int, Any], b: Mapping[int, Any]) -> list[int]:
    """Seeds that both have."""
    return [seed for seed in a if seed in b]


def means(runs: BySeed) -> dict[int, float]:
    """Each seed's own mean."""
    return {seed: float(np.mean(run)) for seed, run in runs.items()}


def ratios(above: BySeed, below: BySeed) -> dict[int, float]:
    """Each seed's own ratio of means."""
    a, b = means(above), means(below)
    return {seed: a[seed] / b[seed] for seed in shared(a, b)}


def differences(one: BySeed, other: BySeed) -> dict[int, float]:
    """Each seed's own difference of means."""
    a, b = means(one), means(other)
    return {seed: a[seed] - b[seed] for seed in shared(a, b)}


# --- curves ----------------------------------------------------------------------------------------------------------


def mean_of_runs(runs: BySeed) -> float:
    """The mean over steps of each seed's run, and over seeds with equal weight."""
    return float(np.mean(list(means(runs).values())))


def ratio_of_runs(above: BySeed, below: BySeed) -> Estimate:
    """``mean_of_runs(above) / mean_of_runs(below)`` over the seeds that both have, seed by seed the same steps."""
    return _compared(above, below, np.divide)


def difference_of_runs(one: BySeed, other: BySeed) -> Estimate:
    """``mean_of_runs(one) - mean_of_runs(other)``, in the same way."""
    return _compared(one, other, np.subtract)


def ratio_of_each_run(above: BySeed, below: BySeed) -> dict[int, Estimate]:
    """`ratio_of_runs` of each seed alone."""
    return {seed: ratio_of_runs({seed: above[seed]}, {seed: below[seed]}) for seed in shared(above, below)}


def _compared(one: BySeed, other: BySeed, how: Callable[[Any, Any], Any]) -> Estimate:
    seeds = shared(one, other)
    if any(len(one[seed]) != len(other[seed]) for seed in seeds):
        raise ValueError("runs that are compared must be given over the same steps")
    sides = [{seed: np.asarray(runs[seed], dtype=np.float64) for seed in seeds} for runs in (one, other)]
    value = float(how(*(mean_of_runs(side) for side in sides)))
    if min(len(one[seed]) for seed in seeds) < LEAST_STEPS:
        return Estimate(value)
    draws = [np.mean([_block_means(run, seed) for seed, run in side.items()], axis=0) for side in sides]
    return Estimate.of(value, how(*draws), tuple(block_length(len(one[seed])) for seed in seeds))


def block_length(steps: int) -> int:
    """How many neighbouring steps of a curve are drawn together."""
    return max(1, min(BLOCK, steps // BLOCKS))


def _block_means(run: Values, seed: int) -> Values:
    """Means of series that are made of blocks of a run; which blocks, only its length and the seed decide.

    The last block is cut, so that a series is as long as the run.
    """
    block, steps = block_length(len(run)), len(run)
    full, rest = divmod(steps, block)
    around = np.concatenate([run, run[: block - 1]])
    picked = np.random.default_rng([steps, seed]).integers(0, steps, (DRAWS, full + 1))
    total = np.convolve(around, np.ones(block), "valid")[picked[:, :full]].sum(1)
    if rest:
        total += np.convolve(around[: steps + rest - 1], np.ones(rest), "valid")[picked[:, full]]
    means: Values = total / steps
    return means


# --- prompts ---------------------------------------------------------------------------------------------------------


def ratio_of_sums(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> Estimate:
    """The sum of all values of ``above`` over that of ``below``.

    Args:
        above, below: for every set of weights a value a prompt, the same prompts in both. Prompts are drawn within
            their set.
    """
    a, b = np.zeros(DRAWS), np.zeros(DRAWS)
    for i, (upper, lower) in enumerate(zip(above, below, strict=True)):
        times = _times_drawn(len(upper), i)
        a += times @ np.asarray(upper, dtype=np.float64)
        b += times @ np.asarray(lower, dtype=np.float64)
    return Estimate.of(sum(map(sum, above)) / sum(map(sum, below)), a / b)


def ratio_of_means(above: Sequence[Counted], below: Sequence[Counted]) -> Estimate:
    """The mean per token of ``above`` over that of ``below``, whose responses are others to the same prompts.

    Args:
        above, below: for every set of weights the sums and the tokens of each prompt. Prompts are drawn within their
            set, for both sides at once.
    """
    value, drawn = np.zeros(4), np.zeros((4, DRAWS))
    for i, (upper, lower) in enumerate(zip(above, below, strict=True)):
        columns = np.asarray([*upper, *lower], dtype=np.float64)
        value += columns.sum(1)
        drawn += columns @ _times_drawn(columns.shape[1], i).T
    return Estimate.of(*((x[0] / x[1]) / (x[2] / x[3]) for x in (value, drawn)))


def mean_of_problems(shares: BySeed) -> Estimate:
    """The mean over problems and seeds; all seeds were asked the same problems, which are drawn for all at once."""
    values = np.mean([np.asarray(share, dtype=np.float64) for share in shares.values()], axis=0)
    return Estimate.of(values.mean(), _times_drawn(len(values), 0) @ values / len(values))


def difference_of_problems(one: BySeed, other: BySeed) -> Estimate:
    """``mean_of_problems(one) - mean_of_problems(other)`` over the seeds that both have, problem by problem."""
    apart = {seed: np.subtract(one[seed], other[seed]).tolist() for seed in shared(one, other)}
    return mean_of_problems(apart)


@lru_cache(maxsize=64)
def _times_drawn(size: int, stratum: int) -> NDArray[np.float32]:
    """How often each of so many prompts is in each draw, ``[DRAWS, size]``."""
    picked = np.random.default_rng([size, stratum]).integers(0, size, (DRAWS, size))
    flat = (picked + np.arange(DRAWS)[:, None] * size).ravel()
    return np.bincount(flat, minlength=DRAWS * size).reshape(DRAWS, size).astype(np.float32)
