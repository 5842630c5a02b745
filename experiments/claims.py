"""What was claimed before the runs, and what came out: a table for the top of the page, and README's headline.

A claim is answered by a number. ``yes`` and ``no`` are given where the number decides, by the rule in the claim's
words; ``open`` where the interval is on both sides of what was claimed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from intervals import (
    BySeed,
    difference_of_problems,
    difference_of_runs,
    differences,
    mean_of_runs,
    ratio_of_runs,
    ratios,
    shared,
)
from page import Section, markdown
from rows import Results, last_quarter, paired_ratio
from section_arms import K3, PLAIN
from section_contract import ratio_of_each
from words import ARM_LABELS, MODELS, factor, k3, seeds, signed, signed_percent, times, with_interval

KERNELS_AT_MOST, FACTOR_AT_LEAST = 1.05, 30.0

NOT_RUN = ("not run", "–")

Answer = tuple[str, str]
"""What came out, and whether that is what was claimed."""


def claims(dense: Results, moe: Results, smollm2: Results) -> Section:
    """The table; it is there without rows too."""
    table = [
        [claim, MODELS[results.name], *answer]
        for claim, experiments in _CLAIMS.items()
        for results in (dense, moe, smollm2)
        if results.name in experiments
        for answer in _answers(claim, results)
    ]
    text = (
        "In brackets: 95 % intervals, explained above. Yes and no follow from the numbers by the rule that the claim "
        "names; open: the interval is on both sides of it."
    )
    return Section(
        "What was claimed, what came out", text, markdown(["claim", "model", "came out", "as claimed"], table)
    )


KERNELS = f"k3 of NVFP4 kernels / of bf16 kernels, same tokens: 95 % bound ≤ {KERNELS_AT_MOST}"
FACTOR = f"k3 without QAT / with QAT: ≥ {FACTOR_AT_LEAST:.0f} with each seed"
FLOOR = "k3 with QAT / bf16: as it comes out"
REWARD = "reward, last quarter: QAT's mean is in bf16's interval"
OFFLINE = "accuracy after the last step, all in bf16: the difference to bf16 is 0 within its interval"

_CLAIMS = {
    KERNELS: ("dense", "moe"),
    FACTOR: ("dense", "moe", "smollm2"),
    FLOOR: ("dense", "moe", "smollm2"),
    REWARD: ("dense", "moe", "smollm2"),
    OFFLINE: ("dense", "moe"),
}
"""Claims, and the experiments that answer them."""


def _answers(claim: str, results: Results) -> Iterator[Answer]:
    """One, or one for each arm."""
    if claim == OFFLINE:
        yield from _offline(results)
        return
    kl, reward = compared(results, K3), last_quarter(compared(results, "reward"))
    found = {
        KERNELS: lambda: _kernels(results),
        FACTOR: lambda: _factor(kl["noqat"], kl["qat"]),
        FLOOR: lambda: _floor(kl["qat"], kl["bf16"]),
        REWARD: lambda: _reward(reward["qat"], reward["bf16"]),
    }
    yield found[claim]()


def compared(results: Results, column: str) -> Mapping[str, BySeed]:
    """`Results.common` of the runs without suffixes; those that are not there are empty."""
    found = results.common([name for name in PLAIN if name in results.names()], column)
    return {name: found.get(name, {}) for name in PLAIN}


def _kernels(results: Results) -> Answer:
    rows = results.paired("contract")
    if not rows:
        return NOT_RUN
    ratio = paired_ratio(rows)
    bound = factor(ratio.bound95)
    text = f"{with_interval(ratio, factor)}, bound {bound}{seeds(ratio_of_each(results), factor)}"
    held = "yes" if ratio.bound95 <= KERNELS_AT_MOST else "no" if ratio.low > KERNELS_AT_MOST else "open"
    return text, held


def _factor(noqat: BySeed, qat: BySeed) -> Answer:
    if not shared(noqat, qat):
        return NOT_RUN
    own = ratios(noqat, qat)
    text = f"{with_interval(ratio_of_runs(noqat, qat), times)}{seeds(own, times)}"
    return text, "yes" if min(own.values()) >= FACTOR_AT_LEAST else "no"


def _floor(qat: BySeed, bf16: BySeed) -> Answer:
    if not shared(qat, bf16):
        return NOT_RUN
    return f"{with_interval(ratio_of_runs(qat, bf16), factor)}{seeds(ratios(qat, bf16), factor)}", "–"


def _reward(qat: BySeed, bf16: BySeed) -> Answer:
    both = shared(qat, bf16)
    if not both:
        return NOT_RUN
    one, other = (mean_of_runs({seed: runs[seed] for seed in both}) for runs in (qat, bf16))
    apart = with_interval(difference_of_runs(qat, bf16), signed)
    text = (
        f"QAT {signed(one.value)}, bf16 {with_interval(other, signed)}; difference {apart}"
        f"{seeds(differences(qat, bf16), signed)}"
    )
    return text, "yes" if other.holds(one.value) else "no"


def _offline(results: Results) -> Iterator[Answer]:
    base = results.answers("bf16", "bf16")
    others = {name: results.answers(name, "bf16") for name in PLAIN if name != "bf16"}
    others = {name: own for name, own in others.items() if shared(own, base)}
    if not others:
        yield NOT_RUN
    for name, own in others.items():
        apart = difference_of_problems(own, base)
        text = f"{ARM_LABELS[name]} {with_interval(apart, signed_percent)}"
        yield text + seeds(differences(own, base), signed_percent), "yes" if apart.holds(0.0) else "no"


HEADLINE = [
    "model",
    "seeds × steps",
    *(f"k3 KL {ARM_LABELS[arm]}" for arm in ("bf16", "noqat", "qat")),
    "no QAT / QAT",
    "QAT / bf16",
    "reward at the end, QAT − bf16",
]


def headline(experiments: Sequence[Results]) -> str:
    """README's table, a row for each model whose three arms have been run; empty if none has."""
    table = []
    for results in experiments:
        kl, reward = compared(results, K3), last_quarter(compared(results, "reward"))
        bf16, noqat, qat = (kl[arm] for arm in ("bf16", "noqat", "qat"))
        if not (bf16 and noqat and qat and shared(noqat, qat) and shared(qat, bf16)):
            continue
        table.append(
            [
                MODELS[results.name],
                f"{len(qat)} × {min(map(len, qat.values()))}",
                *(k3(mean_of_runs(runs).value) for runs in (bf16, noqat, qat)),
                f"**{times(ratio_of_runs(noqat, qat).value)}×**{seeds(ratios(noqat, qat), times)}",
                f"{times(ratio_of_runs(qat, bf16).value)}×{seeds(ratios(qat, bf16), times)}",
                with_interval(difference_of_runs(reward["qat"], reward["bf16"]), signed),
            ]
        )
    return markdown(HEADLINE, table) if table else ""
