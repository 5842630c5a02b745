"""What docs/experiments.md says, made from rows: a section an experiment, with its table.

Nothing is written here that does not follow from committed rows, and a section without rows is left out. Intervals are
the middle 95 % of a bootstrap (`intervals`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from intervals import Estimate, mean_of_runs, ratio_of_runs  # noqa: E402
from page import Picture, Section, markdown  # noqa: E402
from row_tools import short  # noqa: E402
from rows import RESULTS, Results, Row, paired_ratio, per_token, read  # noqa: E402
from variants import VARIANTS  # noqa: E402

from nvfp4_qat.report_page import byte_size, small  # noqa: E402

K3 = "rollout_corr/k3_kl"

MODELS = {
    "dense": "Qwen3 of 65 M parameters",
    "moe": "Qwen3-MoE of 61 M parameters",
    "smollm2": "SmolLM2-135M-Instruct",
}

PLAIN = ("bf16", "noqat", "qat", "qat-ffn")
FAST = ("bf16-fast", "noqat-fast", "qat-fast")

CURVES = {
    "dense.png": ("dense", PLAIN),
    "dense-fast.png": ("dense", FAST),
    "smollm2.png": ("smollm2", PLAIN),
    "moe.png": ("moe", PLAIN),
}
"""Pictures: experiment, and which of its runs are drawn."""


def sections(folder: Path = RESULTS) -> list[Section]:
    """All sections that there are rows for.

    Args:
        folder: where the experiments' rows are.
    """
    dense, moe, smollm2 = (Results(name, folder) for name in ("dense", "moe", "smollm2"))
    made: list[Section | None] = [
        _comparison("Experiment 1: with and without QAT", dense, PLAIN, "dense.png"),
        _comparison("Experiment 1 at five times the learning rate", dense, FAST, "dense-fast.png"),
        _comparison("Experiment 1 with a pretrained model", smollm2, PLAIN, "smollm2.png"),
        _strategies("Experiment 2: all layers or FFN only", dense),
        _comparison("Experiment 3: fused experts", moe, PLAIN, "moe.png"),
        _strategies("Experiment 3: evaluation", moe),
        _paired((dense, moe, smollm2)),
        _contract((dense, moe)),
        _quantizers(read(folder / "quantizers.jsonl")),
        _real_size(read(folder / "real_size.jsonl")),
    ]
    return [section for section in made if section is not None]


# --- numbers as text -------------------------------------------------------------------------------------------------


def _with(estimate: Estimate, write: Callable[[float], str]) -> str:
    """``1.02 (0.99–1.05)``"""
    return f"{write(estimate.value)} ({write(estimate.low)}–{write(estimate.high)})"


def _times(value: float) -> str:
    return f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def _percent(rows: Sequence[Row]) -> str:
    """Mean accuracy over seeds with twice its standard error: problems are the same for all seeds."""
    if not rows:
        return "–"
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    error = max(row["accuracy_se"] for row in rows)
    return f"{100 * mean:.1f} ± {200 * error:.1f} %"


def _last_quarter(runs: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    return [run[-max(len(run) // 4, 1) :] for run in runs]


def machines(runs: Iterable[Row]) -> str:
    """Where runs were made and with what, in a sentence."""
    seen = sorted({(short(r["versions"].get("gpu", "CPU")), r["versions"].get("vllm", "–"), r["date"]) for r in runs})
    gpus = " and ".join(dict.fromkeys(gpu for gpu, _, _ in seen))
    vllm = " and ".join(dict.fromkeys(v for _, v, _ in seen))
    return f"{gpus}, vLLM {vllm}, {' and '.join(dict.fromkeys(d for _, _, d in seen))}."


# --- sections --------------------------------------------------------------------------------------------------------


def _comparison(title: str, results: Results, names: Sequence[str], picture: str) -> Section | None:
    """Runs side by side: mismatch, reward, evaluation, traffic, time."""
    there = [name for name in names if name in results.names()]
    if not there:
        return None
    kl = {name: results.columns(name, K3) for name in there}
    base = next((name for name in there if results.arm(name) == "bf16"), None)
    head = [
        "run",
        "seeds × steps",
        "k3 KL",
        "/ bf16",
        "reward, last quarter",
        "accuracy at the end",
        "sync",
        "s a step",
    ]
    table = []
    for name in there:
        reward = mean_of_runs(_last_quarter(results.columns(name, "reward")))
        ends = [
            {"accuracy": a[0], "accuracy_se": e[0]}
            for a, e in zip(
                results.columns(name, "eval_end/accuracy"), results.columns(name, "eval_end/accuracy_se"), strict=True
            )
            if a
        ]
        seconds = mean_of_runs(results.columns(name, "time/step")).value
        table.append(
            [
                name,
                f"{len(kl[name])} × {min(map(len, kl[name]))}",
                _with(mean_of_runs(kl[name]), small),
                "–" if base is None else "1" if name == base else _with(ratio_of_runs(kl[name], kl[base]), _times),
                _with(reward, lambda value: f"{value:+.3f}"),
                _percent(ends),
                byte_size(results.columns(name, "sync_bytes")[0][-1]),
                f"{seconds:.2f}",
            ]
        )
    text = (
        f"{MODELS[results.name]}. {machines(r for r in results.runs if r['name'] in there)} {_factors(results, there)}"
    )
    alt = f"Curves of {', '.join(there)} over the steps: k3 KL, reward, accuracy, entropy, gradient norm, changed codes"
    return Section(title, text, markdown(head, table), Picture(picture, alt, ()))


def _factors(results: Results, names: Sequence[str]) -> str:
    """What QAT makes of the mismatch, in a sentence."""
    arms = {results.arm(name): results.columns(name, K3) for name in reversed(names)}
    said = []
    if "noqat" in arms and "qat" in arms:
        said.append(
            f"Without QAT the k3 KL is {_with(ratio_of_runs(arms['noqat'], arms['qat']), _times)} times that with it."
        )
    if "bf16" in arms and "qat" in arms:
        said.append(f"With QAT it is {_with(ratio_of_runs(arms['qat'], arms['bf16']), _times)} times that of bf16.")
    return " ".join(said)


def _strategies(title: str, results: Results) -> Section | None:
    """The same trained weights evaluated in each precision."""
    precisions = {"bf16": "in bf16", "nvfp4": "in NVFP4", "nvfp4-ffn": "in NVFP4, attention in bf16"}
    there = [name for name in results.names() if results.evaluations(name, "bf16")]
    if not there:
        return None
    head = ["trained as", *precisions.values()]
    table = [[name, *(_percent(results.evaluations(name, p)) for p in precisions)] for name in there]
    first = results.evaluations(there[0], "bf16")[0]
    text = (
        f"{MODELS[results.name]}: weights after the last step, avg@{first['samples']} over {first['problems']} "
        "problems that all are asked, mean over seeds ± twice its standard error over problems."
    )
    return Section(title, text, markdown(head, table))


def _paired(experiments: Sequence[Results]) -> Section | None:
    """What 4-bit kernels add to the mismatch that bf16 kernels have anyway."""
    table = []
    for results in experiments:
        rows = results.paired("contract")
        if rows:
            ratio = paired_ratio(rows)
            tokens = sum(row["tokens"] for row in rows)
            four, sixteen = per_token(rows, "k3_nvfp4"), per_token(rows, "k3_bf16")
            table.append(
                [
                    MODELS[results.name],
                    str(len(rows)),
                    f"{tokens:,}",
                    small(four),
                    small(sixteen),
                    _with(ratio, _times),
                    _times(ratio.bound95),
                ]
            )
    if not table:
        return None
    head = ["model", "sets of weights", "tokens", "k3 NVFP4 engine", "k3 bf16 engine", "ratio", "95 % bound"]
    text = (
        "Weights that the QAT runs kept along the way. The same sampled tokens are scored by the NVFP4 engine, by a "
        "bf16 engine that holds the dequantized weights, and by the trainer; each engine's k3 is against the trainer."
    )
    return Section("The mismatch that 4-bit kernels add", text, markdown(head, table))


VARIANT_WORDS = {
    "contract": "this package: power-of-two scale of the group, its bytes on both sides",
    "amax": "global scale amax / 2688, the same bytes on both sides",
    "unfused": "a scale for each weight of a fused layer",
    "unclamped": "block scales below 2⁻⁶ not raised to it",
    "requantized": "engine rounds the master weights itself (compressed-tensors)",
    "rounded-twice": "engine rounds the trainer's values again (compressed-tensors)",
    "repacked": "engine packs the trainer's values again, by our rules",
}


def _contract(experiments: Sequence[Results]) -> Section | None:
    """Each part of the contract taken away, on the same weights."""
    table = []
    for results in experiments:
        steps = sorted({row["step"] for row in results.paired("amax")})
        names = {row["run"] for row in results.paired("amax")}
        for variant in VARIANTS:
            rows = [row for row in results.paired(variant, steps=steps) if row["run"] in names]
            if rows:
                four, sixteen = per_token(rows, "k3_nvfp4"), per_token(rows, "k3_bf16")
                ratio = paired_ratio(rows)
                table.append([results.name, VARIANT_WORDS[variant], small(four), small(sixteen), _with(ratio, _times)])
    if not table:
        return None
    head = ["model", "what the two sides hold", "k3 NVFP4 engine", "k3 bf16 engine", "ratio"]
    text = (
        "The same kept weights of one QAT run under other rules, each against a bf16 engine that holds what the "
        "trainer computes with. A ratio above that of the first row is what the rule is there to prevent."
    )
    return Section("What the contract buys", text, markdown(head, table))


def _quantizers(rows: Sequence[Row]) -> Section | None:
    """Plain rounding by this package and by others, on weights that nobody rounded before."""
    if not rows:
        return None
    head = ["model", "quantizer", "global scale for", "weight error", "perplexity", "KL to bf16", "/ ours", "bits"]
    table = [
        [
            row["model"],
            row["quantizer"] if row["package"] is None else f"{row['quantizer']} ({row['version']})",
            row["global_scale"],
            f"{100 * row['weight_error']:.3f} %",
            f"{row['perplexity']:.4f}",
            small(row["kl"]) if row["kl"] else "0",
            _interval(row["kl_ratio"], row["kl_ratio_95"]),
            f"{row['bits_per_weight']:.4f}",
        ]
        for row in rows
    ]
    first = rows[0]
    text = (
        f"Weights of the trained models rounded once, without training for it; read are {first['sequences']} right "
        f"answers ({first['tokens']:,} tokens). KL is over the whole vocabulary. Others' numbers come from their own "
        f"code. {short(first['gpu'])}, torch {first['torch']}, {first['date'][:10]}."
    )
    return Section("Quality of the rounding", text, markdown(head, table))


def _interval(value: float | None, bounds: Sequence[float] | None) -> str:
    return "–" if value is None or bounds is None else f"{value:.3f} ({bounds[0]:.3f}–{bounds[1]:.3f})"


REAL_SIZE: Sequence[tuple[str, str, str, Callable[[float], str]]] = (
    ("steps", "seconds", "a whole step", lambda v: f"{v:.2f} s"),
    ("phases", "pack_seconds", "amax, all-reduce, packing", lambda v: f"{v:.3f} s"),
    ("phases", "forward_seconds", "forward", lambda v: f"{v:.2f} s"),
    ("phases", "backward_seconds", "backward", lambda v: f"{v:.2f} s"),
    ("phases", "optimizer_seconds", "AdamW", lambda v: f"{v:.2f} s"),
    ("traffic", "gathered_bytes", "all-gathered in a step, by each GPU", byte_size),
    ("sync", "bytes", "sent to the engine", byte_size),
    ("syncs", "seconds", "sync into the engine", lambda v: f"{v:.2f} s"),
    ("generate", "tokens_per_second", "tokens a second", lambda v: f"{v:,.0f}"),
    ("memory", "masters_bytes", "masters, each GPU", byte_size),
    ("memory", "optimizer_bytes", "AdamW's averages", byte_size),
    ("memory", "gradients_bytes", "gradients", byte_size),
    ("memory", "packed_shards_bytes", "packed shards", byte_size),
    ("memory", "forward_beyond_held_bytes", "peak of the forward beyond these", byte_size),
    ("memory", "backward_beyond_held_bytes", "peak of the backward beyond these", byte_size),
)
"""Row, column, what it is, how it is written."""

ENGINE_PARTS = (
    ("weights_loaded", "engine: weights"),
    ("kv_cache", "engine: KV cache"),
    ("graphs", "engine: CUDA graphs"),
)


def _real_size(rows: Sequence[Row]) -> Section | None:
    """Qwen3-30B-A3B's shape in both precisions; the last run of each arm counts."""
    arms = [arm for arm in ("bf16", "nvfp4") if any(row["arm"] == arm for row in rows)]
    if not arms:
        return None
    last: dict[tuple[str, str], Row] = {(row["arm"], row["what"]): row for row in rows}
    table = []
    for what, column, words, write in REAL_SIZE:
        values = [last.get((arm, what), {}).get(column) for arm in arms]
        if any(value is not None for value in values):
            table.append([words, *("–" if value is None else write(value) for value in values)])
    for part, words in ENGINE_PARTS:
        workers = [last.get((arm, "generate"), {}).get("workers") or [] for arm in arms]
        if any(workers):
            table.append([words, *(byte_size(max(w[part] for w in each)) if each else "–" for each in workers)])
    first = rows[-1]
    text = (
        f"{first['model']} with random weights on {first['gpus']} × {short(first['gpu'])}: FSDP2, masters and AdamW in "
        f"{first['masters']}, {first['tokens']:,} tokens a GPU in a step; the engine (vLLM {first['vllm']}, tensor "
        f"parallel) on the same GPUs, asleep while the trainer computes. Medians; {first['date'][:10]}."
    )
    return Section("Experiment 3 at real size", text, markdown(["", *arms], table))
