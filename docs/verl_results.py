"""Write the result tables of docs/verl.md from the committed runs: ``python docs/verl_results.py``.

``docs/results/verl/runs.jsonl`` has a line for each run of ``tests/verl_grpo.py`` and ``tests/verl_resume.py``, which
write it (``row-*.json``) beside the metrics of its steps (``metrics-*.jsonl``, to be committed with it). A test
compares the page with what this prints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markers import between

from nvfp4_qat.report_page import byte_size, percent, ratio, small
from nvfp4_qat.run_files import known, number

DOCS = Path(__file__).parent
PAGE, RUNS = DOCS / "verl.md", DOCS / "results" / "verl" / "runs.jsonl"
BEGIN, END = "<!-- results: written by docs/verl_results.py -->", "<!-- results end -->"

SETTING = ("model", "strategy", "gpus", "tensor_parallel", "name")
"""What runs that are compared with each other have in common, beside the weights that they begin from."""

HEAD = [
    "model", "strategy", "arm", "GPUs", "TP", "steps", "k3 KL", "no QAT / QAT", "4-bit parameters, trainer / engine",
    "bytes a sync", "seconds a step", "seconds a sync",
]  # fmt: skip
RESUMED = [
    "model", "strategy", "arm", "GPUs", "TP", "killed after step", "went on after", "largest k3 KL, before → after",
    "held-out answers right, before → after", "all as it must be",
]  # fmt: skip
ORDER = ("bf16", "noqat", "qat")
K3 = "rollout_corr/k3_kl"
START = "starting_weights"

Row = dict[str, Any]


def rows() -> list[Row]:
    """The committed runs, those of a setting beside each other."""
    lines = RUNS.read_text(encoding="utf-8").splitlines() if RUNS.exists() else []
    found: list[Row] = [json.loads(line) for line in lines if line]
    return sorted(found, key=lambda row: (*(str(row[key]) for key in SETTING), ORDER.index(row["arm"])))


def metrics(row: Row) -> Path:
    """The file of a run's steps."""
    return RUNS.parent / f"metrics-{row['label']}.jsonl"


def cells(row: Row, runs: Sequence[Row]) -> list[str]:
    """A run as cells of the first table."""
    k3 = number(row[K3])
    without = next((other for other in runs if other["arm"] == "noqat" and comparable(other, row)), None)
    gain = number(without[K3]) / k3 if without and row["arm"] == "qat" else math.nan
    # What is streamed is what the trainer computes with, but for the comparison without QAT.
    trained = row["trainer_4bit_parameters"] if row["arm"] == "qat" else 0
    parameters = "–" if row["arm"] == "bf16" else f"{trained:,} / {row['engine_4bit_parameters']:,}"
    seconds = [small(number(row[name])) for name in ("timing_s/step", "timing_s/update_weights")]
    return [
        *about(row), str(row["steps"]), small(k3), f"**{ratio(gain)}**" if known(gain) else small(gain),
        parameters, byte_size(number(row["qat/sync_bytes"])), *seconds,
    ]  # fmt: skip


def comparable(a: Row, b: Row) -> bool:
    """Whether two runs may be held against each other; one that does not say what it began from, with none."""
    same = all(a[key] == b[key] for key in SETTING)
    return same and a.get(START) is not None and a[START] == b.get(START)


def resumed(row: Row) -> list[str]:
    """A killed run as cells of the second table."""
    k3 = [small(max(row.get(name, []), default=math.nan)) for name in ("k3_before", "k3_after")]
    answers = [percent(number(share)) for share in row.get("held_out", [])]
    arm = row["arm"] if row["arm"] == row["resumed_from"] else f"{row['resumed_from']} → {row['arm']}"
    return [
        *about({**row, "arm": arm, "name": ""}), str(max(row.get("steps_before", []), default="–")),
        str(row["checkpoint"]), " → ".join(k3), " → ".join(answers), "yes" if row["exit"] == 0 else "no",
    ]  # fmt: skip


def about(row: Row) -> list[str]:
    """What is run, in cells."""
    model = f"{row['model']}, {row['name']}" if row["name"] else row["model"]
    return [model, row["strategy"], row["arm"], str(row["gpus"]), str(row["tensor_parallel"])]


def table() -> str:
    """Both tables in Markdown, and with what the runs were made."""
    found = rows()
    if not found:
        return "No run has been committed yet."
    runs = [row for row in found if "resumed_from" not in row]
    killed = [row for row in found if "resumed_from" in row]
    parts = []
    if runs:
        parts += [markdown([HEAD, *(cells(row, runs) for row in runs)])]
    if killed:
        parts += ["Killed with all of its processes, and started again:"]
        parts += [markdown([RESUMED, *map(resumed, killed)])]
    return "\n\n".join([*parts, "\n".join(made_with(found))])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rest])


def made_with(found: Sequence[Row]) -> list[str]:
    """A line for each set of GPU and versions."""
    sets: dict[str, list[Row]] = {}
    for row in found:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        sets.setdefault(f"{row['gpu']}; {versions}", []).append(row)
    return [f"- {text} ({', '.join(sorted({str(row['date']) for row in some}))})" for text, some in sets.items()]


def updated(page: str) -> str:
    """The page with the tables between its markers renewed."""
    return between(page, BEGIN, END, f"\n{table()}\n")


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
