"""Means and ratios with 95 % intervals, by bootstrap.

Steps of a run follow from each other, so a curve is not drawn anew step by step but in blocks of neighbouring steps
(moving-block bootstrap, Künsch 1989). Responses are independent given the weights and are drawn one by one. Random
numbers are seeded: a page that is made again is the same page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
BLOCK = 20
"""Steps that are drawn together."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number, the middle 95 % of its bootstrap distribution, and the 95th percentile."""

    value: float
    low: float
    high: float
    bound95: float

    @classmethod
    def of(cls, value: float, draws: Values) -> Estimate:
        low, high, bound = np.percentile(draws, [2.5, 97.5, 95.0])
        return cls(float(value), float(low), float(high), float(bound))

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals have a number in common."""
        return self.low <= other.high and other.low <= self.high


def ratio_of_sums(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """``sum(above) / sum(below)`` of paired values, one pair a response; pairs are drawn with replacement."""
    a, b = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    draws = _by_parts(len(a), lambda rows: a[rows].sum(1) / b[rows].sum(1))
    return Estimate.of(a.sum() / b.sum(), draws)


def _by_parts(size: int, of: Callable[[NDArray[np.int64]], Values]) -> Values:
    """A statistic of `DRAWS` drawn index rows, some at a time so that they take little memory."""
    generator, found, left = np.random.default_rng(0), [], DRAWS
    while left:
        count = min(left, max(1, 4_000_000 // size))
        found.append(of(generator.integers(0, size, (count, size))))
        left -= count
    return np.concatenate(found)


def mean_of_runs(runs: Sequence[Sequence[float]]) -> Estimate:
    """The mean over the steps of one or several runs (seeds), each with equal weight.

    Args:
        runs: a value a step; two runs need not have the same number of steps.
    """
    values, draws = _means(runs, seed=0)
    return Estimate.of(values, draws)


def ratio_of_runs(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> Estimate:
    """``mean_of_runs(above) / mean_of_runs(below)``, the two drawn independently."""
    a, a_draws = _means(above, seed=0)
    b, b_draws = _means(below, seed=1)
    return Estimate.of(a / b, a_draws / b_draws)


def _means(runs: Sequence[Sequence[float]], seed: int) -> tuple[float, Values]:
    """The mean and its bootstrap distribution: seeds are drawn too where there are several."""
    generator = np.random.default_rng(seed)
    series = [np.asarray(run, dtype=np.float64) for run in runs]
    of_run = np.stack([_block_means(run, generator) for run in series])
    picked = generator.integers(0, len(series), (len(series), DRAWS))
    draws = of_run[picked, np.arange(DRAWS)].mean(0)
    return float(np.mean([run.mean() for run in series])), draws


def _block_means(run: Values, generator: np.random.Generator) -> Values:
    """Means of series that are made of blocks of a run."""
    block = min(BLOCK, len(run))
    sums = np.convolve(run, np.ones(block), "valid")
    count = -(-len(run) // block)
    picked = generator.integers(0, len(sums), (DRAWS, count))
    means: Values = sums[picked].mean(1) / block
    return means
