"""What is kept of a verl run: a few columns of its metrics for every step, and one row about all of it.

Both are for docs/results/verl: ``metrics-<label>.jsonl`` as it is, ``row-<label>.json`` as a line of ``runs.jsonl``.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from nvfp4_qat import machine

KEPT = re.compile(
    r"step|attempt|rollout_corr/.*|qat/.*|timing_s/.*|critic/score/mean|actor/(entropy|grad_norm|lr)"
    r"|(response|prompt)_length/mean|val-core/.*"
)
"""Columns of verl's metrics."""

MEANS = (
    "rollout_corr/k3_kl", "rollout_corr/kl", "critic/score/mean", "actor/grad_norm", "actor/entropy",
    "response_length/mean", "qat/sync_bytes", "qat/coverage", "qat/flip_rate",
)  # fmt: skip
MEDIANS = ("timing_s/step", "timing_s/gen", "timing_s/old_log_prob", "timing_s/update_actor", "timing_s/update_weights")
"""The first steps compile kernels, so a mean of seconds would say nothing."""

ENGINE = re.compile(r"(?:worker \d+ of \d+ of )?the engine holds \d+ layers in 4 bits, ([0-9,]+) parameters, .*")
"""What a worker of the engine says after its first update, each with its number."""

TRAINER = re.compile(r"training in .+: \d+ weights in \d+ fusion groups, ([0-9,]+) parameters, .*")
"""What the trainer says of its plan."""

PACKAGES = ("nvfp4-qat", "verl", "vllm", "torch", "transformers", "ray")


def entries(path: Path) -> list[dict[str, Any]]:
    """What verl has logged until now: step and metrics in one; a line that is not complete yet is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        found.append({"step": entry["step"], **entry["data"]})
    return found


def steps(path: Path) -> list[dict[str, Any]]:
    """Of these, training steps; validations may be logged for themselves."""
    return [entry for entry in entries(path) if "actor/grad_norm" in entry]


def reduced(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns that are kept."""
    return [{name: value for name, value in entry.items() if KEPT.fullmatch(name)} for entry in found]


def told(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a run's steps say: means, and medians of seconds."""

    def over(name: str, summary: Any) -> float | None:
        values = [row[name] for row in found if name in row]
        return summary(values) if values else None

    means = {name: over(name, statistics.fmean) for name in MEANS}
    return {"steps": len(found), **means, **{name: over(name, statistics.median) for name in MEDIANS}}


def said(log: Path) -> list[str]:
    """What our package said in a log."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return sorted({line.split("nvfp4-qat: ", 1)[1] for line in lines if "nvfp4-qat: " in line})


def four_bit(lines: Iterable[str]) -> dict[str, int | None]:
    """Parameters in 4 bits, as the trainer plans them and as the engine's workers hold them, of what was `said`."""

    def counted(pattern: re.Pattern[str]) -> int | None:
        found = [int(match[1].replace(",", "")) for line in sorted({*lines}) if (match := pattern.fullmatch(line))]
        return sum(found) if found else None

    lines = list(lines)
    return {"trainer_4bit_parameters": counted(TRAINER), "engine_4bit_parameters": counted(ENGINE)}


def circumstances() -> dict[str, Any]:
    """With what and when something ran."""
    # nvidia-smi: this process has no business on the GPU.
    gpu = _answer("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").partition("\n")[0] or None
    found = machine.circumstances(torch.device("cpu"), packages=PACKAGES)
    return {**found, "gpu": gpu}


def write(out: Path, label: str, row: dict[str, Any], found: Iterable[dict[str, Any]]) -> None:
    """Write a run's row and its reduced metrics."""
    (out / f"row-{label}.json").write_text(json.dumps({"label": label, **row}) + "\n")
    lines = [json.dumps(entry) + "\n" for entry in reduced(found)]
    (out / f"metrics-{label}.jsonl").write_text("".join(lines))


def _answer(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
