"""What was claimed before the runs, and what came out: a table for the top of the page, and README's headline.

A claim is answered by an interval and a bound or margin that was fixed before these runs were made. ``yes`` and ``no``
are given where the interval decides, ``open`` elsewhere: also where a run has not made all its steps or has not been
measured to its end, and where there are too few steps for an interval.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from intervals import (
    BySeed,
    Estimate,
    difference_of_problems,
    difference_of_runs,
    differences,
    mean_of_runs,
    ratio_of_each_run,
    ratio_of_runs,
    ratios,
    shared,
)
from page import Section, markdown
from rows import Results, Row, last_quarter, paired_ratio
from section_arms import K3, PLAIN
from section_contract import ratio_of_each
from words import ARM_LABELS, MODELS, blocks, factor, k3, seeds, signed, signed_points, times, with_interval

KERNELS_AT_MOST, FACTOR_AT_LEAST = 1.05, 30.0

REWARD_MARGIN, ACCURACY_MARGIN = 0.05, 0.03
"""Differences that would not matter: of a mean reward, which is between -1 and +1, and of a share of right answers."""

NOT_RUN = ("not run", "–")

Answer = tuple[str, str]
"""What came out, and whether that is what was claimed."""


def claims(dense: Results, moe: Results, smollm2: Results) -> Section:
    """The table; it is there without rows too."""
    table = []
    for claim, experiments in _CLAIMS.items():
        asked = [results for results in (dense, moe, smollm2) if results.name in experiments]
        found = [(MODELS[results.name], answer) for results in asked for answer in _answers(claim, results)]
        table += [[claim, model, *answer] for model, answer in found if answer != NOT_RUN]
        if missing := [model for model, answer in found if answer == NOT_RUN]:
            table.append([claim, ", ".join(missing), *NOT_RUN])
    text = (
        "In brackets: 95 % intervals, explained above. Bounds and margins were fixed before these runs were made. "
        f"Kernels: yes if the bound is at most {KERNELS_AT_MOST}, no if the interval is above it. Factor: yes if the "
        f"interval of each seed's own ratio is at {FACTOR_AT_LEAST:.0f} or above, no if that of all seeds together is "
        "below. Reward and accuracy: yes if the whole interval of the difference lies within the margin, no if it is "
        "below it. Otherwise open, as is everything that rests on a run that is unfinished or not measured to its end."
    )
    return Section(
        "What was claimed, what came out", text, markdown(["claim", "model", "came out", "as claimed"], table)
    )


KERNELS = (
    f"k3 of NVFP4 kernels / of bf16 kernels, same tokens scored in whole sequences: 95 % bound ≤ {KERNELS_AT_MOST}"
)
FACTOR = f"k3 without QAT / with QAT: ≥ {FACTOR_AT_LEAST:.0f} with each seed, in these runs"
FLOOR = "k3 with QAT / bf16: as it comes out"
REWARD = f"reward, last quarter: QAT − bf16 within ±{REWARD_MARGIN}, in these runs"
OFFLINE = (
    f"accuracy of master weights in bf16 after the last step: the difference to the bf16 arm within "
    f"±{100 * ACCURACY_MARGIN:.0f} percentage points, in these runs"
)

_ALL = ("dense", "moe", "smollm2")

_CLAIMS = dict.fromkeys((KERNELS, FACTOR, FLOOR, REWARD, OFFLINE), _ALL)
"""Claims, and the experiments that answer them."""


def _answers(claim: str, results: Results) -> Iterator[Answer]:
    """One, or one for each arm."""
    if claim == OFFLINE:
        yield from _offline(results)
        return
    if claim == KERNELS:
        yield _finished(results, ("qat",), _kernels(results))
        return
    names, column, answer = {
        FACTOR: (("noqat", "qat"), K3, _factor),
        FLOOR: (("qat", "bf16"), K3, _floor),
        REWARD: (("qat", "bf16"), "reward", _reward),
    }[claim]
    found = compared(results, column, names)
    found = last_quarter(found) if claim == REWARD else found
    yield _finished(results, names, answer(*(found[name] for name in names)))


def _finished(results: Results, names: Sequence[str], answer: Answer) -> Answer:
    """The answer, open where one of the runs that it rests on has not made all its steps."""
    early = results.unfinished(names)
    return answer if answer == NOT_RUN or not early else (f"{answer[0]}; unfinished: {early}", "open")


def within(difference: Estimate, margin: float) -> str:
    """Whether a difference is none that matters; NaN decides nothing."""
    if -margin <= difference.low and difference.high <= margin:
        return "yes"
    return "no" if difference.high < -margin else "open"


def compared(results: Results, column: str, names: Sequence[str]) -> Mapping[str, BySeed]:
    """`Results.common` of these runs and no others, which may have made fewer steps; those not there are empty."""
    found = results.common([name for name in names if name in results.names()], column)
    return {name: found.get(name, {}) for name in names}


def _lacking(results: Results, name: str, measured: Collection[str]) -> str:
    """``; not measured to the end: qat-s1``: runs of a name, of all seeds, that are not among the measured ones."""
    missing = [key for key in results.keys(name).values() if key not in measured]
    return f"; not measured to the end: {', '.join(missing)}" if missing else ""


def _kernels(results: Results) -> Answer:
    rows = results.paired("contract")
    if not rows:
        return NOT_RUN
    ratio = paired_ratio(rows)
    bound = factor(ratio.bound95)
    text = f"{with_interval(ratio, factor)}, bound {bound}{seeds(ratio_of_each(results), factor)}"
    if missing := _lacking(results, "qat", _measured_last(results, rows)):
        return text + missing, "open"
    held = "yes" if ratio.bound95 <= KERNELS_AT_MOST else "no" if ratio.low > KERNELS_AT_MOST else "open"
    return text, held


def _measured_last(results: Results, rows: Sequence[Row]) -> set[str]:
    """Runs whose weights after the last step are among the rows; weights are measured in the order of their steps."""
    last = {run["run"]: run["steps"] for run in results.runs}
    return {row["run"] for row in rows if row["step"] == last[row["run"]]}


def _factor(noqat: BySeed, qat: BySeed) -> Answer:
    if not shared(noqat, qat):
        return NOT_RUN
    pooled, own = ratio_of_runs(noqat, qat), ratio_of_each_run(noqat, qat)
    each = ", ".join(with_interval(ratio, times) for ratio in own.values())
    text = f"{with_interval(pooled, times)}{f'; seeds {each}' if len(own) > 1 else ''}; {blocks(pooled)}"
    if all(ratio.low >= FACTOR_AT_LEAST for ratio in own.values()):
        return text, "yes"
    return text, "no" if pooled.high < FACTOR_AT_LEAST else "open"


def _floor(qat: BySeed, bf16: BySeed) -> Answer:
    if not shared(qat, bf16):
        return NOT_RUN
    ratio = ratio_of_runs(qat, bf16)
    return f"{with_interval(ratio, factor)}{seeds(ratios(qat, bf16), factor)}; {blocks(ratio)}", "–"


def _reward(qat: BySeed, bf16: BySeed) -> Answer:
    if not shared(qat, bf16):
        return NOT_RUN
    apart = difference_of_runs(qat, bf16)
    text = f"{with_interval(apart, signed)}{seeds(differences(qat, bf16), signed)}; {blocks(apart)}"
    return text, within(apart, REWARD_MARGIN)


def _offline(results: Results) -> Iterator[Answer]:
    base = results.answers("bf16", "bf16")
    others = {name: results.answers(name, "bf16") for name in PLAIN if name != "bf16" and name in results.names()}
    if not any(shared(own, base) for own in others.values()):
        yield NOT_RUN
        return
    for name, own in others.items():
        if not shared(own, base):
            yield f"{ARM_LABELS[name]} not evaluated", "–"
            continue
        apart = difference_of_problems(own, base)
        text = f"{ARM_LABELS[name]} {with_interval(apart, signed_points)} points"
        text += seeds(differences(own, base), signed_points)
        missing = "".join(
            _lacking(results, n, {results.keys(n)[s] for s in of}) for n, of in (("bf16", base), (name, own))
        )
        held = "open" if missing else within(apart, ACCURACY_MARGIN)
        yield _finished(results, ("bf16", name), (text + missing, held))


SHOWN = ("bf16", "noqat", "qat")
"""Runs of README's table."""

