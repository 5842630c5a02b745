"""Time, memory and traffic of a training step: rows of `bench_step` as two sections."""

from __future__ import annotations

from collections.abc import Sequence

from common import Row
from page import Group, Panel, Picture, Point, Section, markdown
from row_tools import Configurations, grouped, machine, with_range

from nvfp4_qat.report_page import byte_size

CONFIGURATION = (
    "model", "layers", "gpus", "gpu", "sharding", "link", "masters", "checkpointing", "micro_batches", "tokens",
)  # fmt: skip
QAT = {"gather": "gather mode", "keep": "gathered once", "module": "module mode", "requantize": "re-quantize"}
AGAIN = {"bf16 again": "bf16 again"}
"""Arms as the benchmark and as the page name them; the baseline is ``bf16``."""

WHAT = ["model", "GPUs", "masters", "tokens a GPU"]


def step_sections(rows: Sequence[Row]) -> list[Section]:
    """Nothing, or time and memory; a configuration without its baseline is left out."""
    found = {key: arms for key, arms in grouped(rows, CONFIGURATION, "arm").items() if "bf16" in arms}
    measured = {key: arms for key, arms in found.items() if arms["bf16"]["peak_bytes"]}
    return [section(chosen) for section, chosen in ((_time, found), (_memory, measured)) if chosen]


def _time(found: Configurations) -> Section:
    lines, groups = [], []
    names = QAT | AGAIN
    for arms in found.values():
        bf16 = arms["bf16"]
        cells = [with_range(arms.get(arm), "ratio") for arm in names]
        lines.append([*_what(bf16), f"{bf16['ms']:.1f}", *cells])
        points = [Point.of(name, arms[arm], "ratio") for arm, name in QAT.items() if arm in arms]
        again = arms.get("bf16 again", {}).get("ratio_samples")
        groups.append(Group(_label(bf16), tuple(points), noise=(min(again), max(again)) if again else None))
    text = (
        "A whole step: forward, loss, backward, clipping, fused AdamW, and for the QAT arms amax, its all-reduce "
        "and packing. “Gathered once” is gather mode with `keep_gathered=True`. The ratio to bf16 is the median over "
        "rounds, in brackets the smallest and largest. The last column is bf16 against itself."
    )
    head = [*WHAT, "bf16, ms", *(f"{name} / bf16" for name in names.values())]
    alt = "Time of a training step relative to bf16 in every configuration of the table below"
    panel = Panel("time of a step / bf16", tuple(groups), line=1.0)
    return Section("A training step", text, markdown(head, lines), Picture("step.png", alt, (panel,)))


def _memory(found: Configurations) -> Section:
    lines, groups = [], []
    for arms in found.values():
        bf16 = arms["bf16"]
        ratios = {arm: arms[arm]["peak_bytes"] / bf16["peak_bytes"] for arm in QAT if arm in arms}
        cells = [f"{arms[arm]['peak_bytes'] / 2**30:.2f} ({ratios[arm]:.3f})" if arm in ratios else "–" for arm in QAT]
        gathered = [byte_size(arms[arm]["gathered_bytes"]) for arm in ("bf16", "gather", "keep") if arm in arms]
        traffic = " → ".join(gathered) if bf16["gathered_bytes"] else "–"
        lines.append([*_what(bf16), f"{bf16['peak_bytes'] / 2**30:.2f}", *cells, traffic])
        groups.append(Group(_label(bf16), tuple(Point(QAT[arm], v, v, v) for arm, v in ratios.items())))
    text = (
        "Peak memory of tensors during a step, on the GPU that needs most, and the bytes that a GPU receives in "
        "the all-gathers of one step. What stays in bf16 (embedding, output head, norms, routers) is gathered in "
        "both."
    )
    head = [
        *WHAT,
        "bf16, GiB",
        *(f"{name} (/ bf16)" for name in QAT.values()),
        "all-gathered, bf16 → gather mode → gathered once",
    ]
    alt = "Peak memory of a training step relative to bf16 in every configuration of the table below"
    panel = Panel("peak memory of a step / bf16", tuple(groups), line=1.0)
    return Section("Memory and traffic of a step", text, markdown(head, lines), Picture("memory.png", alt, (panel,)))


def _what(row: Row) -> list[str]:
    """Cells under `WHAT`."""
    tokens = f"{row['tokens']:,}"
    if row["micro_batches"] > 1:
        tokens += f" × {row['micro_batches']} micro-batches"
    if not row["checkpointing"]:
        tokens += ", no checkpointing"
    return [f"{row['model']}, {row['layers']} layers", machine(row), row["masters"], tokens]


def _label(row: Row) -> str:
    model, where, masters, tokens = _what(row)
    return f"{model}, {masters} masters, {tokens} tokens\n{where}"
