"""Sections that are a table of a single file of rows: quality of the rounding, and a model at real size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from page import Section, markdown
from row_tools import short
from rows import Row
from words import k3

from nvfp4_qat.report_page import byte_size


def quantizers(rows: Sequence[Row]) -> Section | None:
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
            k3(row["kl"]) if row["kl"] else "0",
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


def real_size(rows: Sequence[Row]) -> Section | None:
    """Qwen3-30B-A3B's shape in both precisions; the last run of each arm counts."""
    arms = [arm for arm in ("bf16", "nvfp4") if any(row["arm"] == arm for row in rows)]
    if not arms:
        return None
    rows = [row for arm in arms for row in _last_run([row for row in rows if row["arm"] == arm])]
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


def _last_run(rows: Sequence[Row]) -> Sequence[Row]:
    """Of an arm's rows those of its last run, whose first one is its budget: one that ended early takes no others."""
    begins = [i for i, row in enumerate(rows) if row["what"] == "budget"]
    return rows[begins[-1] :] if begins else rows
