"""Sections that compare arms: curves over the steps, and evaluations of the weights after the last one.

Arms are compared over the steps that all of a table's arms have with a seed, and ratios and differences are taken seed
by seed, as arms with one seed are given the same prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from intervals import (
    BySeed,
    Estimate,
    difference_of_problems,
    difference_of_runs,
    differences,
    mean_of_problems,
    mean_of_runs,
    means,
    ratio_of_runs,
    ratios,
    shared,
)
from page import Picture, Section, markdown
from rows import Results, last_quarter
from words import (
    ARM_LABELS,
    MODELS,
    OWN_PRECISION,
    PRECISIONS,
    SUFFIXES,
    bf16_of,
    blocks,
    each,
    k3,
    label,
    machines,
    percent,
    settings,
    sharing,
    signed,
    signed_points,
    times,
    with_interval,
)

from nvfp4_qat.report_page import byte_size

K3 = "rollout_corr/k3_kl"

PLAIN = ("bf16", "noqat", "qat", "qat-ffn")
FAST = ("bf16-fast", "noqat-fast", "qat-fast")

Compared = Callable[[BySeed, BySeed], Estimate]
OfEach = Callable[[BySeed, BySeed], dict[int, float]]


def comparison(title: str, results: Results, names: Sequence[str], picture: str) -> Section | None:
    """Runs side by side: mismatch, reward, traffic, time."""
    there = [name for name in names if name in results.names()]
    kl = results.common(there, K3)
    there = [name for name in there if kl[name]]
    if not there:
        return None
    mismatch = [
        [
            label(results, name),
            _extent(kl[name]),
            k3(mean_of_runs(kl[name])),
            each(means(kl[name]), k3),
            *_against_bf16(results, name, kl, ratio_of_runs, ratios, times),
        ]
        for name in there
    ]
    reward = last_quarter(results.common(there, "reward"))
    seconds, traffic = results.common(there, "time/step"), results.common(there, "sync_bytes")
    rewards = [
        [
            label(results, name),
            signed(mean_of_runs(reward[name])),
            each(means(reward[name]), signed),
            *_against_bf16(results, name, reward, difference_of_runs, differences, signed),
            _own_accuracy(results, name),
            byte_size(next(iter(traffic[name].values()))[-1]),
            f"{mean_of_runs(seconds[name]):.2f}",
        ]
        for name in there
    ]
    runs = [run for run in results.runs if run["name"] in there]
    circumstances = [c for run in runs for c in run.get("circumstances") or []]
    early = results.unfinished(there)
    said = settings(runs)
    parts = [
        "" if said.startswith(MODELS[results.name]) else f"{MODELS[results.name]}.",
        said,
        machines(circumstances),
        sharing(runs),
        f"Unfinished: {early}." if early else "",
        "Means over the steps that all these runs have, and over their last quarter for the reward.",
        *_drawn(results, {"k3 / bf16": (kl, ratio_of_runs), "reward − bf16": (reward, difference_of_runs)}),
        "In the picture a thin line is a seed, a thick one the mean over seeds, smoothed by a moving mean over an "
        "eighth of the steps, on logarithmic axes a geometric one; accuracy is not smoothed.",
    ]
    text = " ".join(part for part in parts if part)
    tables = [
        markdown(["run", "seeds × steps", "k3 KL", "each seed", "/ bf16", "each seed"], mismatch),
        markdown(
            [
                "run",
                "reward, last quarter",
                "each seed",
                "− bf16",
                "each seed",
                "accuracy after the last step, as it samples",
                "sync",
                "s a step",
            ],
            rewards,
        ),
    ]
    labels = ", ".join(label(results, name) for name in there)
    panels = "k3 KL, reward, accuracy, entropy, gradient norm, share of 4-bit codes that a step changes"
    alt = f"Curves over the steps of {labels}: {panels}"
    return Section(title, text, "\n\n".join(tables), Picture(picture, alt, ()))


def _drawn(results: Results, columns: Mapping[str, tuple[Mapping[str, BySeed], Compared]]) -> list[str]:
    """Of each column in a sentence: in what blocks steps were drawn, or that it has no interval."""
    said = []
    for words, (runs, compared) in columns.items():
        bases = {name: runs.get(bf16_of(results, name) or "", {}) for name in runs}
        found = {blocks(compared(runs[name], base)): None for name, base in bases.items() if shared(runs[name], base)}
        if found:
            said.append(f"{words}: {' or '.join(found)}.")
    return said


def _extent(runs: BySeed) -> str:
    """``2 × 200``"""
    lengths = sorted({len(run) for run in runs.values()})
    return f"{len(runs)} × {lengths[0]}" if len(lengths) == 1 else " + ".join(str(len(run)) for run in runs.values())


def _against_bf16(
    results: Results,
    name: str,
    runs: Mapping[str, BySeed],
    compared: Compared,
    of_each: OfEach,
    write: Callable[[float], str],
) -> list[str]:
    """Two cells: a run beside the bf16 run, all seeds and each."""
    base = runs.get(bf16_of(results, name) or "", {})
    if not shared(runs[name], base):
        return ["–", "–"]
    return [with_interval(compared(runs[name], base), write), each(of_each(runs[name], base), write)]


def _own_accuracy(results: Results, name: str) -> str:
    """In the precision that the run's rollouts have."""
    answers = results.answers(name, OWN_PRECISION[results.arm(name)])
    return with_interval(mean_of_problems(answers), percent) if answers else "–"


