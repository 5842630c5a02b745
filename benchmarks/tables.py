"""The sections of docs/performance.md, made of committed rows and of nothing else.

A section without rows is left out. Of several rows for one configuration the last in the file counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import RESULTS, Row, read
from kernel_tables import counter_section, kernel_sections
from page import Group, Panel, Picture, Point, Section, markdown
from rollout_tables import memory, rollout
from row_tools import grouped, machine, short, usable, with_range
from step_tables import step_sections

from nvfp4_qat.report_page import byte_size

LAYERS = ("q, o", "k, v", "gate, up", "down", "experts")
VARIANTS = {
    "module": "module mode",
    "module, packing": "module mode, packing",
    "requantize": "re-quantize",
}


def sections(results: Path = RESULTS) -> list[Section]:
    """All sections that have rows, in the order of the page."""
    made = [
        *kernel_sections(usable(read(results / "kernels.jsonl"))),
        counter_section(usable(read(results / "counters.jsonl"))),
        *step_sections(usable(read(results / "step.jsonl"))),
        modules(usable(read(results / "modules.jsonl"))),
        sync(usable(read(results / "sync.jsonl"))),
        rollout(usable(read(results / "rollout.jsonl"))),
        memory(usable(read(results / "engine_memory.jsonl"))),
        packing(read(results / "memory.jsonl")),
        machines(results),
    ]
    return [section for section in made if section is not None]


def modules(rows: Sequence[Row]) -> Section | None:
    """Rows of `bench_modules`: one layer in module mode."""
    found = grouped(rows, ("gpu", "model", "layer", "tokens"), "variant")
    found = {key: by for key, by in found.items() if "bf16" in by}
    if not found:
        return None
    lines, calls, device = [], [], []
    for _, by in sorted(found.items(), key=lambda item: (item[0][0], LAYERS.index(str(item[0][2])), item[0][3])):
        bf16 = by["bf16"]
        shapes = ", ".join("×".join(map(str, shape)) for shape in bf16["shapes"])
        lines.append([
            short(bf16["gpu"]), f"{bf16['layer']}: {shapes}", f"{bf16['tokens']:,}",
            f"{bf16['us']:.0f}", *(with_range(by.get(v), "ratio", 2) for v in VARIANTS),
            f"{bf16['device_us']:.0f}", *(with_range(by.get(v), "device_ratio", 2) for v in ("module", "requantize")),
            *(_kept(by.get(v), bf16) for v in ("module", "requantize")),
        ])  # fmt: skip
        label = f"{bf16['layer']}: {shapes}\n{bf16['tokens']:,} tokens, {short(bf16['gpu'])}"
        present = {name: by[v] for v, name in VARIANTS.items() if v in by}
        calls.append(Group(label, tuple(Point.of(name, row, "ratio") for name, row in present.items())))
        queued = {name: row for name, row in present.items() if "device_ratio" in row}
        device.append(Group(label, tuple(Point.of(name, row, "device_ratio") for name, row in queued.items())))
    head = [
        "GPU", "layer", "tokens", "bf16, µs", *VARIANTS.values(),
        "bf16, GPU µs", "module mode", "re-quantize", "kept, module mode", "kept, re-quantize",
    ]  # fmt: skip
    text = (
        "Forward and backward of one layer in bf16, without FSDP2, as a multiple of the plain layer. First from "
        "call to call, which for small layers is the time Python needs; then the GPU's time alone. “Packing” "
        "writes to the weight before every call; in training that happens once per optimizer step. “Kept” is what "
        "lies in memory between forward and backward beyond what bf16 keeps; the packed copy (4.5 bits a weight) "
        "is not in it."
    )
    panels = (
        Panel("from call to call / bf16", tuple(calls), line=1.0, digits=2),
        Panel("GPU time / bf16", tuple(device), line=1.0, digits=2),
    )
    alt = "Forward and backward time of single layers relative to bf16, as in the table below"
    return Section("Module mode, one layer", text, markdown(head, lines), Picture("modules.png", alt, panels))


def _kept(row: Row | None, bf16: Row) -> str:
    return "–" if row is None else byte_size(max(row["held_bytes"] - bf16["held_bytes"], 0))


def sync(rows: Sequence[Row]) -> Section | None:
    """Rows of `bench_sync`: getting the weights out."""
    named = [{**row, "way": _way(row), "sharding": "FSDP2"} for row in rows]
    found = grouped(named, ("model", "layers", "gpus", "gpu", "link", "masters"), "way")
    if not found:
        return None
    lines, seconds, received = [], [], []
    for ways in found.values():
        first = next(iter(ways.values()))
        model = f"{first['model']}, {first['layers']} layers, {first['masters']} masters"
        for way, row in ways.items():
            sizes = [byte_size(row[key]) for key in ("received_bytes", "stream_bytes", "extra_bytes")]
            ratio = with_range(row, "ratio")
            lines.append([model, machine(row), way, f"{1000 * row['seconds']:.1f}", ratio, *sizes])
        label = f"{model}\n{machine(first)}"
        milliseconds = [Point.of(way, row, "seconds", 1000) for way, row in ways.items()]
        gigabytes = {way: row["received_bytes"] / 1e9 for way, row in ways.items()}
        seconds.append(Group(label, tuple(milliseconds)))
        received.append(Group(label, tuple(Point(way, v, v, v) for way, v in gigabytes.items())))
    head = ["model", "GPUs", "method", "ms", "/ first row", "received by a GPU", "stream", "extra memory"]
    text = (
        "From a sharded model to a stream of named tensors: bf16 gathered by PyTorch, tensor by tensor or FSDP "
        "unit by unit; bf16 gathered and then packed; and packed where the shards are, so that 4.5 bits a weight "
        "travel. Packing is part of the time. Extra memory is the peak above the model while the stream is "
        "consumed and dropped."
    )
    panels = (Panel("milliseconds", tuple(seconds), digits=1), Panel("GB received by a GPU", tuple(received), digits=2))
    alt = "Time and bytes of streaming all weights of a sharded model, as in the table below"
    return Section("Weights for the rollout engine", text, markdown(head, lines), Picture("sync.png", alt, panels))


def _way(row: Row) -> str:
    if row["method"].startswith("bf16"):
        return str(row["method"])
    where = "" if row["ranks"] == "all" else f", to rank {row['ranks']} alone"
    return f"{row['method']}, {row['layout']}{where}"


def packing(rows: Sequence[Row]) -> Section | None:
    """Rows of `bench_memory`: packing and export in one process on a CPU."""
    found = grouped(rows, ("case", "action"), "action")
    if not found:
        return None
    lines = []
    for row in (row for actions in found.values() for row in actions.values()):
        sizes = [byte_size(row[key]) for key in ("model_bytes", "bound_bytes", "peak_above_model_bytes")]
        lines.append([row["case"], row["action"], *sizes, f"{row['seconds']:.1f}", row["cpu"], row["torch"]])
    head = ["model", "what", "model's bytes", "largest layer and its packed copy", "peak above the model", "s", "CPU"]
    text = (
        "Resident memory that packing every weight, or saving a checkpoint, needs above the model in one process "
        "without a GPU."
    )
    return Section("Memory of packing and export", text, markdown([*head, "torch"], lines))


def machines(results: Path) -> Section | None:
    """Where the rows on the page come from."""
    seen: dict[tuple[str, ...], set[str]] = {}
    for name in ("kernels", "counters", "step", "modules", "sync", "rollout"):
        for row in usable(read(results / f"{name}.jsonl")):
            versions = [str(row.get(key) or "–") for key in ("torch", "triton", "transformers", "nccl", "commit")]
            seen.setdefault((name, row["gpu"], *versions), set()).add(row["date"][:10])
    if not seen:
        return None
    lines = [[*key, " – ".join(sorted({min(days), max(days)}))] for key, days in sorted(seen.items())]
    head = ["rows", "GPU", "torch", "triton", "transformers", "NCCL", "commit", "date (UTC)"]
    text = "A “+” after a commit: the code had changes that were committed later. NCCL's settings are in the rows."
    return Section("Machines and versions", text, markdown(head, lines))
