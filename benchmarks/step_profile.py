"""What limits a training step: a trace of the GPU, summed up.

Kernels, copies and fills are intervals on streams. Their union is the time the GPU did anything; what is left of the
span is idle, which is the host's fault (Python, launches, waiting for a result). Time in which only NCCL's kernels
run is communication that computing did not hide.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import World

Interval = tuple[float, float]

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
GAP = 5.0
"""Microseconds; shorter gaps between kernels are what launching in order costs, not waiting."""

LINES = 30


def profile(run: Callable[[], object], world: World, stem: Path) -> None:
    """Trace ``run`` on every rank; rank 0 writes ``stem.txt`` (the summary) and ``stem.json.gz`` (a Chrome trace).

    Args:
        run: what to trace, already warm.
        world: the ranks that run it together.
        stem: path without an ending.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    world.wait()
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        world.wait()
    if world.rank:
        return
    stem.parent.mkdir(parents=True, exist_ok=True)
    trace = Path(f"{stem}.json")
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb", compresslevel=6) as packed:
        shutil.copyfileobj(plain, packed)
    trace.unlink()
    text = summarize([event for event in events if event.get("cat") in ON_DEVICE])
    host = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=LINES, max_name_column_width=60)
    Path(f"{stem}.txt").write_text(f"{text}\n\nOn the host:\n{host}\n", encoding="utf-8")
    print(f"{stem.name}\n{text}", flush=True)


def summarize(events: Sequence[Mapping[str, Any]]) -> str:
    """A table of a trace's device events.

    Args:
        events: of a Chrome trace, with ``name``, ``ts`` and ``dur`` in microseconds.
    """
    if not events:
        return "nothing ran on a GPU"
    spans = [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events]
    span = max(end for _, end in spans) - min(start for start, _ in spans)
    busy = union(spans)
    computing = union(s for s, e in zip(spans, events, strict=True) if not is_communication(e["name"]))
    talking = union(s for s, e in zip(spans, events, strict=True) if is_communication(e["name"]))
    gaps = [b[0] - a[1] for a, b in zip(busy, busy[1:], strict=False) if b[0] - a[1] > GAP]
    exposed = length(busy) - length(computing)
    lines = [
        f"span {span / 1000:.2f} ms; busy {length(busy) / 1000:.2f} ms; idle {(span - length(busy)) / 1000:.2f} ms, "
        f"of it {sum(gaps) / 1000:.2f} ms in {len(gaps)} gaps over {GAP:g} µs; {len(events)} kernels and copies",
        f"computing {length(computing) / 1000:.2f} ms; communicating {length(talking) / 1000:.2f} ms, "
        f"of it not hidden {exposed / 1000:.2f} ms",
        f"{'ms':>9} {'%':>5} {'calls':>6} {'µs each':>8}  kernel",
    ]
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(str(event["name"]), []).append(float(event["dur"]))
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    for name, times in ranked[:LINES]:
        total = sum(times)
        share = 100 * total / span
        lines.append(f"{total / 1000:>9.3f} {share:>5.1f} {len(times):>6} {total / len(times):>8.1f}  {name[:90]}")
    return "\n".join(lines)


def is_communication(name: str) -> bool:
    return name.startswith("nccl")


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