HEADLINE = [
    "model",
    "seeds × steps",
    *(f"k3 KL {ARM_LABELS[arm]}" for arm in SHOWN),
    "no QAT / QAT",
    "QAT / bf16",
    "reward at the end, QAT − bf16",
]


def headline(experiments: Sequence[Results]) -> str:
    """README's table, a row for each model whose three arms have been run; empty if none has."""
    table = []
    for results in experiments:
        kl = compared(results, K3, SHOWN)
        reward = last_quarter(compared(results, "reward", SHOWN))
        bf16, noqat, qat = (kl[arm] for arm in SHOWN)
        if not (bf16 and noqat and qat and shared(noqat, qat) and shared(qat, bf16)):
            continue
        early = " (unfinished)" if results.unfinished(SHOWN) else ""
        table.append(
            [
                MODELS[results.name],
                f"{len(qat)} × {min(map(len, qat.values()))}{early}",
                *(k3(mean_of_runs(runs)) for runs in (bf16, noqat, qat)),
                f"**{times(ratio_of_runs(noqat, qat).value)}×**{seeds(ratios(noqat, qat), times)}",
                f"{times(ratio_of_runs(qat, bf16).value)}×{seeds(ratios(qat, bf16), times)}",
                with_interval(difference_of_runs(reward["qat"], reward["bf16"]), signed),
            ]
        )
    return markdown(HEADLINE, table) if table else ""
