"""Sections of the page about engines: how long they take to get new weights, and what their memory holds."""

from __future__ import annotations

from collections.abc import Sequence

from common import Row
from page import Section, markdown
from row_tools import grouped, short, with_range

from nvfp4_qat.report_page import byte_size

GIB = 1 << 30


def rollout(rows: Sequence[Row]) -> Section | None:
    """Rows of `bench_rollout`: weights from the trainer to a vLLM on the same GPU."""
    synced = [row for row in rows if row["method"] != "reload"]
    reloads = {_run(row): row for row in rows if row["method"] == "reload"}
    named = [{**row, "arm": (row["method"], row.get("learning_rate", 0.0))} for row in synced]
    found = grouped(named, ("model", "layers", "masters", "transport", "arm", "gpu", "vllm"), "method")
    if not found:
        return None
    lines = []
    for by in found.values():
        for row in by.values():
            changes = row["method"] == "changes"
            lines.append([
                f"{row['model']}, {row['layers']} layers, {row['masters']} masters", row["transport"],
                f"changes of a step at learning rate {row['learning_rate']:g}" if changes else "everything",
                with_range(row, "seconds"), with_range(row, "from_packed_seconds"), with_range(row, "packing_seconds"),
                f"{row['first_seconds']:.1f}",
                with_range(row if changes else reloads.get(_run(row), row), "reload_seconds"), byte_size(row["bytes"]),
                f"{100 * row['fraction_bytes']:.2f} %" if changes else "100 %", byte_size(row["extra_bytes"]),
                byte_size(row["remembered_bytes"]) if changes else "–", f"{short(row['gpu'])}, vLLM {row['vllm']}",
            ])  # fmt: skip
    head = [
        "model", "transport", "sent", "s", "of packed weights, s", "packing alone, s", "first time, s",
        "vLLM's reload, s", "bytes", "of all bytes", "extra memory", "kept for changes", "GPU",
    ]  # fmt: skip
    text = (
        "`Rollout.sync` from a trainer to a vLLM on the same GPU: seconds from the call until the engine may generate. "
        "The trainer packs its weights meanwhile; beside it stand what a sync takes of weights that were packed "
        "before, and what packing takes alone. vLLM's own reload takes the same tensors in the same process (experts "
        "from the CPU: from the GPU one reload of Qwen3-30B-A3B had not ended after four minutes, tried once, without "
        "a row). Extra memory is what was allocated at the peak of a sync, by the trainer in the same process too."
    )
    if apart := sorted({name.rpartition(".")[2] for r in reloads.values() for name in r["reload_tensors_that_differ"]}):
        text += f" After a reload {' and '.join(f'`{name}`' for name in apart)} differ from what a sync left"
        unread = all(name.endswith("input_global_scale") for name in apart)
        text += ": scales of activations, which W4A16 neither writes nor reads." if unread else "."
    return Section("New weights for an engine", text, markdown(head, lines))


def _run(row: Row) -> tuple[object, ...]:
    """By which a row of vLLM's own reload finds the row beside which it was made."""
    return tuple(row.get(key) for key in ("model", "layers", "masters", "transport", "gpu", "vllm", "commit"))


def memory(rows: Sequence[Row]) -> Section | None:
    """Rows of ``nvfp4-qat bench memory``: what an engine takes of a GPU."""
    found = grouped(rows, ("model", "gpu", "vllm"), "precision")
    lines = []
    for (model, gpu, vllm), by in found.items():
        for precision, row in by.items():
            sizes = [f"{row[key] / GIB:.2f}" for key in MEMORY]
            speeds = [f"{s['median']:,.0f}" for s in row["decode_tokens_per_second"].values()]
            lines.append(
                [f"{model}, {precision}", *sizes, f"{row['kv_cache_tokens']:,}", *speeds, f"{short(str(gpu))}, {vllm}"]
            )
    if not lines:
        return None
    counts = next(iter(next(iter(found.values())).values()))["decode_tokens_per_second"]
    head = ["engine", *MEMORY.values(), "tokens in it", *(f"{n} at once, tokens/s" for n in counts), "GPU, vLLM"]
    text = (
        "What a vLLM with random weights takes of a GPU, in GiB, and how fast it decodes with CUDA graphs: "
        "`nvfp4-qat bench memory --model Qwen/Qwen3-30B-A3B`."
    )
    return Section("Memory of an engine", text, markdown(head, lines))


MEMORY = {
    "weights_bytes": "weights",
    "kv_cache_bytes": "KV cache",
    "activation_bytes": "peak activation",
    "non_torch_bytes": "non-torch",
    "graph_bytes": "CUDA graphs",
}
"""Fields of a row, and what they are called."""