def evaluations(title: str, results: Results) -> Section | None:
    """The same trained weights evaluated in each precision."""
    rows = [row for row in results.measured if row["kind"] == "evaluation"]
    there = [name for name in results.names() if results.answers(name, "bf16")]
    if not there:
        return None
    table = []
    for name in there:
        own = results.answers(name, "bf16")
        base = results.answers(bf16_of(results, name) or "", "bf16")
        apart = ["–", "–"]
        if shared(own, base):
            apart = [
                with_interval(difference_of_problems(own, base), signed_points),
                each(differences(own, base), signed_points),
            ]
        cells = [_accuracy(results.answers(name, precision)) for precision in PRECISIONS]
        table.append([label(results, name), cells[0], *apart, *cells[1:]])
    first = [_accuracy(results.first_answers(precision)) for precision in PRECISIONS]
    table.insert(0, ["before the first step", first[0], "–", "–", *first[1:]])
    head = list(PRECISIONS.values())
    text = (
        f"{MODELS[results.name]}: weights after the last step, each set in every precision; {rows[0]['samples']} "
        f"responses to each of {len(rows[0]['right'])} problems, the same for all. Differences are in percentage "
        f"points. In brackets: problems drawn anew, for a difference the same ones on both sides. {machines(rows)}"
    )
    return Section(title, text, markdown(["trained as", head[0], "− bf16, points", "each seed", *head[1:]], table))


def _accuracy(answers: BySeed) -> str:
    return with_interval(mean_of_problems(answers), percent) if answers else "–"


SERVED = (
    (("qat", "nvfp4"), ("bf16", "bf16")),
    (("noqat", "nvfp4"), ("bf16", "bf16")),
    (("bf16", "nvfp4"), ("bf16", "bf16")),
    (("qat", "nvfp4"), ("qat-ffn", "nvfp4-ffn")),
)
"""What is served: arm and precision, and what it is compared with."""


def served(experiments: Sequence[Results]) -> Section | None:
    """What comes out in the precision that is served, beside the bf16 arm in bf16."""
    table = [
        [MODELS[results.name] + words, _served(*one), _served(*other), *_apart(results, suffix, one, other)]
        for results in experiments
        for suffix, words in SUFFIXES.items()
        for one, other in SERVED
        if _apart(results, suffix, one, other)
    ]
    if not table:
        return None
    text = (
        "Accuracy after the last step in the precision that each arm would be served in. Differences are in percentage "
        "points; in brackets problems are drawn anew, the same ones on both sides."
    )
    head = ["model", "served", "compared with", "accuracy", "of the other", "difference, points", "each seed"]
    return Section("Accuracy as served", text, markdown(head, table))


def _served(arm: str, precision: str) -> str:
    if arm == "bf16":
        return "bf16 arm, in bf16" if precision == "bf16" else "bf16 arm, rounded plainly, in NVFP4"
    return f"{ARM_LABELS[arm]}, {PRECISIONS[precision]}"


def _apart(results: Results, suffix: str, *sides: tuple[str, str]) -> list[str]:
    """Four cells of two sides; none where a side is missing."""
    one, other = (results.answers(arm + suffix, precision) for arm, precision in sides)
    if not shared(one, other):
        return []
    return [
        percent(mean_of_problems(one).value),
        percent(mean_of_problems(other).value),
        with_interval(difference_of_problems(one, other), signed_points),
        each(differences(one, other), signed_points),
    ]
