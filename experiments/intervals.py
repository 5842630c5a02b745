"""Means, ratios and differences with 95 % intervals, by bootstrap.

What is drawn anew decides what an interval is about:

- Curves: steps of a run follow from each other, so they are drawn in blocks of neighbouring steps (circular block
  bootstrap, Politis and Romano 1992). Arms of one seed are given the same prompts at a step (dynamic sampling may ask
  one for more of them): a ratio or difference of two arms draws the same blocks for both.
- Responses and answers: prompts are drawn, with all their responses, as responses to one prompt are alike.

Seeds are not drawn: two of them would give an interval that holds the truth about every other time. An interval says
how sure a mean over *these* runs is; how far runs differ is told by each seed's own value beside it.

Random numbers are seeded: a page that is made again is the same page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
BLOCK, BLOCKS = 20, 8
"""Steps that are drawn together: at most so many, and no more than makes so many blocks of a curve."""

Values = NDArray[np.float64]

BySeed = Mapping[int, Sequence[float]]
"""A value for each step, or for each problem, by seed."""


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

    def holds(self, value: float) -> bool:
        """Whether a number is in the interval."""
        return self.low <= value <= self.high


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


def mean_of_runs(runs: BySeed) -> Estimate:
    """The mean over steps of each seed's run, and over seeds with equal weight."""
    return Estimate.of(*_means(runs))


def ratio_of_runs(above: BySeed, below: BySeed) -> Estimate:
    """``mean_of_runs(above) / mean_of_runs(below)`` over the seeds that both have, seed by seed the same steps."""
    a, b = _paired(above, below)
    return Estimate.of(a[0] / b[0], a[1] / b[1])


def difference_of_runs(one: BySeed, other: BySeed) -> Estimate:
    """``mean_of_runs(one) - mean_of_runs(other)``, in the same way."""
    a, b = _paired(one, other)
    return Estimate.of(a[0] - b[0], a[1] - b[1])


def _paired(one: BySeed, other: BySeed) -> tuple[tuple[float, Values], tuple[float, Values]]:
    seeds = shared(one, other)
    if any(len(one[seed]) != len(other[seed]) for seed in seeds):
        raise ValueError("runs that are compared must be given over the same steps")
    return _means({seed: one[seed] for seed in seeds}), _means({seed: other[seed] for seed in seeds})


def _means(runs: BySeed) -> tuple[float, Values]:
    """The mean and its bootstrap distribution."""
    series = {seed: np.asarray(run, dtype=np.float64) for seed, run in runs.items()}
    draws = np.mean([_block_means(run, seed) for seed, run in series.items()], axis=0)
    return float(np.mean([run.mean() for run in series.values()])), draws


def _block_means(run: Values, seed: int) -> Values:
    """Means of series that are made of blocks of a run; which blocks, only its length and the seed decide."""
    block = max(1, min(BLOCK, len(run) // BLOCKS))
    sums = np.convolve(np.concatenate([run, run[: block - 1]]), np.ones(block), "valid")
    count = -(-len(run) // block)
    picked = np.random.default_rng([len(run), seed]).integers(0, len(sums), (DRAWS, count))
    means: Values = sums[picked].mean(1) / block
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
