"""Sections about kept weights that both engines were given: what 4-bit kernels add, and what the contract buys."""

from __future__ import annotations

import math
from collections.abc import Sequence

from page import Section, markdown
from rows import Results, Row, having, paired_ratio, per_token, sampled_ratio
from variants import VARIANTS
from words import MODELS, each, factor, k3, machines, share, with_interval


def paired(experiments: Sequence[Results]) -> Section | None:
    """What 4-bit kernels add to the mismatch that bf16 kernels have anyway."""
    table, paths, measured = [], [], list[Row]()
    for results in experiments:
        rows = results.paired("contract")
        if rows:
            measured += rows
            ratio = paired_ratio(rows)
            table.append(
                [
                    MODELS[results.name],
                    str(len(rows)),
                    f"{sum(row['tokens'] for row in rows):,}",
                    *(k3(per_token(rows, column)) for column in ("k3_nvfp4", "k3_bf16")),
                    with_interval(ratio, factor),
                    factor(ratio.bound95),
                    each(ratio_of_each(results), factor),
                ]
            )
            paths.append([MODELS[results.name], *_paths(rows)])
    if not table:
        return None
    head = [
        "model",
        "sets of weights",
        "tokens",
        "k3 of the NVFP4 engine",
        "k3 of the bf16 engine",
        "NVFP4 / bf16",
        "95 % bound",
        "each seed",
    ]
    text = (
        "Weights that QAT runs kept along the way; those before the first step count once. The same tokens, sampled by "
        "the NVFP4 engine, are scored in whole sequences by this engine, by a bf16 engine that holds the dequantized "
        "weights, and by the trainer; each k3 is against the trainer. In brackets, and for the bound that 95 of 100 "
        "draws stay below: prompts drawn anew within each set of weights. The second table is about decoding, token by "
        "token with a KV cache: what an engine said of a token when it drew it, against the trainer. There each engine "
        "drew tokens of its own after the same prompts, and prompts are drawn anew for both at once. Engines apart: "
        f"what the two engines give the same tokens, scored in whole sequences. {machines(measured)}"
    )
    tables = [markdown(head, table), markdown(PATHS, paths)]
    return Section("The mismatch that 4-bit kernels add", text, "\n\n".join(tables))


PATHS = [
    "model",
    "k3 of the NVFP4 engine as it sampled",
    "k3 of the bf16 engine as it sampled",
    "NVFP4 / bf16",
    "engines apart, k3",
    "engines apart, largest difference of a log-probability",
]


def _paths(rows: Sequence[Row]) -> list[str]:
    """The cells of `PATHS` but the first; a dash where no row has what it takes."""
    decoded = having(rows, "k3_bf16_sampled", "lengths_bf16")
    ratio = sampled_ratio(decoded)
    engines, apart = having(rows, "k3_engines"), having(rows, "apart")
    return [
        k3(per_token(decoded or rows, "k3_sampled")),
        k3(per_token(decoded, "k3_bf16_sampled", "lengths_bf16")) if decoded else "–",
        with_interval(ratio, factor) if ratio is not None else "–",
        k3(per_token(engines, "k3_engines")) if engines else "–",
        k3(max(_largest(row["apart"]) for row in apart)) if apart else "–",
    ]


def _largest(apart: object) -> float:
    """Of a number, or of one for each response."""
    return max(map(_largest, apart), default=-math.inf) if isinstance(apart, list) else float(str(apart))


def ratio_of_each(results: Results) -> dict[int, float]:
    """The paired ratio of each seed's own weights."""
    rows = {seed: results.paired("contract", seed) for seed in sorted({run["seed"] for run in results.runs})}
    return {seed: paired_ratio(found).value for seed, found in rows.items() if found}


VARIANT_WORDS = {
    "contract": "this package: power-of-two scale of the group, its bytes on both sides",
    "amax": "global scale amax / 2688, the same bytes on both sides",
    "unfused": "a global scale for each weight of a fused layer, the same bytes on both sides",
    "unclamped": "block scales below 2⁻⁶ not raised to it, the same bytes on both sides",
    "requantized": "engine rounds the master weights itself (compressed-tensors)",
    "rounded-twice": "engine rounds the trainer's values again (compressed-tensors)",
    "repacked": "engine packs the trainer's values again, by our rules",
}


def contract(experiments: Sequence[Results]) -> Section | None:
    """Each part of the contract taken away, on the same weights."""
    table, measured = [], list[Row]()
    for results in experiments:
        tried = {(row["run"], row["step"]) for variant in VARIANTS for row in results.paired(variant)}
        for variant in VARIANTS:
            if variant != "contract":
                tried &= {(row["run"], row["step"]) for row in results.paired(variant)}
        for variant in VARIANTS if tried else ():
            rows = [row for row in results.paired(variant) if (row["run"], row["step"]) in tried]
            if rows:
                measured += rows
                table.append([MODELS[results.name], VARIANT_WORDS[variant], *_cells(variant, rows)])
    if not table:
        return None
    head = [
        "model",
        "what the two sides hold",
        "trainer: not the contract's",
        "engine: not the contract's",
        "k3 of the NVFP4 engine",
        "k3 of the bf16 engine",
        "NVFP4 / bf16",
    ]
    text = (
        "The same kept weights of QAT runs under other rules. In every row the NVFP4 engine samples with the bytes it "
        "is sent, and the bf16 engine holds the values that the trainer computes with; each k3 is against the trainer. "
        "Counted is how much of the 4-bit weights differs from what the contract makes of the same master weights: "
        "values, bytes of codes, block scales, global scales. Where nothing differs, nothing is compared. "
        f"{machines(measured)}"
    )
    return Section("What the contract buys", text, markdown(head, table))


def _cells(variant: str, rows: Sequence[Row]) -> list[str]:
    trainer, engine = (_differing(rows, side) for side in ("trainer", "engine"))
    if variant != "contract" and trainer == engine == NOTHING:
        return [trainer, engine, "–", "–", "no difference on these weights"]
    k3s = [k3(per_token(rows, column)) for column in ("k3_nvfp4", "k3_bf16")]
    return [trainer, engine, *k3s, with_interval(paired_ratio(rows), factor)]


NOTHING = "nothing"

_PARTS = {"values": "values", "codes": "code bytes", "scales": "block scales", "divisors": "global scales"}


def _differing(rows: Sequence[Row], side: str) -> str:
    """``12 % of values, 3 % of code bytes, 56 of 56 global scales``"""
    counts = {part: sum(row["differs"][side][part] for row in rows) for part in _PARTS}
    of = {part: sum(row["differs"]["of"][part] for row in rows) for part in _PARTS}
    if not any(counts.values()):
        return NOTHING
    return ", ".join(f"{words}: {share(counts[part], of[part])}" for part, words in _PARTS.items())
